"""When two results are the same: bit for bit, or, where jobs shared forwards, as far as rounding lets them be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cluster.orders import read_frames

MAX_LEVELS = 1
"""Largest difference of a pixel, of 255: one of 1e-4 in the latents moves few across the middle of two levels."""


@dataclass(frozen=True, slots=True)
class Sameness:
    """What is compared, and how."""

    by_variant: Mapping[str, Callable[[bytes, bytes], bool]]
    words: str
    """Of what they are then."""


def levels(one: bytes, other: bytes) -> int:
    """Largest difference of two zips of frames, in levels of 255; of other shapes: 256."""
    ours, theirs = (read_frames(zipped).astype(np.int16) for zipped in (one, other))
    return int(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else 256


BIT_EQUAL = Sameness(dict.fromkeys(("video", "frames"), bytes.__eq__), "bit-equal to")
SHARED_FORWARDS = Sameness(
    {"frames": lambda one, other: levels(one, other) <= MAX_LEVELS}, f"within {MAX_LEVELS} level of 255 of"
)
