"""The sentence that describes a scene, and back."""

import re
from dataclasses import dataclass

from pusa_dist.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a caption says: a scene without its place."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    background: str


_WORDS = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
_MOTION = (("speed", SPEEDS), ("direction", DIRECTIONS), ("background", BACKGROUNDS))


def _group(name: str, words: object) -> str:
    return f"(?P<{name}>{'|'.join(words)})"  # type: ignore[arg-type]


_CAPTION = re.compile(
    "a {} {} {} moves {} {} on a {} background".format(*(_group(name, words) for name, words in _WORDS + _MOTION))
)


def caption(scene: Scene | Described) -> str:
    """Describe a scene, e.g. "a large red circle moves quickly right on a gray background"."""
    return (
        f"a {scene.size} {scene.colour} {scene.shape} moves {scene.speed} {scene.direction} "
        f"on a {scene.background} background"
    )


def parse(text: str) -> Described:
    """What a caption describes.

    Raises:
        ValueError: the text is not a sentence that ``caption`` could have made.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().strip(" .").split()))
    if match is None:
        raise ValueError(f"{text!r} is not a caption of this world; write e.g. {_EXAMPLE!r}")
    return Described(**match.groupdict())


_EXAMPLE = "a large red circle moves quickly right on a gray background"
