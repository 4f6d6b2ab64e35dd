"""Bringing a picture of any size to the size of the video, and its pixels to the model's range.

Frames are uint8 arrays (H, W, 3), RGB. What part of the picture is used, and where it goes, is integer
arithmetic that images and clips share; they differ in the filter only, as they do in Pusa.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pusa_dist.request import Fit

Frame = NDArray[np.uint8]
Resize = Callable[[Frame, int, int], Frame]
"""(pixels, width, height) -> pixels of that size."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rectangle of the source is shown, and which rectangle of the target it fills."""

    crop: tuple[int, int, int, int]
    """Left, top, width, height in the source."""
    place: tuple[int, int, int, int]
    """Left, top, width, height in the target."""


def placement(source: tuple[int, int], target: tuple[int, int], fit: Fit) -> Placement:
    """How a picture of size ``source`` fills a frame of size ``target`` (both width, height).

    ``stretch`` distorts; ``crop`` keeps the largest centred rectangle of the target's aspect;
    ``letterbox`` shows everything, centred on black. Lengths and offsets are rounded down.
    """
    (width, height), (to_width, to_height) = source, target
    whole_source, whole_target = (0, 0, width, height), (0, 0, to_width, to_height)
    wider = width * to_height > to_width * height
    if fit == "stretch":
        return Placement(whole_source, whole_target)
    if fit == "crop":
        kept = (height * to_width // to_height, height) if wider else (width, width * to_height // to_width)
        return Placement(_centred(kept, source), whole_target)
    shown = (to_width, height * to_width // width) if wider else (width * to_height // height, to_height)
    return Placement(whole_source, _centred(shown, target))


def _centred(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = max(inner[0], 1), max(inner[1], 1)
    return (outer[0] - width) // 2, (outer[1] - height) // 2, width, height


def fit_frame(pixels: Frame, width: int, height: int, fit: Fit, resize: Resize) -> Frame:
    """A frame (height, width, 3) made from ``pixels`` (H, W, 3)."""
    where = placement((pixels.shape[1], pixels.shape[0]), (width, height), fit)
    left, top, crop_width, crop_height = where.crop
    to_left, to_top, to_width, to_height = where.place
    resized = resize(pixels[top : top + crop_height, left : left + crop_width], to_width, to_height)
    if (to_width, to_height) == (width, height):
        return resized
    frame = np.zeros((height, width, 3), np.uint8)
    frame[to_top : to_top + to_height, to_left : to_left + to_width] = resized
    return frame


def to_model_range(frames: Frame) -> NDArray[np.float32]:
    """Pixels (T, H, W, 3) of 0..255 to (3, T, H, W) of -1..1, as ``x * (2 / 255) - 1`` in float32."""
    scaled = frames.astype(np.float32) * np.float32(2.0 / 255.0) - np.float32(1.0)
    return np.ascontiguousarray(scaled.transpose(3, 0, 1, 2))
