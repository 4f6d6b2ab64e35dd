"""Moderation: asked before a job is accepted and before a result is published, and nothing passes without it."""

import asyncio
import errno
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pusa_dist.errors import ConfigError, RequestError
from serve import moderation_example
from serve.moderation import Finished, Moderation, ModerationUnavailableError, Submission
from serve.store.artifacts import StorageError
from tests.serve.api_support import Service, open_service, png
from tests.serve.dispatcher_support import add_long, stored

EXAMPLE = "serve.moderation_example:refuse_listed"


def broken(subject: Submission | Finished) -> str | None:
    raise RuntimeError(f"no answer about {subject.request.prompt}")


def recorded(subjects: list[Any]) -> Callable[[Any], None]:
    return subjects.append


def check_result(moderation: Moderation, *arguments: Any) -> None:
    asyncio.run(moderation.check_result(*arguments))


@pytest.fixture
def held() -> Iterator[tuple[Callable[[Any], None], threading.Event]]:
    """A hook that does not answer until it is let go."""
    let_go = threading.Event()

    def hold(_: Submission | Finished) -> None:
        let_go.wait(60)

    yield hold, let_go
    let_go.set()


def post(service: Service, prompt: str) -> Any:
    return service.client.post("/v1/videos", data={"prompt": prompt}, files={"input_reference": ("a", png())})


def test_the_example_refuses_a_prompt_and_nothing_is_stored(tmp_path: Path) -> None:
    with open_service(tmp_path, moderation=EXAMPLE) as service:
        answer = post(service, "a Deepfake of a king")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "moderation_refused", "prompt")
        assert "its prompt asks for what is not made here" in error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert (service.stored_files(), service.store.counts()) == ([], {})
        assert post(service, "a king").status_code == 200


def test_the_hook_sees_what_was_asked_and_the_files_that_came(tmp_path: Path) -> None:
    subjects: list[Any] = []
    with open_service(tmp_path) as service:
        service.gateway._intake._moderation = Moderation(recorded(subjects))
        post(service, "a king")
    (submission,) = subjects
    assert isinstance(submission, Submission)
    assert (submission.tenant, submission.request.prompt, submission.inputs) == ("local", "a king", (png(),))


def test_a_hook_that_fails_lets_nothing_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_service(tmp_path) as service, caplog.at_level(logging.INFO):
        service.gateway._intake._moderation = Moderation(broken)
        answer = post(service, "a king")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moderation_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert (service.stored_files(), service.store.counts()) == ([], {})
    assert "RuntimeError" in caplog.text
    assert "a king" not in caplog.text


def test_a_result_can_be_refused_before_anybody_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects: list[Any] = []
    with open_service(tmp_path) as service:
        job = service.job(service.create()["id"])
        keys = {variant: f"jobs/{job.id}/attempts/1/{variant}" for variant in ("video", "thumbnail")}
        for variant, key in keys.items():
            service.artifacts.put(key, variant.encode())
        check_result(Moderation(recorded(subjects)), job, keys, service.artifacts)
        (finished,) = subjects
        assert isinstance(finished, Finished)
        assert (finished.job_id, finished.variants) == (job.id, {"video", "thumbnail"})
        assert finished.read("thumbnail") == b"thumbnail"

        example = Moderation.load(EXAMPLE)
        check_result(example, job, keys, service.artifacts)
        monkeypatch.setattr(moderation_example, "FILES", {hashlib.sha256(b"video").hexdigest()})
        with pytest.raises(RequestError, match="the video was refused: it is on the operator's list") as refusal:
            check_result(example, job, keys, service.artifacts)
        assert refusal.value.code == "moderation_refused"
        with pytest.raises(ModerationUnavailableError):
            check_result(Moderation(broken), job, keys, service.artifacts)


def test_a_result_that_cannot_be_read_is_no_failure_of_the_hook(tmp_path: Path) -> None:
    def away(_: str) -> bytes:
        raise StorageError(errno.EIO, "no answer")

    def reading(subject: Any) -> None:
        subject.read("video")

    with open_service(tmp_path) as service:
        job = service.job(service.create()["id"])
        service.artifacts.read = away  # type: ignore[method-assign]
        with pytest.raises(StorageError):
            check_result(Moderation(reading), job, {"video": "jobs/j/video"}, service.artifacts)


def test_a_result_that_is_still_being_read_when_the_time_is_over_is_none_either(tmp_path: Path, held: Any) -> None:
    def reading(subject: Any) -> None:
        subject.read("video")

    with open_service(tmp_path) as service:
        job = service.job(service.create()["id"])
        service.artifacts.read = held[0]  # type: ignore[method-assign]
        with pytest.raises(StorageError):
            check_result(Moderation(reading, timeout_s=0.1), job, {"video": "jobs/j/video"}, service.artifacts)


