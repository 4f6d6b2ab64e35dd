"""A run against its objectives: one line each, and the exit code is whether all are met."""

from collections.abc import Iterator

from cluster.loadtest.audit import Audit
from cluster.loadtest.slo import Slo
from cluster.loadtest.summary import Summary
from cluster.verdicts import Figure, at_least, at_most, none_of, told


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
    yield none_of("all jobs", "lost", found.lost)
    yield none_of("all jobs", "doubled", found.doubled)


def _rates(summary: Summary, slo: Slo) -> Iterator[Figure]:
    total = summary.total
    yield at_most("all jobs", "errors, part of all", total.errors / total.num_jobs, slo.max_error_rate)
    yield at_most("all jobs", "rejects, part of all", total.rejected / total.num_jobs, slo.max_reject_rate)
    yield at_least("tenants", "Jain index", summary.jain_index, slo.min_jain)
    yield at_most("load generator", "p99 lag, seconds", summary.p99_lag_s, slo.max_p99_lag_s)


def _classes(summary: Summary, slo: Slo) -> Iterator[Figure]:
    for name, objective in slo.classes.items():
        group, what = summary.classes.get(name), f"within {objective.latency_s:g} s, part of all"
        if group is None or group.attainment is None:
            yield told(f"class {name}", what, "no job was due")
        else:
            yield at_least(f"class {name}", what, group.attainment.value, objective.attainment)


def _saturation(ratio: float | None, slo: Slo) -> Iterator[Figure]:
    if ratio is not None:
        yield at_least("saturation", "throughput by a plain loop's", ratio, slo.min_saturation_ratio)
