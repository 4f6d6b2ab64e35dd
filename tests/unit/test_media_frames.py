"""Pictures to pixels of the video's size."""

import io

import numpy as np
import pytest
from PIL import Image

from pusa_dist.errors import RequestError
from pusa_dist.media.clips import fit_clip_frame, select_frames
from pusa_dist.media.frames import placement, to_model_range
from pusa_dist.media.images import fit_image, read_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants(width: int = 40, height: int = 30) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return pixels


@pytest.mark.parametrize(
    ("source", "target", "fit", "crop", "place"),
    [
        ((100, 45), (1280, 720), "crop", (10, 0, 80, 45), (0, 0, 1280, 720)),
        ((80, 60), (1280, 720), "crop", (0, 7, 80, 45), (0, 0, 1280, 720)),
        ((100, 45), (1280, 720), "letterbox", (0, 0, 100, 45), (0, 72, 1280, 576)),
        ((80, 60), (1280, 720), "letterbox", (0, 0, 80, 60), (160, 0, 960, 720)),
        ((80, 60), (1280, 720), "stretch", (0, 0, 80, 60), (0, 0, 1280, 720)),
        ((64, 48), (128, 96), "crop", (0, 0, 64, 48), (0, 0, 128, 96)),
        ((4096, 16), (16, 1280), "crop", (2048, 0, 1, 16), (0, 0, 16, 1280)),
        ((4096, 16), (16, 1280), "letterbox", (0, 0, 4096, 16), (0, 639, 16, 1)),
    ],
)
def test_placement_is_centred_and_rounded_down(source, target, fit, crop, place):
    where = placement(source, target, fit)
    if crop[2] == 1:  # an odd remainder: the offset is rounded down
        crop = ((source[0] - 1) // 2, *crop[1:])
    assert where.crop == crop
    assert where.place == place


@pytest.mark.parametrize("fit_one", [fit_image, fit_clip_frame])
def test_every_fit_gives_the_videos_size_and_keeps_the_orientation(fit_one):
    for fit in ("stretch", "crop", "letterbox"):
        fitted = fit_one(quadrants(), 96, 48, fit)
        assert fitted.shape == (48, 96, 3)
        assert fitted.dtype == np.uint8
        assert fitted[12, 36].argmax() == 0
        assert fitted[12, 60].argmax() == 1
        assert fitted[36, 36].argmax() == 2


def test_a_letterbox_is_black_outside_and_a_picture_of_the_same_size_is_untouched():
    fitted = fit_image(np.full((32, 32, 3), 200, np.uint8), 96, 32, "letterbox")
    assert not fitted[:, :32].any()
    assert not fitted[:, 64:].any()
    assert (fitted[:, 32:64] == 200).all()
    assert np.array_equal(fit_image(quadrants(), 40, 30, "crop"), quadrants())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    upright = quadrants()
    turn_back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: np.rot90(a, 2),
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn_back(upright)))
    assert np.array_equal(read_image(encoded(stored, exif=exif)), upright)


def test_transparency_is_shown_on_white():
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    pixels = read_image(encoded(image))
    assert (pixels[:, 10:] == 255).all()
    assert (pixels[:, :10] == (0, 0, 255)).all()
    palette = image.quantize(4)
    assert read_image(encoded(palette, transparency=0)).shape == (20, 20, 3)


def test_sixteen_bit_grey_and_cmyk_keep_their_brightness():
    grey = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    assert (read_image(encoded(grey)) == 0x80).all()
    cmyk = Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK")
    assert np.abs(read_image(encoded(cmyk, "JPEG")).astype(int) - (200, 100, 50)).max() < 8


def test_an_image_that_cannot_be_decoded_is_a_request_error():
    with pytest.raises(RequestError) as caught:
        read_image(b"\x89PNG\r\n\x1a\n and then nothing")
    assert caught.value.code == "invalid_image"


def test_pixels_map_to_minus_one_and_one():
    frames = np.array([0, 255, 127], np.uint8).reshape(1, 1, 1, 3).repeat(2, axis=0)
    values = to_model_range(frames)
    assert values.shape == (3, 2, 1, 1)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[:, 0, 0, 0], [-1.0, 1.0, 127 * 2 / 255 - 1], atol=1e-6)


def numbered(count: int):
    for number in range(count):
        yield np.full((1, 1, 3), number, np.uint8)


@pytest.mark.parametrize(
    ("start", "stop", "expected"), [(0, 3, [0, 1, 2]), (4, 6, [4, 5]), (-3, None, [7, 8, 9]), (-10, None, [*range(10)])]
)
def test_frames_are_selected_from_either_end(start, stop, expected):
    assert [int(frame[0, 0, 0]) for frame in select_frames(numbered(10), start, stop)] == expected


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (8, 12), (-11, None)])
def test_a_clip_with_too_few_frames_is_refused(start, stop):
    with pytest.raises(RequestError) as caught:
        list(select_frames(numbered(10), start, stop))
    assert caught.value.code == "clip_too_short"
