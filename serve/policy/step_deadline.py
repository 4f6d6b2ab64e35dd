"""How long a step may take before its gang counts as hung."""

from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE = 5.0
"""A step is late after this many times its predicted duration."""
_SMOOTHING = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What the duration of a step depends on."""

    num_tokens: int
    """Tokens of one forward, over all its samples."""
    uses_guidance: bool


def deadline(shape: StepShape, measured: Mapping[StepShape, float], floor_s: float, allowance_s: float) -> float:
    """Seconds a step of this shape may take.

    Args:
        shape: of the step.
        measured: seconds of a step, of the shapes that have run on this gang.
        floor_s: the least deadline.
        allowance_s: added while the shape has never run here (compilation, allocation).
    """
    if shape in measured:
        return max(floor_s, PATIENCE * measured[shape])
    return max(floor_s, PATIENCE * _scaled(shape, measured)) + allowance_s


def observed(seconds: float, before: float | None) -> float:
    """Measured seconds of a shape after one more step: falls at once (first steps are slow), rises smoothly."""
    return seconds if before is None else min(seconds, before + _SMOOTHING * (seconds - before))


def _scaled(shape: StepShape, measured: Mapping[StepShape, float]) -> float:
    # Attention grows with the square of the tokens, everything else more slowly: never too short.
    return max((seconds * max(1.0, _growth(known, shape)) for known, seconds in measured.items()), default=0.0)


def _growth(known: StepShape, wanted: StepShape) -> float:
    branches = (1 + wanted.uses_guidance) / (1 + known.uses_guidance)
    return branches * (wanted.num_tokens / known.num_tokens) ** 2
