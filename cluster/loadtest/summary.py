"""What a run was, from its rows alone; the words are those of the well-known serving benchmarks.

``request_throughput``: completed jobs by the run's duration. ``request_goodput``: only those within their class's
objective. ``e2el``: end-to-end latency, here from the *intended* arrival.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.fairness.outcome import jain
from cluster.loadtest.knee import Point
from cluster.loadtest.rows import Row
from cluster.loadtest.slo import Slo
from cluster.loadtest.statistics import Estimate, mean_estimate, part_estimate, percentile_estimate

PERCENTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Of jobs that completed, in seconds."""

    mean: Estimate
    percentiles: Mapping[str, Estimate]
    """``p50``, ``p90``, ``p95`` and ``p99``."""
    wait_s: float
    """Mean wait for a place on a gang."""
    service_s: float
    """Mean of the stages without it."""
    rest_s: float
    """Mean of what is left of the latency."""
    stage_seconds: Mapping[str, float]
    """Means; a job that does not pass a stage counts as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A class's jobs, a tenant's, or all."""

    num_jobs: int
    outcomes: Mapping[str, int]
    latency: Latency | None
    """None: none completed."""
    attainment: Estimate | None
    """Part of the jobs that were due that completed within their objective; None: no objective."""

    @property
    def completed(self) -> int:
        """Jobs that ended with a video."""
        return self.outcomes.get("completed", 0)

    @property
    def rejected(self) -> int:
        """Jobs refused for load."""
        return self.outcomes.get("rejected", 0)

    @property
    def errors(self) -> int:
        """Jobs that neither completed nor were refused for load."""
        return self.num_jobs - self.completed - self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run."""

    duration_s: float
    """From the first intended arrival to the last end."""
    offered_rate: float
    """Jobs a second: gaps between intended arrivals, by the time that they take."""
    achieved_rate: float
    """The same of completions, over no less time than the arrivals took: no ramp at either end is in it."""
    request_throughput: float
    request_goodput: float | None
    """None: no class has an objective."""
    peak_in_flight: int
    p99_lag_s: float
    """How late the generator was."""
    num_resumed: int
    """Jobs that completed in a second attempt or later."""
    gang_seconds_per_video: float | None
    rank_seconds_per_video: float | None
    jain_index: float
    """Of what the tenants were served of what they asked for; 1 is fair."""
    jain_of_speed: float
    """Of the tenants' service by latency: 1 when all wait equally long for what they get. Unequal weights lower it."""
    total: Group
    classes: Mapping[str, Group]
    tenants: Mapping[str, Group]


def summarise(
    rows: Sequence[Row], slo: Slo | None, gang_seconds: float | None = None, ranks_per_gang: int | None = None
) -> Summary:
    """Sum a run up.

    Args:
        rows: of all its jobs; not empty.
        slo: objectives; None: there are none.
        gang_seconds: that the tenants were billed for; None: not known.
        ranks_per_gang: of the service; None: not known.
    """
    ends = sorted(one.ended_s for one in rows if one.outcome == "completed")
    due = sorted(one.intended_s for one in rows)
    duration_s = max(one.ended_s for one in rows) - due[0]
    good = [one for one in rows if is_good(one, slo)]
    per_video = gang_seconds / len(ends) if gang_seconds is not None and ends else None
    tenants = {name: _group([one for one in rows if one.tenant == name], slo) for name in _names(rows, "tenant")}
    return Summary(
        duration_s=duration_s,
        offered_rate=_rate(due),
        achieved_rate=_rate(ends, due[-1] - due[0]),
        request_throughput=len(ends) / duration_s,
        request_goodput=len(good) / duration_s if slo is not None and slo.classes else None,
        peak_in_flight=peak_in_flight(rows),
        p99_lag_s=percentile_estimate([one.lag_s for one in rows], 0.99).value,
        num_resumed=sum(one.outcome == "completed" and one.attempt > 1 for one in rows),
        gang_seconds_per_video=per_video,
        rank_seconds_per_video=None if per_video is None or ranks_per_gang is None else per_video * ranks_per_gang,
        jain_index=jain(served_parts(tenants)),
        jain_of_speed=jain(speeds(tenants)),
        total=_group(rows, slo),
        classes={
            name: _group([one for one in rows if one.job_class == name], slo) for name in _names(rows, "job_class")
        },
        tenants=tenants,
    )


def is_good(row: Row, slo: Slo | None) -> bool:
    """Whether a job completed within its class's objective; one without an objective is good when it completes."""
    objective = slo.classes.get(row.job_class) if slo is not None else None
    return row.outcome == "completed" and (objective is None or row.latency_s <= objective.latency_s)


def served_parts(tenants: Mapping[str, Group]) -> list[float]:
    """Completed by asked-for jobs, of every tenant; all 1 when nobody got anything, which is fair."""
    parts = [one.completed / one.num_jobs for one in tenants.values()]
    return parts if any(parts) else [1.0] * len(parts)


def speeds(tenants: Mapping[str, Group]) -> list[float]:
    """Mean service by mean latency, of every tenant that anything completed for; [1] if there is none."""
    found = [one.latency.service_s / one.latency.mean.value for one in tenants.values() if one.latency is not None]
    return found if any(found) else [1.0]


def peak_in_flight(rows: Sequence[Row]) -> int:
    """Most jobs that were due and had not ended at one time."""
    changes = sorted([(one.intended_s, 1) for one in rows] + [(one.ended_s, -1) for one in rows])
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def point(summary: Summary) -> Point | None:
    """A run as a point of the latency-load curve; None: nothing completed."""
    latency = summary.total.latency
    if latency is None:
        return None
    p95 = latency.percentiles["p95"]
    good = summary.request_goodput
    return Point(
        offered=summary.offered_rate,
        achieved=summary.achieved_rate,
        goodput=summary.request_throughput if good is None else good,
        mean_s=latency.mean.value,
        p50_s=latency.percentiles["p50"].value,
        p95_s=p95.value,
        p95_low_s=p95.low,
        p95_high_s=p95.high,
        n=p95.n,
    )


def _names(rows: Sequence[Row], attribute: str) -> list[str]:
    return sorted({getattr(one, attribute) for one in rows})


def _rate(instants: Sequence[float], least_s: float = 0.0) -> float:
    span_s = max(instants[-1] - instants[0], least_s) if len(instants) > 1 else 0.0
    return (len(instants) - 1) / span_s if span_s > 0 else 0.0


def _group(rows: Sequence[Row], slo: Slo | None) -> Group:
    completed = [one for one in rows if one.outcome == "completed"]
    judged = [one for one in rows if slo is not None and one.job_class in slo.classes]
    return Group(
        num_jobs=len(rows),
        outcomes=dict(Counter[str](one.outcome for one in rows)),
        latency=_latency(completed) if completed else None,
        attainment=part_estimate(sum(is_good(one, slo) for one in judged), len(judged)) if judged else None,
    )


def _latency(rows: Sequence[Row]) -> Latency:
    seconds = [one.latency_s for one in rows]
    stages = sorted({stage for one in rows for stage in one.stage_seconds})
    return Latency(
        mean=mean_estimate(seconds),
        percentiles={f"p{part * 100:g}": percentile_estimate(seconds, part) for part in PERCENTILES},
        wait_s=_mean([one.wait_s for one in rows]),
        service_s=_mean([one.service_s for one in rows]),
        rest_s=_mean([one.rest_s for one in rows]),
        stage_seconds={stage: _mean([one.stage_seconds.get(stage, 0.0) for one in rows]) for stage in stages},
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
