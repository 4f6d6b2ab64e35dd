"""Figures of a sample, each with what it could as well have been.

Percentiles are order statistics, and so are their confidence intervals: how many of n values lie below the true
percentile is binomial, whatever the distribution is. Where n is too small for an end of an interval, there is none.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.verdicts import percentile

CONFIDENCE = 0.95
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure of n values, and its confidence interval."""

    value: float
    low: float | None
    high: float | None
    n: int


def percentile_estimate(values: Sequence[float], part: float) -> Estimate:
    """The least value that this part of all do not exceed; ``values`` must not be empty."""
    ordered, n = sorted(values), len(values)
    tail = (1 - CONFIDENCE) / 2
    below = _cumulated(n, part)
    # x_(r) <= the percentile unless fewer than r values are below it: r is the largest for which that is rare.
    low = next((r for r in range(n, 0, -1) if below[r - 1] <= tail), None)
    high = next((r for r in range(1, n + 1) if below[r - 1] >= 1 - tail), None)
    return Estimate(
        value=percentile(ordered, part),
        low=None if low is None else ordered[low - 1],
        high=None if high is None else ordered[high - 1],
        n=n,
    )


def mean_estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean, by bootstrap; ``values`` must not be empty."""
    dice, n = random.Random(seed), len(values)
    means = sorted(math.fsum(dice.choices(values, k=n)) / n for _ in range(_RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return Estimate(value=math.fsum(values) / n, low=percentile(means, tail), high=percentile(means, 1 - tail), n=n)


def part_estimate(num: int, n: int) -> Estimate:
    """A part of n, by Wilson's score interval; n must not be 0."""
    z, part = 1.959964, num / n
    middle = (part + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(part * (1 - part) / n + z**2 / (4 * n**2))
    return Estimate(value=part, low=max(0.0, middle - half), high=min(1.0, middle + half), n=n)


def _cumulated(n: int, part: float) -> list[float]:
    """P(B <= k) of a binomial B, for k of 0 to n."""
    total, found = 0.0, []
    for k in range(n + 1):
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(log + k * math.log(part) + (n - k) * math.log1p(-part))
        found.append(min(total, 1.0))
    return found
