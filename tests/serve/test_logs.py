"""What a line of the log says beside its message, and that it is about the right job."""

import asyncio
import json
import logging

import pytest

from serve.logs import Logs, about


@pytest.fixture
def lines(capsys):
    before = {name: _state(logging.getLogger(name)) for name in ("serve", "pusa_dist")}
    yield lambda: capsys.readouterr().err.splitlines()
    for name, (handlers, level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def _state(logger):
    return list(logger.handlers), logger.level, logger.propagate


def test_a_json_line_says_who_wrote_it_and_what_it_is_about(lines):
    Logs("json", {"role": "Denoiser"}).of(gang="gang-1").of(rank=3).configure()
    with about(job="video_1", tenant="acme"):
        logging.getLogger("pusa_dist.worker").warning("slow: %d s", 5)
    logging.getLogger("serve.gang").info("two\nlines")
    logging.getLogger("serve.gang").debug("not this")
    first, second = map(json.loads, lines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "WARNING", "logger": "pusa_dist.worker", "role": "Denoiser", "gang": "gang-1", "rank": 3,
        "job": "video_1", "tenant": "acme", "message": "slow: 5 s",
    }  # fmt: skip
    assert second["message"] == "two\nlines"
    assert "job" not in second


def test_a_json_line_holds_its_traceback(lines):
    Logs("json").configure()
    try:
        raise RuntimeError("lost")
    except RuntimeError:
        logging.getLogger("serve.dispatcher").exception("it failed")
    (line,) = map(json.loads, lines())
    assert line["exception"].endswith("RuntimeError: lost")


def test_a_text_line_is_for_people(lines):
    Logs("text", {"role": "Denoiser", "rank": 0}).configure()
    logging.getLogger("serve.gang").error("gang lost: %s", "100%")
    (line,) = lines()
    assert line.endswith("ERROR Denoiser rank 0: gang lost: 100%")


def test_a_process_that_is_configured_twice_writes_every_line_once(lines):
    Logs("json", {"role": "Denoiser"}).configure()
    Logs("json", {"role": "Denoiser", "gang": "gang-1"}).configure()
    logging.getLogger("serve.gang").info("once")
    assert [json.loads(line)["gang"] for line in lines()] == ["gang-1"]


def test_what_a_line_is_about_goes_with_tasks_and_threads_and_not_beyond(lines):
    Logs("json").configure()
    logger = logging.getLogger("serve.dispatcher")

    async def work():
        await asyncio.sleep(0)
        await asyncio.to_thread(logger.info, "in a thread")

    async def scenario():
        tasks = []
        for name in ("a", "b"):
            with about(job=name):
                tasks.append(asyncio.create_task(work()))
        logger.info("outside")
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    said = sorted((line["message"], line.get("job")) for line in map(json.loads, lines()))
    assert said == [("in a thread", "a"), ("in a thread", "b"), ("outside", None)]
