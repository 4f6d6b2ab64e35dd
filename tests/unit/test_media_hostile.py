"""Files made to do harm: whatever they are, the decoder bears it and the answer has a known code."""

import struct
import time
import zlib
from fractions import Fraction

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import PngImagePlugin

from pusa_dist.errors import RequestError
from pusa_dist.media.probe import MAX_CLIP_FRAMES, MAX_SIDE
from pusa_dist.media.source import InProcess
from tests.unit.decoders_support import CLIP, LIMITS, PNG, SLACK_S, animation, bewitched_decoders, clip, image


@pytest.fixture(scope="module")
def decoders():
    with bewitched_decoders() as pool:
        yield pool


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
        {"clip_too_large", "invalid_clip", "unsupported_media"},
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


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
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
