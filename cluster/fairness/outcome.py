"""What came of a scenario, and the figures of fairness in it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One job's times, in seconds from the beginning of the run; infinity: not seen."""

    tenant: str
    asked_at: float
    ready_at: float
    """Its text and conditioning were encoded."""
    began_at: float
    """Its first step began."""
    denoised_at: float
    ended_at: float
    waits: Mapping[str, float] = field(default_factory=dict)
    """Seconds more than when idle, by the role it waited for; empty: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One step that a gang made for a tenant."""

    at: float
    """Seconds from the beginning, when it ended."""
    tenant: str
    cost: float
    """Gang-seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A run of a scenario."""

    outcomes: Sequence[Outcome]
    deliveries: Sequence[Delivery]
    idle_s: Mapping[str, float]
    """Idle latency of a tenant's jobs, in seconds."""
    step_s: Mapping[str, float]
    """Seconds of a step of them."""


def slowdown(seen: Observation, tenants: Iterable[str]) -> float:
    """Median latency of these tenants' jobs, by what is idle."""
    wanted = set(tenants)
    return median(
        (one.ended_at - one.asked_at) / seen.idle_s[one.tenant] for one in seen.outcomes if one.tenant in wanted
    )


def longest_wait_steps(seen: Observation, tenants: Iterable[str], others: Iterable[str]) -> float:
    """The longest that a prepared job of these tenants waited for its first step, in steps of the others' jobs."""
    wanted = set(tenants)
    longest = max(one.began_at - one.ready_at for one in seen.outcomes if one.tenant in wanted)
    return longest / max(seen.step_s[tenant] for tenant in others)


def delivered(seen: Observation, tenants: Iterable[str]) -> dict[str, float]:
    """Gang-seconds that each of these tenants got while all of them had jobs that waited."""
    names = list(tenants)
    since = max(min(one.ready_at for one in seen.outcomes if one.tenant == name) for name in names)
    until = min(max(one.began_at for one in seen.outcomes if one.tenant == name) for name in names)
    got: dict[str, float] = defaultdict(float, dict.fromkeys(names, 0.0))
    for one in seen.deliveries:
        if since < one.at <= until and one.tenant in got:
            got[one.tenant] += one.cost
    return dict(got)


def jain(values: Iterable[float]) -> float:
    """Jain's fairness index: 1 for equal values, 1/n when one of n has everything."""
    all_values = list(values)
    return sum(all_values) ** 2 / (len(all_values) * sum(value**2 for value in all_values))
