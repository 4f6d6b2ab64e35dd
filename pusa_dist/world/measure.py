"""What pixels show, measured without any learning: an object's colour, shape, centre and area, and its motion.

A frame is a background, whose colour is that of its border, and one object: the largest connected patch
that differs from it. Each pixel's share of the object follows from its colour, so the centre and the area
of the object are known to a fraction of a pixel, on blurred, noisy and compressed frames too. Frames in
which there is no such object give None.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pusa_dist.world.render import distance
from pusa_dist.world.scene import COLOURS, DIRECTIONS, SHAPES, SPEEDS

Point = tuple[float, float]
"""(x, y), or a change of it."""

_BORDER_PX = 2
_MAX_BORDER_SPREAD = 40.0
"""Median deviation of the border from its own colour above which it is no background."""
_MIN_CONTRAST = 45.0
"""Distance in RGB between object and background; the palette's smallest is 106."""
_MAX_COLOUR_ERROR = 80.0
"""Distance in RGB from the nearest named colour; the palette's two nearest colours are 124 apart."""
_MIN_AREA_PX = 30.0
_MAX_AREA_SHARE = 0.4
_MIN_SHARE_OF_PATCHES = 0.6
"""Of everything that differs from the background, what the object must hold."""
_MIN_OVERLAP = 0.7
"""Of the object with the nearest shape; two different shapes of one area overlap by up to 0.84."""
_BLURS_PX = (1.0, 2.0)
"""How soft a shape may look."""
_MIN_SPEED = 0.25
"""Pixels per frame; what moves less has no direction."""
_MAX_PACE_ERROR = float(np.log(2) / 2)
"""Of the logarithm of a speed: half the distance between the two words."""
_MAX_TURN = np.tan(np.pi / 8)
"""Off the axis it moves along, at most 22.5 degrees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """The object of one frame."""

    colour: str | None
    """None: it is near no named colour."""
    shape: str | None
    """None: it resembles no known shape."""
    centre: Point
    """Centre of area, pixels."""
    area: float
    """Pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """The object of a clip."""

    sights: tuple[Sight | None, ...]
    """One a frame; None where there is no object."""
    colour: str | None
    """What most sights show; None also when the object is missing in half of the frames or more."""
    shape: str | None
    """As colour."""
    velocity: Point | None
    """Pixels per frame: the median slope over all pairs of frames."""

    @property
    def speed(self) -> float | None:
        """Pixels per frame."""
        return None if self.velocity is None else float(np.hypot(*self.velocity))

    @property
    def direction(self) -> str | None:
        """Where it moves; None when it hardly moves, or moves aslant."""
        return None if self.velocity is None else direction_of(self.velocity)

    @property
    def pace(self) -> str | None:
        """The word for its speed; None when it is not within a factor of 1.41 of any word's."""
        if not self.speed:
            return None
        errors = {word: abs(float(np.log(self.speed / speed))) for word, speed in SPEEDS.items()}
        nearest = min(errors, key=errors.__getitem__)
        return nearest if errors[nearest] <= _MAX_PACE_ERROR else None


def track(frames: NDArray[np.uint8]) -> Track:
    """Follow the object of a clip (T, H, W, 3)."""
    sights = tuple(sight(frame) for frame in frames)
    seen = [one for one in sights if one is not None]
    if 2 * len(seen) <= len(sights):
        return Track(sights=sights, colour=None, shape=None, velocity=None)
    return Track(
        sights=sights,
        colour=_most_common(one.colour for one in seen),
        shape=_most_common(one.shape for one in seen),
        velocity=velocity({frame: one.centre for frame, one in enumerate(sights) if one is not None}),
    )


def velocity(centres: Mapping[int, Point]) -> Point | None:
    """Median slope (Theil-Sen) of centres by frame: a few wrong ones do not change it; None below two."""
    if len(centres) < 2:
        return None
    times = np.array(list(centres), np.float64)
    points = np.array(list(centres.values()), np.float64)
    first, second = np.triu_indices(len(times), k=1)
    slopes = (points[second] - points[first]) / (times[second] - times[first])[:, None]
    x, y = np.median(slopes, axis=0)
    return float(x), float(y)


