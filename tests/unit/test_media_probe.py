"""Uploads are judged by their content, before pixels are decoded where they could be too many."""

import io
import struct
import tracemalloc
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pusa_dist.errors import RequestError
from pusa_dist.media.clips import iter_frames
from pusa_dist.media.probe import probe
from pusa_dist.request import MediaInfo


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image(kind: str, width: int = 64, height: int = 48, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def animation(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def clip(
    container: str = "mp4",
    codec: str = "libx264",
    num_frames: int = 9,
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    num_streams: int = 1,
    pix_fmt: str = "yuv420p",
    sample_aspect_ratio: Fraction | None = None,
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        streams = [out.add_stream(codec, rate=8) for _ in range(num_streams)]
        for stream in streams:
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            if sample_aspect_ratio is not None:
                stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
            stream.codec_context.thread_count = 1
            if rotation:
                stream.set_display_rotation(rotation)
        for index in range(num_frames):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(pixels(*size, index), format="rgb24")
                out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        for stream in streams:
            out.mux(stream.encode(None))
    return buffer.getvalue()


def refusal(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        probe(data, "input_reference")
    assert caught.value.param == "input_reference"
    assert str(caught.value).startswith("input_reference: ")
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_still_images_are_recognised_by_content(kind):
    assert probe(image(kind)) == MediaInfo(kind="image", width=64, height=48, num_frames=1)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("mov", "libx264"), ("webm", "libvpx-vp9"), ("mp4", "mpeg4")]
)
def test_clips_are_recognised_and_their_frames_counted(container, codec):
    data = clip(container, codec)
    assert probe(data) == MediaInfo(kind="clip", width=64, height=48, num_frames=9)
    assert [frame.shape for frame in iter_frames(data)] == [(48, 64, 3)] * 9


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 48)), (3, (64, 48)), (6, (48, 64)), (8, (48, 64))])
def test_an_images_size_is_that_after_exif_rotation(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    info = probe(image("JPEG", exif=exif))
    assert (info.width, info.height) == size


@pytest.mark.parametrize(("rotation", "size"), [(90, (48, 64)), (180, (64, 48)), (-90, (48, 64))])
def test_a_clips_size_is_that_after_display_rotation(rotation, size):
    data = clip(rotation=rotation)
    info = probe(data)
    assert (info.width, info.height) == size
    upright = next(iter_frames(data))
    assert (upright.shape[1], upright.shape[0]) == size
    plain = next(iter_frames(clip()))
    # The stored picture is the same; a player turns it counter-clockwise by the rotation.
    assert np.array_equal(upright, np.rot90(plain, rotation // 90))


def test_a_photograph_with_further_pictures_behind_it_is_an_image():
    assert probe(animation("MPO")).kind == "image"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_refused(kind):
    assert refusal(animation(kind)).code == "animated_image"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"this is text, whatever it is called",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"PK\x03\x04" + bytes(60),
        b"%PDF-1.7\n" + bytes(60),
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        bytes(range(256)) * 8,
    ],
    ids=["empty", "text", "html", "zip", "pdf", "playlist", "bytes"],
)
def test_what_is_neither_image_nor_clip_is_refused(data):
    assert refusal(data).code == "unsupported_media"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_other_image_formats_are_refused(kind):
    assert refusal(image(kind)).code == "unsupported_media"


def test_a_clip_in_an_unlisted_codec_is_refused():
    error = refusal(clip("matroska", "ffv1"))
    assert (error.code, "ffv1" in str(error)) == ("unsupported_media", True)


def both_refusals(data: bytes) -> str:
    """What an upload and a reader of frames are told: the same."""
    error = refusal(data)
    assert error.code == "unsupported_media"
    with pytest.raises(RequestError) as caught:
        next(iter_frames(data))
    assert (f"input_reference: {caught.value.message}", caught.value.code) == (error.message, error.code)
    return error.message


@pytest.mark.parametrize(
    ("container", "codec", "ratio"),
    [("mp4", "libx264", "4:3"), ("mov", "mpeg4", "8:9"), ("matroska", "libx264", "3:2")],
)
def test_clips_of_pixels_that_are_not_square_are_refused(container, codec, ratio):
    told = both_refusals(clip(container, codec, sample_aspect_ratio=Fraction(ratio.replace(":", "/"))))
    assert f"pixels are {ratio}" in told
    assert "setsar=1" in told


@pytest.mark.parametrize("ratio", [None, Fraction(1, 1), Fraction(4320, 4319)])
def test_pixels_that_are_square_or_a_rounding_away_from_it_are_accepted(ratio):
    data = clip(sample_aspect_ratio=ratio)
    assert probe(data).width == next(iter_frames(data)).shape[1] == 64


@pytest.mark.parametrize(
    ("container", "codec", "pix_fmt"), [("webm", "libvpx-vp9", "yuva420p"), ("mov", "prores_ks", "yuva444p10le")]
)
def test_clips_with_transparency_are_refused(container, codec, pix_fmt):
    assert "alpha channel" in both_refusals(clip(container, codec, pix_fmt=pix_fmt))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.995])
