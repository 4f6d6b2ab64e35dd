"""95 % intervals of what was measured on pairs of a scene and a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959964
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A measured value, and the interval that holds the true one with 95 % confidence."""

    value: float
    low: float
    high: float


def proportion(successes: Sequence[bool]) -> Estimate:
    """Share of successes, with Wilson's score interval: it stays inside 0..1 and is right near both ends."""
    n, share = len(successes), float(np.mean(successes))
    scale = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / scale
    reach = _Z / scale * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Estimate(value=share, low=max(float(middle - reach), 0.0), high=min(float(middle + reach), 1.0))


def mean(values: Sequence[float]) -> Estimate:
    """Mean, with the percentiles of its bootstrap over the pairs (seeded)."""
    samples = np.asarray(values, np.float64)
    low, high = np.percentile(_resampled_means(samples), (2.5, 97.5))
    return Estimate(value=float(samples.mean()), low=float(low), high=float(high))


def difference(successes: Sequence[bool], others: Sequence[bool]) -> Estimate:
    """Share of ``successes`` less that of ``others``, judged pair by pair: what both find hard adds nothing.

    Bonett and Price's interval (2012): unlike a bootstrap's, it does not shrink to a point when few pairs or
    none tell the two apart.
    """
    n = len(successes)
    gained = sum(one and not other for one, other in zip(successes, others, strict=True))
    lost = sum(other and not one for one, other in zip(successes, others, strict=True))
    gain, loss = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = _Z * float(np.sqrt((gain + loss - (gain - loss) ** 2) / (n + 2)))
    low, high = max(gain - loss - reach, -1.0), min(gain - loss + reach, 1.0)
    return Estimate(value=(gained - lost) / n, low=low, high=high)


def _resampled_means(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    random = np.random.default_rng(0)
    return np.array([samples[random.integers(len(samples), size=len(samples))].mean() for _ in range(_RESAMPLES)])
