"""Decoding in processes that can be killed: whatever a file does there, the caller gets an answer in time."""

import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pusa_dist.errors import RequestError
from pusa_dist.media.decoders import DecodeLimits, DecoderLostError, Decoders, DecodersBusyError, Turns
from pusa_dist.media.probe import MAX_CLIP_FRAMES, MAX_SIDE, probe
from pusa_dist.media.source import InProcess
from pusa_dist.request import MediaInfo

# A decoder that does what the file tells it to, as a file that has taken it over might.
BEWITCHED = """
import os, signal, sys, time
from pusa_dist.errors import RequestError
from pusa_dist.media import decoder, wire
link = lambda fd: os.readlink(f"/proc/self/fd/{fd}") if os.path.exists(f"/proc/self/fd/{fd}") else "gone"
honest = decoder.answer
def answer(request, data, pipe):
    match data[:6]:
        case b"sleep!": time.sleep(600)
        case b"nap...": time.sleep(0.3)
        case b"spin!!":
            while True: pass
        case b"segv!!": os.kill(os.getpid(), signal.SIGSEGV)
        case b"abort!": os.abort()
        case b"kill!!": os.kill(os.getpid(), signal.SIGKILL)
        case b"parent": os.kill(os.getppid(), signal.SIGKILL)
        case b"stop!!": os.kill(os.getppid(), signal.SIGSTOP); os.kill(os.getpid(), signal.SIGSTOP)
        case b"eat!!!": blocks = [bytearray(1 << 24) for _ in range(1000)]
        case b"bug!!!": raise KeyError("a bug")
        case b"quit!!": os._exit(0)
        case b"half!!": pipe.write(wire.HEADER.pack(wire.RESULT, 100) + b"{"); pipe.flush(); os._exit(1)
        case b"huge!!": pipe.write(wire.HEADER.pack(wire.RESULT, 1 << 60)); pipe.flush()
        case b"frames": wire.write(pipe, wire.FRAME, bytes(5))
        case b"noise!": pipe.write(os.urandom(1000)); pipe.flush()
        case b"lie!!!": wire.write(pipe, wire.RESULT, b'{"kind": "clip", "width": -1, "height": "x"}')
        case b"nojson": wire.write(pipe, wire.RESULT, b"{")
        case b"inject": wire.write(pipe, wire.REFUSAL, b'{"message": "a\\\\nb", "code": "x"}')
        case b"write!":
            with open("/tmp/decoder-was-here", "w") as file: file.write("x" * 10000)
        case b"env!!!": raise RequestError(" ".join(sorted(os.environ)), None, "environment")
        case b"fds!!!": raise RequestError(" ".join(map(link, os.listdir("/proc/self/fd"))), None, "files")
    honest(request, data, pipe)
decoder.answer = answer
decoder.main(int(sys.argv[1]))
"""
COMMAND = (sys.executable, "-P", "-c", BEWITCHED)
LIMITS = DecodeLimits(num_bytes=8_000_000, wall_s=60.0, cpu_s=3, memory_bytes=2**30)
SLACK_S = 90.0
"""For a busy machine; a hang is 600 s."""


def image(kind: str = "PNG", width: int = 64, height: int = 48, **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def animation(kind: str, num_frames: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (side, side), index % 256) for index in range(num_frames)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=10)
    return buffer.getvalue()


def clip(
    container: str = "mp4",
    codec: str = "mpeg4",
    num_frames: int = 9,
    width: int = 64,
    height: int = 48,
    fps: Fraction | int = 8,
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(num_frames):
            pixels = np.full((height, width, 3), index * 20 % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


PNG, CLIP = image(), clip()


@pytest.fixture(scope="module")
def decoders():
    OTHERS.update(psutil.Process().children(recursive=True))
    pool = Decoders(2, LIMITS, command=COMMAND)
    yield pool
    pool.close()
    assert not children()


OTHERS: set[psutil.Process] = set()
"""Processes that other tests left to this one, such as those of Python's own ``multiprocessing``."""


def children() -> list[psutil.Process]:
    """The decoders, and whatever they have started."""
    return [one for one in psutil.Process().children(recursive=True) if one not in OTHERS]


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


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 2, body: bytes = bytes(100)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(body, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """Compressed notes of 20 MB each, 40 of them, in 0.8 MB."""
    return png(16, 16, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))] * 40)


