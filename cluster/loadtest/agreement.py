"""The clients' figures beside the service's own: where they disagree, one is wrong, or they mean other things.

Histograms are compared at the bounds of their buckets, where both are exact. Ray makes a histogram's ``_sum`` up
from the middles of the buckets, so a mean that a dashboard takes from it is only as good as they are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.loadtest.rows import Row
from cluster.prometheus import JOBS, LATENCY, REQUEUED, STAGE, Scrape

MAX_SHIFT = 0.05
"""Largest difference of the parts of the jobs below a bound."""
MAX_MEAN_ERROR = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One figure, seen from both sides."""

    what: str
    clients: float
    service: float | None
    """None: it exports none."""
    agrees: bool
    note: str = ""


def readings(rows: Sequence[Row], found: Scrape) -> list[Reading]:
    """Compare a run's rows with what the service counted meanwhile."""
    return [*_counts(rows, found), *_latency(rows, found), *_stages(rows, found)]


def _counts(rows: Sequence[Row], found: Scrape) -> Iterator[Reading]:
    ended = Counter(
        one.outcome if one.outcome in ("completed", "cancelled") else str(one.code)
        for one in rows
        if one.outcome in ("completed", "failed", "cancelled")
    )
    for outcome, count in sorted(ended.items()):
        theirs = found.of(JOBS, outcome=outcome)
        note = "" if theirs is None or theirs <= count else "others use the service, too, or a job ended twice"
        yield Reading(what=f"jobs ended: {outcome}", clients=count, service=theirs, agrees=theirs == count, note=note)
    begun_again = sum(max(one.attempt - 1, 0) for one in rows)
    theirs = found.of(REQUEUED)
    yield Reading(
        what="attempts given up",
        clients=begun_again,
        service=theirs if theirs is not None or begun_again else 0.0,
        agrees=(theirs or 0.0) == begun_again,
        note="rows count the attempts of jobs that ended",
    )


def _latency(rows: Sequence[Row], found: Scrape) -> Iterator[Reading]:
    """From creation to end, which is less than the clients' latency by what lies before the create's answer."""
    ours = [one.ended_s - one.accepted_s for one in rows if one.outcome == "completed" and one.accepted_s is not None]
    yield from _histogram("seconds from create to end", ours, found, LATENCY, outcome="completed")


def _stages(rows: Sequence[Row], found: Scrape) -> Iterator[Reading]:
    """Only of jobs that were not disturbed: a lost attempt's stages are in the metric and not in the job."""
    for stage in ("text", "encode", "denoise", "decode"):
        ours = [one.stage_seconds[stage] for one in rows if stage in one.stage_seconds]
        yield from _histogram(f"seconds in {stage}", ours, found, STAGE, stage=stage)


def _histogram(what: str, ours: Sequence[float], found: Scrape, name: str, **labels: str) -> Iterator[Reading]:
    if not ours:
        return
    buckets = found.buckets(name, **labels)
    mean = sum(ours) / len(ours)
    total = found.of(f"{name}_sum", **labels)
    count = buckets[-1][1] if buckets else 0.0
    if not count or total is None:
        yield Reading(what=f"{what}, mean", clients=mean, service=None, agrees=False, note="not exported")
        return
    shift, bound = max(
        (abs(sum(value <= bound for value in ours) / len(ours) - num / count), bound) for bound, num in buckets
    )
    yield Reading(
        what=f"{what}: largest shift of the distribution",
        clients=0.0,
        service=shift,
        agrees=shift <= MAX_SHIFT,
        note=f"at {bound:g} s; {count:g} values there, {len(ours)} here",
    )
    yield Reading(
        what=f"{what}, mean",
        clients=mean,
        service=total / count,
        agrees=abs(total / count / mean - 1) <= MAX_MEAN_ERROR,
        note="the service's is made of middles of buckets" if abs(total / count / mean - 1) > MAX_MEAN_ERROR else "",
    )