def direction_of(motion: Point) -> str | None:
    """The direction of a change of place in pixels per frame; None when it is small, or aslant."""
    for name, (x, y) in DIRECTIONS.items():
        along = motion[0] * x + motion[1] * y
        across = abs(motion[0] * y - motion[1] * x)
        if along >= _MIN_SPEED and across <= _MAX_TURN * along:
            return name
    return None


def psnr(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio of a whole clip, dB; infinite for equal clips.

    Raises:
        ValueError: the two differ in shape.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"clips of {frames.shape} and {reference.shape} cannot be compared")
    error = float(np.mean((frames.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def sight(frame: NDArray[np.uint8]) -> Sight | None:
    """The object of a frame (H, W, 3), or None."""
    pixels = frame.astype(np.float32)
    border = _border(pixels)
    background = np.median(border, axis=0)
    if np.median(np.linalg.norm(border - background, axis=1)) > _MAX_BORDER_SPREAD:
        return None
    contrast = np.linalg.norm(cv2.GaussianBlur(pixels, (0, 0), 0.8) - background, axis=2)
    patch = _largest_patch(contrast)
    if patch is None:
        return None
    inside = patch & (contrast >= np.quantile(contrast[patch], 0.4))
    colour = np.median(pixels[inside], axis=0)
    if np.linalg.norm(colour - background) < _MIN_CONTRAST / 2:  # noise that differs in no one way
        return None
    share = _share(pixels, background, colour) * cv2.dilate(patch.astype(np.uint8), np.ones((5, 5), np.uint8))
    area = float(share.sum())
    if not _MIN_AREA_PX <= area <= _MAX_AREA_SHARE * share.size:
        return None
    y, x = (float((share.sum(axis=1 - axis) @ np.arange(share.shape[axis])) / area) for axis in (0, 1))
    return Sight(colour=_colour_name(colour), shape=_shape_name(share, (x, y), area), centre=(x, y), area=area)


def _border(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    ring = np.ones(pixels.shape[:2], bool)
    ring[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
    return pixels[ring]


def _largest_patch(contrast: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """The largest connected part of what differs from the background by half as much as the object."""
    # The mean over as many pixels as the smallest object has: a few stray ones do not set the scale.
    peak = float(np.sort(contrast, axis=None)[-int(_MIN_AREA_PX) :].mean())
    if peak < _MIN_CONTRAST:
        return None
    differs = (contrast > peak / 2).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(differs, connectivity=4)
    if count < 2:
        return None
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[largest, cv2.CC_STAT_AREA] < _MIN_SHARE_OF_PATCHES * differs.sum():
        return None
    return labels == largest


def _share(
    pixels: NDArray[np.float32], background: NDArray[np.float32], colour: NDArray[np.float32]
) -> NDArray[np.float32]:
    """How far each pixel is on the way from the background's colour to the object's, 0 to 1."""
    way = colour - background
    return np.clip((pixels - background) @ way / (way @ way), 0.0, 1.0)


def _colour_name(colour: NDArray[np.float32]) -> str | None:
    errors = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in COLOURS.items()}
    nearest = min(errors, key=errors.__getitem__)
    return nearest if errors[nearest] <= _MAX_COLOUR_ERROR else None


def _shape_name(share: NDArray[np.float32], centre: Point, area: float) -> str | None:
    """The shape of that centre and area that overlaps most with what was found, sharp or blurred."""
    height, width = share.shape
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(centre[0])
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(centre[1])
    overlaps: dict[str, float] = {}
    for shape in SHAPES:
        sharp = np.clip(0.5 - distance(shape, float(np.sqrt(area / np.pi)), x, y), 0.0, 1.0)
        blurred = (cv2.GaussianBlur(sharp, (0, 0), sigma) for sigma in _BLURS_PX)
        overlaps[shape] = max(_overlap(share, ideal) for ideal in (sharp, *blurred))
    nearest = max(overlaps, key=overlaps.__getitem__)
    return nearest if overlaps[nearest] >= _MIN_OVERLAP else None


def _overlap(share: NDArray[np.float32], ideal: NDArray[np.float32]) -> float:
    return float(np.minimum(share, ideal).sum() / np.maximum(share, ideal).sum())


def _most_common(names: Iterable[str | None]) -> str | None:
    return Counter(names).most_common(1)[0][0]