def test_truncated_images_are_refused(kind, part):
    data = image(kind)
    assert refusal(data[: int(len(data) * part)]).code == "invalid_image"


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_truncated_clips_are_refused(container, codec):
    data = clip(container, codec)
    for part in (0.03, 0.3, 0.6, 0.9):
        assert refusal(data[: int(len(data) * part)]).code == "invalid_clip"
    assert refusal(data[:-1]).code == "invalid_clip"


def test_an_mp4_whose_media_is_damaged_is_refused():
    data = bytearray(clip())
    start = data.index(b"mdat") + 4
    data[start : start + 800] = bytes(800)
    assert refusal(bytes(data)).code == "invalid_clip"


def test_an_mp4_that_promises_more_samples_than_it_holds_is_refused():
    data = clip("mp4", "mpeg4")
    # The first boxes' lengths stay true; the sample sizes point past the end of the media.
    offset = data.index(b"stsz") + 12
    sizes = struct.unpack_from(">9I", data, offset + 4)
    assert struct.unpack_from(">I", data, offset)[0] == 9
    grown = bytearray(data)
    struct.pack_into(">I", grown, offset + 4 + 4 * 8, sizes[8] + len(data))
    assert refusal(bytes(grown)).code == "invalid_clip"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 64), (64, 15)])
def test_images_of_a_few_pixels_are_refused(width, height):
    assert refusal(image("PNG", width, height)).code == "image_too_small"


def test_the_smallest_and_the_largest_side_are_accepted():
    assert probe(image("PNG", 16, 16)).width == 16
    assert probe(image("JPEG", 4096, 16)).width == 4096


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (4097, 16), (60_000, 1)])
def test_too_large_images_are_refused_before_they_are_decoded(size):
    tracemalloc.start()
    try:
        code = refusal(png_header(*size)).code
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code == ("image_too_small" if size[1] == 1 else "image_too_large")
    assert peak < 1_000_000


def test_clips_outside_the_pixel_bounds_are_refused():
    assert refusal(clip(size=(8, 8))).code == "clip_too_small"
    assert refusal(clip(codec="mpeg4", num_frames=1, size=(4112, 16))).code == "clip_too_large"


def test_clips_of_too_many_frames_are_refused():
    assert probe(clip(codec="mpeg4", num_frames=1025, size=(16, 16))).num_frames == 1025
    assert refusal(clip(codec="mpeg4", num_frames=1026, size=(16, 16))).code == "clip_too_long"


def test_a_clip_has_one_video_stream():
    error = refusal(clip(num_streams=2))
    assert (error.code, "2 video streams" in str(error)) == ("invalid_clip", True)
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert "0 video streams" in str(refusal(sound.getvalue()))


@pytest.mark.parametrize("make", [lambda: image("PNG"), lambda: image("JPEG"), lambda: image("WEBP"), clip])
def test_damaged_bytes_raise_nothing_but_a_refusal(make):
    whole = make()
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
        try:
            outcomes.add(probe(data.tobytes()).kind)
        except RequestError as error:
            outcomes.add(error.code)
    assert any(code.startswith("invalid") for code in outcomes)
