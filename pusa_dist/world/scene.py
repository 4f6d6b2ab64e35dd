"""What a clip of the synthetic world shows: one shape in uniform motion, drawn from a seed.

Coordinates are pixels, x to the right and y downwards; the centre of the top left pixel is (0, 0).
"""

import hashlib
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

NUM_FRAMES = 17
SIDE = 64
"""Pixels of the square picture's side."""

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (222, 44, 44),
    "green": (44, 176, 66),
    "blue": (50, 92, 230),
    "yellow": (236, 212, 48),
    "purple": (166, 60, 206),
    "white": (242, 242, 242),
}
BACKGROUNDS = {"black": (14, 14, 14), "gray": (118, 118, 118), "brown": (98, 62, 30)}
SIZES = {"small": 7.0, "large": 10.0}
"""Radius in pixels of the circle; the other shapes of a size have the circle's area."""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SPEEDS = {"slowly": 1.0, "quickly": 2.0}
"""Pixels per frame."""

Split = Literal["train", "held-out"]
MARGIN = 1.0
"""Pixels between a shape and the picture's edge, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One shape, its motion and what is behind it; every word is a key of the vocabularies above."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    background: str
    start: tuple[float, float]
    """Centre of area in frame 0."""

    def centre(self, frame: float) -> tuple[float, float]:
        """Centre of area (x, y) in a frame, counted from 0."""
        dx, dy = self.velocity
        return self.start[0] + dx * frame, self.start[1] + dy * frame

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame (x, y)."""
        (dx, dy), speed = DIRECTIONS[self.direction], SPEEDS[self.speed]
        return dx * speed, dy * speed

    @property
    def radius(self) -> float:
        """Radius in pixels of the circle of the same area."""
        return SIZES[self.size]


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far a shape reaches left, up, right and down of its centre, in pixels.

    Args:
        shape: one of ``SHAPES``.
        radius: of the circle of the same area.
    """
    if shape == "circle":
        return radius, radius, radius, radius
    if shape == "square":
        half = radius * square_half_side()
        return half, half, half, half
    tip = radius * triangle_circumradius()
    return tip * 3**0.5 / 2, tip, tip * 3**0.5 / 2, tip / 2


def square_half_side() -> float:
    """Half the side of a square of the unit circle's area."""
    return float(np.pi**0.5 / 2)


def triangle_circumradius() -> float:
    """Distance from centre to tip of an equilateral triangle of the unit circle's area."""
    return float((4 * np.pi / 3 / 3**0.5) ** 0.5)


def held_out(attributes: tuple[str, ...]) -> bool:
    """Whether this combination of the six words is kept from training: about one in ten, fixed for ever."""
    return hashlib.sha256(" ".join(attributes).encode()).digest()[0] % 10 == 0


def combinations(split: Split) -> list[tuple[str, ...]]:
    """Combinations (shape, colour, size, direction, speed, background) of a split, in a fixed order."""
    words = product(SHAPES, COLOURS, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS)
    return [each for each in words if held_out(each) == (split == "held-out")]


_COMBINATIONS = {"train": combinations("train"), "held-out": combinations("held-out")}


def scene(seed: int, split: Split = "train") -> Scene:
    """The scene of a seed: a combination of the split, wholly inside the picture in all 17 frames.

    The two splits share no combination of attributes, so whatever is right in a held-out scene was
    put together and not remembered.
    """
    random = np.random.default_rng([seed, split == "held-out"])
    choices = _COMBINATIONS[split]
    shape, colour, size, direction, speed, background = choices[random.integers(len(choices))]
    left, up, right, down = (reach + MARGIN for reach in extent(shape, SIZES[size]))
    dx, dy = (axis * SPEEDS[speed] * (NUM_FRAMES - 1) for axis in DIRECTIONS[direction])
    x = random.uniform(left - min(dx, 0), SIDE - 1 - right - max(dx, 0))
    y = random.uniform(up - min(dy, 0), SIDE - 1 - down - max(dy, 0))
    return Scene(
        shape=shape,
        colour=colour,
        size=size,
        direction=direction,
        speed=speed,
        background=background,
        start=(x, y),
    )
