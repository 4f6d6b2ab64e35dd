"""Decoding in processes that can be killed: whatever happens there, the caller gets an answer in time."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from pusa_dist.errors import RequestError
from pusa_dist.media.decoders import DecodeLimits, DecoderLostError, Decoders, DecodersBusyError, Turns
from pusa_dist.media.probe import probe
from pusa_dist.media.source import InProcess
from pusa_dist.request import MediaInfo
from tests.unit.decoders_support import (
    CLIP,
    COMMAND,
    LIMITS,
    PNG,
    SLACK_S,
    animation,
    bewitched_decoders,
    children,
    clip,
    image,
)


@pytest.fixture(scope="module")
def decoders():
    with bewitched_decoders() as pool:
        yield pool


def settled(decoders: Decoders) -> list[psutil.Process]:
    """The decoders, once they work and nothing else is left."""
    for _ in range(2):
        assert decoders.probe(PNG) == MediaInfo(kind="image", width=64, height=48, num_frames=1)
    deadline = time.monotonic() + SLACK_S
    while any(one.ppid() != os.getpid() for one in children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = children()
    assert len(found) <= 2
    assert all(one.ppid() == os.getpid() for one in found)
    return found


def refusal(decoders: Decoders, data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decoders.probe(data, "input_reference")
    assert caught.value.param == "input_reference"
    assert str(caught.value).startswith("input_reference: ")
    return caught.value


def test_a_decoder_answers_as_the_probe_does(decoders):
    for data in (PNG, CLIP, image("JPEG"), clip("webm", "libvpx-vp9")):
        assert decoders.probe(data) == probe(data)
    for data in (b"", b"text", animation("GIF", 2), CLIP[:-1], PNG[:99]):
        with pytest.raises(RequestError) as direct:
            probe(data, "input_reference")
        assert refusal(decoders, data).args == direct.value.args


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (2, 4), (-5, None)])
def test_frames_are_those_of_this_process_bit_for_bit(decoders, fit, start, stop):
    here = InProcess()
    assert np.array_equal(decoders.image(PNG, 32, 80, fit), here.image(PNG, 32, 80, fit))
    ours, theirs = (list(one.clip(CLIP, start, stop, 32, 80, fit)) for one in (here, decoders))
    assert len(ours) == len(theirs) > 0
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_clip_that_is_too_short_says_so(decoders):
    with pytest.raises(RequestError) as caught:
        list(decoders.clip(CLIP, 0, 13, 32, 32, "crop"))
    assert caught.value.code == "clip_too_short"


def test_a_file_costs_milliseconds_and_no_torch(decoders):
    def processor_s() -> float:
        return sum(sum(process.cpu_times()[:4]) for process in [psutil.Process(), *settled(decoders)])

    before = processor_s()
    for _ in range(20):
        decoders.probe(PNG)
    assert (processor_s() - before) / 20 < 0.1  # two probes of settled() included
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, pusa_dist.media.decoder; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert modules.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"spin!!", "decoding_too_slow"),
        (b"eat!!!", "decoding_too_large"),
        (b"segv!!", "decoding_failed"),
        (b"abort!", "decoding_failed"),
        (b"kill!!", "decoding_failed"),
        (b"bug!!!", "decoding_failed"),
        (b"quit!!", "decoding_failed"),
        (b"half!!", "decoding_failed"),
        (b"huge!!", "decoding_failed"),
        (b"frames", "decoding_failed"),
        (b"noise!", "decoding_failed"),
        (b"lie!!!", "decoding_failed"),
        (b"nojson", "decoding_failed"),
        (b"inject", "decoding_failed"),
        (b"write!", "decoding_failed"),
    ],
)
def test_a_decoder_that_misbehaves_is_an_answer_in_time_and_is_replaced(decoders, data, code):
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    error = refusal(decoders, data)
    assert error.code == code
    assert time.monotonic() - started < SLACK_S
    assert error.message.isprintable()
    settled(decoders)
    assert psutil.Process().memory_info().rss - before < 20_000_000
    assert not os.path.exists("/tmp/decoder-was-here") or os.path.getsize("/tmp/decoder-was-here") == 0


def test_a_decoder_that_hangs_is_killed_and_replaced():
    impatient = Decoders(2, DecodeLimits(wall_s=1.0, cpu_s=1), command=COMMAND)
    started = time.monotonic()
    for data in (b"sleep!", b"stop!!"):
        assert refusal(impatient, data).code == "decoding_too_slow"
    assert 2.0 <= time.monotonic() - started < 2.0 + SLACK_S
    deadline = time.monotonic() + SLACK_S
    while outcomes(impatient, [(PNG, "")])[0] != ["image"]:
        assert time.monotonic() < deadline
    impatient.close()


def test_decoders_killed_from_outside_while_idle_are_replaced_unseen(decoders):
    for child in settled(decoders):
        child.kill()
    assert decoders.probe(PNG).kind == "image"
    assert len(list(decoders.clip(CLIP, 0, 5, 32, 32, "crop"))) == 5
    settled(decoders)


def test_a_decoder_killed_from_outside_again_and_again_is_not_the_files_fault(decoders):
    with pytest.raises(DecoderLostError):
        decoders.probe(b"parent")
    settled(decoders)


def test_a_decoder_that_cannot_start_is_not_the_files_fault():
    pool = Decoders(1, command=(sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(DecoderLostError, match="cannot start"):
        pool.probe(PNG)
    pool.close()
    with pytest.raises(DecoderLostError, match="closed"):
        pool.probe(PNG)


def test_a_decoder_knows_no_environment_and_holds_no_files_but_its_pipe(decoders, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for child in settled(decoders):
        child.kill()
    names = set(refusal(decoders, b"env!!!").message.removeprefix("input_reference: ").split())
    assert names <= {"PYTHONPATH", "OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH", "LC_CTYPE"}
    files = refusal(decoders, b"fds!!!").message.removeprefix("input_reference: ").split()
    # Its standard streams, the pipe for its answer, and the listing itself.
    assert sorted(file.partition(":")[0] for file in files) == ["/dev/null"] * 3 + ["gone", "pipe"]


def test_a_slow_reader_is_not_a_slow_decoder(decoders):
    def frames(pool):  # more than fit into a pipe
        return pool.clip(CLIP, 0, 9, 512, 512, "crop")

    started = time.monotonic()
    list(frames(decoders))
    wall_s = 2.0 + 5 * (time.monotonic() - started)
    impatient = Decoders(1, DecodeLimits(wall_s=wall_s))
    slowly = frames(impatient)
    next(slowly)
    time.sleep(wall_s + 0.2)
    assert len(list(slowly)) == 8
    impatient.close()


def test_a_reader_that_leaves_a_clip_leaves_no_decoder_at_work(decoders):
    frames = decoders.clip(CLIP, 0, 9, 1024, 1024, "crop")
    next(frames)
    frames.close()
    settled(decoders)


def test_files_beyond_the_limit_are_not_even_sent(decoders):
    assert refusal(decoders, PNG + bytes(LIMITS.num_bytes)).code == "media_too_large"


def outcomes(decoders: Decoders, files: list[tuple[bytes, str]]) -> tuple[list[str], float]:
    """What became of files sent at the same time, each on behalf of an owner; and the seconds it took."""
    results: list[str] = []

    def send(data: bytes, owner: str) -> None:
        try:
            results.append(decoders.probe(data, owner=owner).kind)
        except RequestError as error:
            results.append(error.code)

    threads = [threading.Thread(target=send, args=one) for one in files]
    started = time.monotonic()
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    return results, time.monotonic() - started


def test_no_more_files_are_decoded_at_once_than_there_are_decoders(decoders):
    settled(decoders)
    results, seconds = outcomes(decoders, [(b"nap...", "a")] * 6)
    assert results == ["unsupported_media"] * 6
    assert seconds >= 0.9  # three rounds


def test_an_owner_cannot_have_every_decoder_nor_a_long_queue():
    turns = Turns(total=2, per_owner=1, max_waiting=1)
    had = []

    def wait() -> None:
        with turns.taken("greedy"):
            had.append("greedy")

    waiting = threading.Thread(target=wait)
    with turns.taken("greedy"):
        waiting.start()
        while not turns.num_waiting("greedy"):
            time.sleep(0.001)
        with pytest.raises(DecodersBusyError), turns.taken("greedy"):
            pass
        with turns.taken("other"):
            assert had == []
    waiting.join()
    assert had == ["greedy"]
    with turns.taken("a"), turns.taken("b"):  # everything was given back
        pass


OWNER = """
import psutil, sys
from pusa_dist.media.decoders import Decoders
pool = Decoders(1)
pool.image(bytes.fromhex(sys.argv[1]), 16, 16, "crop")
print(psutil.Process().children()[0].pid, flush=True)
sys.stdin.read()
"""


def test_a_decoder_outlives_its_owner_by_no_time_at_all():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OWNER, image(width=16, height=16).hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as owner:
        decoder = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    gone, alive = psutil.wait_procs([decoder], timeout=SLACK_S)
    assert (len(gone), alive) == (1, [])
