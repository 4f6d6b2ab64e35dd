"""How long a step may take before its gang counts as hung."""

from collections.abc import Mapping

from serve.policy.cost import StepShape

PATIENCE = 5.0
"""A step is late after this many times its predicted duration."""


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
    return max(floor_s, PATIENCE * _at_most(shape, measured)) + allowance_s


def _at_most(shape: StepShape, measured: Mapping[StepShape, float]) -> float:
    # Not the prediction: that may be too short. Nothing in a step grows faster than the square of the tokens.
    return max((seconds * max(1.0, _growth(known, shape)) for known, seconds in measured.items()), default=0.0)


def _growth(known: StepShape, wanted: StepShape) -> float:
    branches = (1 + wanted.uses_guidance) / (1 + known.uses_guidance)
    return branches * (wanted.num_tokens / known.num_tokens) ** 2
