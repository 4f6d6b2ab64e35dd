"""What a job costs a gang, in seconds of the gang: predicted, and corrected by what was measured.

Cost is what fair shares, quotas and estimates are made of. The unit is the gang-second, so that a
long video is not one job like any other, and a tenant pays for what it takes from the others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from serve.policy.priority import Priority

CROSSOVER_TOKENS = 30_000
"""Where attention (quadratic in tokens) costs as much as all else (linear): 29,000 for 14B, 14,000 for 1.3B."""
_SECONDS_PER_TOKEN = 1e-4
"""Of the linear part, while no step of any shape has been measured; the first step replaces it."""
_SMOOTHING = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What the duration of a step depends on."""

    num_tokens: int
    """Tokens of one forward, over all its samples."""
    uses_guidance: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What a tenant's unfinished jobs of one status and class still need."""

    tenant: str
    status: Literal["queued", "in_progress"]
    priority: Priority
    num: int
    cost: float
    """Gang-seconds left."""
    whole: float
    """Gang-seconds from their first steps on."""
    oldest_s: float
    """Age of the oldest of them."""


def step_seconds(shape: StepShape, measured: Mapping[StepShape, float]) -> float:
    """Predicted duration of a step.

    Args:
        shape: of the step.
        measured: seconds of a step, by shape (see ``observed``); a shape that is not there is scaled from the
            most similar one that is.
    """
    if shape in measured:
        return measured[shape]
    if not measured:
        return _SECONDS_PER_TOKEN * _work(shape)
    known = min(measured, key=lambda one: (_distance(one, shape), one.num_tokens))
    return measured[known] * _work(shape) / _work(known)


def job_cost(shape: StepShape, steps_left: int, measured: Mapping[StepShape, float]) -> float:
    """Gang-seconds that a job still needs."""
    return steps_left * step_seconds(shape, measured)


def observed(seconds: float, before: float | None) -> float:
    """Measured seconds of a shape after one more step: falls at once (first steps are slow), rises smoothly."""
    return seconds if before is None else min(seconds, before + _SMOOTHING * (seconds - before))


def charge(shape: StepShape, seconds: float, measured: Mapping[StepShape, float]) -> float:
    """What a step that took ``seconds`` is charged, in gang-seconds.

    The prediction, so that nobody pays for a slow gang; of a shape that never ran, no more than it took
    and no more than its like would (compilation and allocation are not the first tenant's fault).

    Args:
        shape: of the step.
        seconds: it took.
        measured: before this step.
    """
    if shape in measured:
        return measured[shape]
    return min(seconds, step_seconds(shape, measured)) if measured else seconds


def _work(shape: StepShape) -> float:
    branches = 2 if shape.uses_guidance else 1
    return branches * shape.num_tokens * (1 + shape.num_tokens / CROSSOVER_TOKENS)


def _distance(one: StepShape, other: StepShape) -> tuple[float, bool]:
    return abs(math.log(one.num_tokens / other.num_tokens)), one.uses_guidance != other.uses_guidance
