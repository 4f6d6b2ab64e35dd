"""Decoders that do what a file tells them to, and honest files for them."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import psutil
from PIL import Image

from pusa_dist.media.decoders import DecodeLimits, Decoders

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
OTHERS: set[psutil.Process] = set()
"""Processes that other tests left to this one, such as those of Python's own ``multiprocessing``."""


@contextmanager
def bewitched_decoders() -> Iterator[Decoders]:
    """Two of them, none of which is left afterwards."""
    OTHERS.update(psutil.Process().children(recursive=True))
    pool = Decoders(2, LIMITS, command=COMMAND)
    yield pool
    pool.close()
    assert not children()


def children() -> list[psutil.Process]:
    """The decoders, and whatever they have started."""
    return [one for one in psutil.Process().children(recursive=True) if one not in OTHERS]


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
