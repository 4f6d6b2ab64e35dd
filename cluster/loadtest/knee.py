"""The knee of the latency-load curve: the rate at which throughput by latency is greatest.

Kleinrock's power: below it, more load costs little latency; above it, latency grows faster than throughput.
Only rates that were run are considered, so the knee is as exact as they are close.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SATURATED = 0.9
"""Achieved by offered rate, below which a rate is more than the service can do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rate that was run."""

    offered: float
    achieved: float
    goodput: float
    """Jobs a second, all three."""
    mean_s: float
    p50_s: float
    p95_s: float
    p95_low_s: float | None
    p95_high_s: float | None
    n: int

    @property
    def power(self) -> float:
        """Throughput by mean latency."""
        return self.achieved / self.mean_s

    @property
    def is_saturated(self) -> bool:
        """Whether more is asked for than is done."""
        return self.achieved < SATURATED * self.offered


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """Where it is, and whether the sweep has gone past it."""

    offered: float
    is_bracketed: bool
    """Lower and higher rates were run: else it may lie outside."""


def knee(points: Sequence[Point]) -> Knee | None:
    """The knee of a sweep; None of fewer than three rates."""
    if len(points) < 3:
        return None
    ordered = sorted(points, key=lambda one: one.offered)
    index = max(range(len(ordered)), key=lambda number: ordered[number].power)
    return Knee(offered=ordered[index].offered, is_bracketed=0 < index < len(ordered) - 1)