def test_a_hook_that_does_not_answer_lets_nothing_pass_and_keeps_no_other_request(
    tmp_path: Path, held: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hook, let_go = held
    with open_service(tmp_path, moderation=EXAMPLE, moderation_timeout_s=2.5) as service:
        moderation = service.gateway._intake._moderation
        assert moderation._timeout_s == 2.5
        moderation._hook = hook

        async def orders(client: httpx.AsyncClient, count: int) -> list[Any]:
            asked = [client.post("/v1/videos", data={"prompt": f"a king {number}"}) for number in range(count)]
            return [(one.status_code, one.json()["error"]["code"]) for one in await asyncio.gather(*asked)]

        async def scenario() -> None:
            transport = httpx.ASGITransport(service.client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
                first = asyncio.create_task(orders(client, 60))
                await asyncio.sleep(0.5)
                for path in ("/v1/videos", "/v1/models", "/v1/usage"):
                    async with asyncio.timeout(1.5):
                        assert (await client.get(path)).status_code == 200
                assert set(await first) == {(503, "moderation_unavailable")}
                # It keeps all its threads: who comes now is told so at once.
                began = time.monotonic()
                assert set(await orders(client, 10)) == {(503, "moderation_unavailable")}
                assert time.monotonic() - began < 1.5
                let_go.set()
                moderation._hook = lambda _: None
                assert (await client.post("/v1/videos", data={"prompt": "a king"})).status_code == 200

        asyncio.run(scenario())
    assert "has not answered within moderation_timeout_s=2.5" in caplog.text
    assert "a king" not in caplog.text


def test_a_hook_that_does_not_answer_holds_up_no_job_that_is_not_judged(world: Any, held: Any) -> None:
    hook, _ = held
    num_judged = 40  # more than any pool has threads here
    for number in range(num_judged):
        world.add(f"judged-{number}")

    async def scenario() -> None:
        options = {"max_decoding": 100, "num_decoders": 100, "moderation": Moderation(hook, timeout_s=60.0)}
        async with world.dispatcher(**options) as dispatcher:
            await world.until(
                lambda: [one.stage for one in dispatcher._attempts.values()].count("decode") == num_judged
            )
            add_long(world, "other", steps=6, tenant="other")
            await world.until(lambda: ("other", 4) in world.gang.acknowledged, 10)
            held[1].set()
            await world.until(lambda: len(world.metrics.outcomes) == num_judged + 1)

    asyncio.run(scenario())
    assert set(world.metrics.outcomes) == {"completed"}


def test_a_result_whose_hook_is_late_fails_with_a_code(world: Any, held: Any) -> None:
    world.add("j")

    async def scenario() -> None:
        async with world.dispatcher(moderation=Moderation(held[0], timeout_s=0.2)):
            await world.ended("j")

    asyncio.run(scenario())
    assert (world.job("j").error_code, stored(world, "j")) == ("moderation_unavailable", [])


def test_it_is_off_by_default(tmp_path: Path) -> None:
    Moderation.load(None).check_submission("local", None, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["", "serve.moderation_example", "serve.moderation_example:nothing", "serve.nowhere:hook", ":hook",
             "serve.moderation_example:WORDS"]
)  # fmt: skip
def test_a_hook_that_does_not_exist_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigError, match="moderation="):
        Moderation.load(name)


# Before a result is published, by the dispatcher.


@pytest.mark.parametrize(("hook", "code"), [(lambda _: "no", "moderation_refused"), (broken, "moderation_unavailable")])
def test_a_job_whose_result_is_refused_fails_with_a_code_and_leaves_no_file(world: Any, hook: Any, code: str) -> None:
    world.add("j")

    async def scenario() -> None:
        async with world.dispatcher(moderation=Moderation(hook)):
            await world.ended("j")

    asyncio.run(scenario())
    job = world.job("j")
    assert (job.status, job.error_code, dict(job.results)) == ("failed", code, {})
    assert stored(world, "j") == []


def test_what_passes_is_published_and_a_preview_that_does_not_is_not_shown(world: Any) -> None:
    seen = []

    def no_previews(subject: Submission | Finished) -> str | None:
        assert isinstance(subject, Finished)
        seen.append((subject.job_id, sorted(subject.variants)))
        return "not yet" if "preview" in subject.variants else None

    add_long(world, "j", preview_every=2)

    async def scenario() -> None:
        async with world.dispatcher(moderation=Moderation(no_previews)):
            await world.ended("j")

    asyncio.run(scenario())
    job = world.job("j")
    assert (job.status, set(job.results), job.preview_step) == ("completed", {"video"}, None)
    assert ("j", ["preview"]) in seen
    assert ("j", ["video"]) in seen