def profile_bomb() -> bytes:
    return png(16, 16, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)))


def animated_png() -> bytes:
    return png(64, 64, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))


def many_images_gif() -> bytes:
    whole = animation("GIF", 2)
    second = whole[whole.rindex(b"\x21\xf9") : -1]
    return whole[:-1] + second * 100_000 + whole[-1:]


def patched(data: bytes, box: bytes, offset: int, *values: int, width: str = "I") -> bytes:
    """An MP4 with numbers of its first ``box`` replaced, ``offset`` bytes after the box's name."""
    changed = bytearray(data)
    struct.pack_into(f">{len(values)}{width}", changed, data.index(box) + 4 + offset, *values)
    return bytes(changed)


def eternal_webm() -> bytes:
    changed = bytearray(clip("webm", "libvpx"))
    where = changed.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes: a float of milliseconds
    struct.pack_into(">d", changed, where, 3e12)
    return bytes(changed)


BOMBS = {
    "20000x20000 PNG": (lambda: png(20_000, 20_000), {"image_too_large"}),
    "a side of 2^31 - 1": (lambda: png(2**31 - 1, 2**31 - 1), {"image_too_large"}),
    "a wide line": (lambda: png(MAX_SIDE * 1000, 16), {"image_too_large"}),
    "notes that unpack to 800 MB": (text_bomb, {"invalid_image", "decoding_too_slow", "decoding_too_large"}),
    "a profile that unpacks to 100 MB": (profile_bomb, {"invalid_image", "decoding_too_slow", "decoding_too_large"}),
    "two thousand million frames of PNG": (animated_png, {"animated_image", "invalid_image"}),
    "a GIF of 100,000 frames": (many_images_gif, {"animated_image"}),
    "a WebP of 1,000 frames": (lambda: animation("WEBP", 1000), {"animated_image"}),
    "4 thousand million samples": (
        lambda: patched(CLIP, b"stsz", 4, 1, 2**32 - 1),
        {"invalid_clip", "clip_too_small", "decoding_too_slow", "decoding_too_large"},
    ),
    "4 thousand million frames of one length": (
        lambda: patched(CLIP, b"stts", 8, 2**32 - 1, 2**31 - 1),
        {"invalid_clip", "clip_too_long"},
    ),
    "a chunk of 4 thousand million samples": (lambda: patched(CLIP, b"stsc", 8, 1, 2**32 - 1), {"invalid_clip"}),
    "a clip of two hours in 9 frames": (lambda: clip(fps=Fraction(1, 800)), {"clip_too_long"}),
    "a clip that claims a century": (eternal_webm, {"clip_too_long"}),
    "a clip of 65535x65535": (
        lambda: patched(CLIP, b"mp4v", 24, 65535, 65535, width="H"),
        {"clip_too_large", "invalid_clip", "clip"},
    ),
    "more frames than allowed": (lambda: clip(num_frames=MAX_CLIP_FRAMES + 1, width=16, height=16), {"clip_too_long"}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_goes_off_in_the_decoder(decoders, name):
    make, codes = BOMBS[name]
    data = make()
    assert len(data) < LIMITS.num_bytes
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    try:
        outcome = decoders.probe(data).kind
    except RequestError as error:
        outcome = error.code
    assert outcome in codes
    assert time.monotonic() - started < SLACK_S
    assert psutil.Process().memory_info().rss - before < 20_000_000
    assert decoders.probe(PNG).kind == "image"


def test_a_picture_that_is_large_but_allowed_is_decoded(decoders):
    data = png(4096, 4096, colour=0, body=bytes(4097 * 4096))
    assert decoders.probe(data).width == 4096
    assert decoders.image(data, 64, 64, "crop").shape == (64, 64, 3)


POLYGLOTS = {
    "picture, then page": (PNG + b"<script>alert(1)</script>", "image"),
    "picture, then archive": (PNG + b"PK\x05\x06" + bytes(18), "image"),
    "picture, then clip": (PNG + CLIP, "image"),
    "photograph, then clip": (image("JPEG") + CLIP, "image"),
    "clip, then picture": (CLIP + PNG, None),
    "animation, then picture": (animation("GIF", 2) + PNG, "animated_image"),
    "page, then picture": (b"<html>" + PNG, "unsupported_media"),
    "playlist in a clip's clothes": (
        b"\x00\x00\x00\x18ftypisom" + bytes(12) + b"#EXTM3U\nfile:///etc/passwd", "invalid_clip"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POLYGLOTS)
def test_a_file_that_is_several_things_is_one_thing_to_everyone(decoders, name):
    data, expected = POLYGLOTS[name]
    try:
        kind = decoders.probe(data).kind
    except RequestError as error:
        kind = error.code
    assert expected in (None, kind)
    if kind == "image":  # what the VAE gets is the picture
        assert np.array_equal(decoders.image(data, 64, 48, "stretch"), InProcess().image(data, 64, 48, "stretch"))
        with pytest.raises(RequestError):
            list(decoders.clip(data, 0, 1, 64, 48, "stretch"))
    if kind == "clip":
        with pytest.raises(RequestError):
            decoders.image(data, 64, 48, "stretch")


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


SEEDS = [
    PNG, image("JPEG", progressive=True), image("WEBP"), image("PNG", pnginfo=PngImagePlugin.PngInfo()),
    animation("GIF", 3), animation("WEBP", 3), CLIP, clip("mov", "mpeg4", 3), clip("webm", "libvpx", 3),
    clip("mp4", "libx264", 3),
]  # fmt: skip
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


@st.composite
def mutated(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        where = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "number", "cut", "insert", "repeat", "end", "splice"])):
            case "flip" if data:
                data[where] ^= 1 << draw(st.integers(0, 7))
            case "number":
                number = draw(st.sampled_from(NUMBERS))
                data[where : where + 4] = number.to_bytes(4, draw(st.sampled_from(["big", "little"])))
            case "cut":
                del data[where : where + draw(st.integers(1, 64))]
            case "insert":
                data[where:where] = draw(st.binary(max_size=16))
            case "repeat":
                data[where:where] = bytes(data[where : where + 64]) * draw(st.integers(1, 8))
            case "end":
                del data[where:]
            case "splice":
                data[where:] = draw(st.sampled_from(SEEDS))[where:]
    return bytes(data)


KNOWN = {
    "unsupported_media", "animated_image", "invalid_image", "image_too_small", "image_too_large", "invalid_clip",
    "clip_too_small", "clip_too_large", "clip_too_long", "clip_too_short", "decoding_too_slow", "decoding_too_large",
    "decoding_failed",
}  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=mutated())
def test_a_mutated_file_is_used_or_refused_with_a_known_code(decoders, data):
    try:
        info = decoders.probe(data)
        # What the gateway has accepted, the VAE can decode.
        if info.kind == "image":
            shapes = [decoders.image(data, 16, 16, "crop").shape]
        else:
            shapes = [frame.shape for frame in decoders.clip(data, 0, 1, 16, 16, "crop")]
    except RequestError as error:
        outcome = error.code if error.message.isprintable() else error.message
    else:
        outcome = "used" if max(info.width, info.height) <= MAX_SIDE and shapes == [(16, 16, 3)] else "wrong"
    assert outcome in {"used", *KNOWN}
