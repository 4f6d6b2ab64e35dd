"""What is measured against what is known: every frame of the synthetic world comes with its truth."""

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from pusa_dist.world.measure import Track, direction_of, psnr, sight, track, velocity
from pusa_dist.world.render import render
from pusa_dist.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, scene

SCENES = range(24)


def clean(frames, random):
    return frames


def blurred(frames, random):
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in frames])


def noisy(frames, random):
    return np.clip(frames + random.normal(0, 15, frames.shape), 0, 255).astype(np.uint8)


def as_jpeg(frames, random):
    def through(frame):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=75, subsampling=0)
        return np.asarray(Image.open(buffer))

    return np.stack([through(frame) for frame in frames])


def as_through_a_poor_vae(frames, random):
    """Detail lost, colours pale, a background that ripples: 26 dB, worse than the model may be."""
    height, width = frames.shape[1:3]
    small = [cv2.resize(frame, (width * 3 // 8, height * 3 // 8), interpolation=cv2.INTER_AREA) for frame in frames]
    soft = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in small]
    ripple = [cv2.resize(random.normal(0, 10, (8, 8, 3)), (width, height), interpolation=cv2.INTER_CUBIC) for _ in soft]
    pale = 0.9 * np.stack(soft).astype(np.float64) + 12 + np.stack(ripple) + random.normal(0, 3, frames.shape)
    return np.clip(pale, 0, 255).astype(np.uint8)


DEGRADED = {  # name -> (function, pixels a centre may be off, share an area may be off)
    "clean": (clean, 0.1, 0.03),
    "blurred": (blurred, 0.3, 0.1),
    "noisy": (noisy, 0.3, 0.1),
    "jpeg": (as_jpeg, 0.3, 0.1),
    "poor VAE": (as_through_a_poor_vae, 1.0, 0.2),
}
degradations = pytest.mark.parametrize(("degrade", "off_px", "off_area"), DEGRADED.values(), ids=DEGRADED)


@degradations
def test_every_frame_shows_the_object_that_is_there(degrade, off_px, off_area):
    for seed in SCENES:
        truth = scene(seed, "held-out")
        frames = degrade(render(truth), np.random.default_rng(seed))
        for number, frame in enumerate(frames):
            seen = sight(frame)
            assert (seen.colour, seen.shape) == (truth.colour, truth.shape), f"scene {seed}, frame {number}"
            assert seen.centre == pytest.approx(truth.centre(number), abs=off_px)
            assert seen.area == pytest.approx(np.pi * truth.radius**2, rel=off_area)


@degradations
def test_a_track_is_the_motion_that_is_there(degrade, off_px, off_area):
    for seed in SCENES:
        truth = scene(seed, "held-out")
        seen = track(degrade(render(truth), np.random.default_rng(seed)))
        assert (seen.colour, seen.shape) == (truth.colour, truth.shape)
        assert (seen.direction, seen.pace) == (truth.direction, truth.speed)
        assert seen.velocity == pytest.approx(truth.velocity, abs=0.08)
        assert seen.speed == pytest.approx(SPEEDS[truth.speed], rel=0.05)
        assert len(seen.sights) == 17


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_object_is_told_from_every_other(colour, shape, size, background):
    words = {"colour": colour, "shape": shape, "size": size, "background": background}
    one = replace(scene(0), direction="right", speed="slowly", start=(20.3, 31.8), **words)
    for degrade, *_ in DEGRADED.values():
        seen = sight(degrade(render(one, 1), np.random.default_rng(0))[0])
        assert (seen.colour, seen.shape) == (colour, shape)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_every_motion_is_told_from_every_other(direction, speed):
    dx, dy = (-16 * SPEEDS[speed] / 2 * axis for axis in DIRECTIONS[direction])
    one = replace(scene(0), direction=direction, speed=speed, start=(31.5 + dx, 31.5 + dy))
    seen = track(render(one))
    assert (seen.direction, seen.pace) == (direction, speed)


def test_a_few_wrong_frames_do_not_change_what_a_track_says():
    truth = scene(3)
    frames = render(truth)
    frames[4] = BACKGROUNDS["black"]
    frames[7] = frames[0]
    frames[12] = np.random.default_rng(0).integers(0, 255, frames[12].shape)
    seen = track(frames)
    assert seen.sights[4] is None
    assert (seen.colour, seen.shape, seen.direction) == (truth.colour, truth.shape, truth.direction)
    assert seen.velocity == pytest.approx(truth.velocity, abs=0.05)


def test_an_object_that_is_missing_in_half_of_the_frames_is_none():
    frames = render(scene(3))
    frames[8:] = BACKGROUNDS["black"]
    seen = track(frames)
    assert (seen.colour, seen.shape, seen.velocity, seen.direction) == (None, None, None, None)


def test_what_stands_still_has_no_direction():
    seen = track(np.repeat(render(scene(3), 1), 17, axis=0))
    assert (seen.colour, seen.shape) == (scene(3).colour, scene(3).shape)
    assert seen.speed == pytest.approx(0)
    assert (seen.direction, seen.pace) == (None, None)


def empty(random):
    return np.full((64, 64, 3), BACKGROUNDS["gray"], np.uint8)


def faint(random):
    return as_through_a_poor_vae(empty(random)[None], random)[0]


def noise(random):
    return random.integers(0, 256, (64, 64, 3), np.uint8)


def texture(random):
    return cv2.resize(random.integers(0, 256, (8, 8, 3), np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)


def speckles(random):
    frame = empty(random)
    frame[random.integers(0, 64, 60), random.integers(0, 64, 60)] = 255
    return frame


def halves(random):
    frame = empty(random)
    frame[:, 32:] = COLOURS["red"]
    return frame


def tiny(random):
    return noise(random)[:3, :2]


@pytest.mark.parametrize("make", [empty, faint, noise, texture, speckles, halves, tiny], ids=lambda make: make.__name__)
def test_where_there_is_no_object_none_is_found(make):
    frames = np.stack([make(np.random.default_rng(seed)) for seed in range(17)])
    assert sum(sight(frame) is not None for frame in frames) <= 2
    seen = track(frames)
    assert (seen.colour, seen.shape, seen.direction, seen.speed) == (None, None, None, None)


def test_a_colour_and_a_shape_of_no_name_have_none():
    frame = empty(None)
    frame[20:26, 8:56] = (10, 250, 250)
    seen = sight(frame)
    assert (seen.colour, seen.shape) == (None, None)
    assert seen.centre == pytest.approx((31.5, 22.5), abs=0.1)


@pytest.mark.parametrize(
    ("speed", "word"), [(0.6, None), (0.8, "slowly"), (1.3, "slowly"), (1.6, "quickly"), (2.7, "quickly"), (3.0, None)]
)
def test_a_speed_has_the_word_it_is_near(speed, word):
    assert Track(sights=(), colour=None, shape=None, velocity=(0.0, speed)).pace == word


@pytest.mark.parametrize(
    ("motion", "name"),
    [((1, 0), "right"), ((0, -2), "up"), ((1, 0.3), "right"), ((1, 0.6), None), ((1, 1), None), ((0.2, 0), None)],
)
def test_a_direction_is_along_an_axis(motion, name):
    assert direction_of(motion) == name


def test_velocity_is_the_median_slope_of_the_frames_there_are():
    assert velocity({0: (1.0, 2.0), 2: (5.0, 1.0), 3: (7.0, 0.5)}) == pytest.approx((2.0, -0.5))
    assert velocity({5: (1.0, 2.0)}) is None
    assert velocity({}) is None


def test_psnr_is_of_the_mean_squared_error_of_the_whole_clip():
    frames = render(scene(0))
    assert psnr(frames, frames) == float("inf")
    one_off = frames.copy()
    one_off[0, 0, 0, 0] ^= 1
    assert psnr(one_off, frames) == pytest.approx(10 * np.log10(255**2 * frames.size))
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(frames[:1], frames)
