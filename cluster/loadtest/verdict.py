"""A run against its objectives: one line each, and the exit code is whether all are met."""

from collections.abc import Iterator

from cluster.loadtest.audit import Audit
from cluster.loadtest.slo import Slo
from cluster.loadtest.summary import Summary
from cluster.verdicts import Figure


def verdict(summary: Summary, found: Audit, slo: Slo, saturation_ratio: float | None = None) -> list[Figure]:
    """Judge a run.

    Args:
        summary: of it.
        found: whether every job is there once.
        slo: what it is to reach.
        saturation_ratio: throughput at saturation by that of a plain loop; None: not measured.
    """
    return [*_integrity(found), *_rates(summary, slo), *_classes(summary, slo), *_saturation(saturation_ratio, slo)]


def _integrity(found: Audit) -> Iterator[Figure]:
    yield Figure("all jobs", "lost", len(found.lost), "0", not found.lost)
    yield Figure("all jobs", "doubled", len(found.doubled), "0", not found.doubled)


def _rates(summary: Summary, slo: Slo) -> Iterator[Figure]:
    total = summary.total
    yield _at_most("all jobs", "errors, part of all", total.errors / total.num_jobs, slo.max_error_rate)
    yield _at_most("all jobs", "rejects, part of all", total.rejected / total.num_jobs, slo.max_reject_rate)
    yield _at_least("tenants", "Jain index", summary.jain_index, slo.min_jain)
    yield _at_most("load generator", "p99 lag, seconds", summary.p99_lag_s, slo.max_p99_lag_s)


def _classes(summary: Summary, slo: Slo) -> Iterator[Figure]:
    for name, objective in slo.classes.items():
        group = summary.classes.get(name)
        if group is not None and group.attainment is not None:
            what = f"within {objective.latency_s:g} s, part of all"
            yield _at_least(f"class {name}", what, group.attainment.value, objective.attainment)


def _saturation(ratio: float | None, slo: Slo) -> Iterator[Figure]:
    if ratio is not None:
        yield _at_least("saturation", "throughput by a plain loop's", ratio, slo.min_saturation_ratio)


def _at_most(scenario: str, what: str, value: float, limit: float | None) -> Figure:
    is_met = limit is None or value <= limit
    return Figure(scenario, what, value, "-" if limit is None else f"<= {limit:g}", is_met)


def _at_least(scenario: str, what: str, value: float, limit: float | None) -> Figure:
    is_met = limit is None or value >= limit
    return Figure(scenario, what, value, "-" if limit is None else f">= {limit:g}", is_met)
