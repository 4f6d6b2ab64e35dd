"""Pixels of a scene: shapes with smooth edges, the same on every machine up to rounding.

A pixel's share of the shape is a ramp of one pixel's width across the shape's edge, so motion by less
than a pixel can be seen and measured.
"""

import numpy as np
from numpy.typing import NDArray

from pusa_dist.world.scene import (
    BACKGROUNDS,
    COLOURS,
    NUM_FRAMES,
    SIDE,
    Scene,
    square_half_side,
    triangle_circumradius,
)


def render(scene: Scene, num_frames: int = NUM_FRAMES, side: int = SIDE) -> NDArray[np.uint8]:
    """Frames (T, side, side, 3) of a scene from its frame 0 on; ``side`` below 64 is the top left part."""
    share = coverage(scene, num_frames, side)[..., None]
    front, back = (np.array(c, np.float32) for c in (COLOURS[scene.colour], BACKGROUNDS[scene.background]))
    return np.round(back + share * (front - back)).astype(np.uint8)


def coverage(scene: Scene, num_frames: int = NUM_FRAMES, side: int = SIDE) -> NDArray[np.float32]:
    """How much of each pixel the shape covers, 0 to 1: (T, side, side)."""
    centres = np.array([scene.centre(frame) for frame in range(num_frames)], np.float32)
    axis = np.arange(side, dtype=np.float32)
    x = axis[None, None, :] - centres[:, 0, None, None]  # (T, 1, side)
    y = axis[None, :, None] - centres[:, 1, None, None]  # (T, side, 1)
    return np.clip(0.5 - distance(scene.shape, scene.radius, x, y), 0.0, 1.0)


def distance(shape: str, radius: float, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels from the edge of the shape of a circle's area, negative inside; ``x``, ``y`` from its centre of area."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(radius * square_half_side())
    inradius = np.float32(radius * triangle_circumradius() / 2)
    slanted = np.abs(x) * np.float32(3**0.5 / 2) - y / 2  # both upper sides, by symmetry
    return np.maximum(slanted, y) - inradius
