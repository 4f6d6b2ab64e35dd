"""A run as Markdown for people and JSON for programs, made from values alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.loadtest.agreement import Reading
from cluster.loadtest.audit import Audit
from cluster.loadtest.faults import Struck
from cluster.loadtest.knee import Knee, Point
from cluster.loadtest.saturation import Round, overall_ratio
from cluster.loadtest.statistics import Estimate
from cluster.loadtest.summary import Group, Summary
from cluster.verdicts import Figure, table


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is known of a run."""

    facts: Mapping[str, Any]
    """What was run: name, model, seed, rates."""
    summary: Summary
    audit: Audit
    faults: Sequence[Struck]
    points: Sequence[Point]
    """Of a sweep; empty: there was none."""
    knee: Knee | None
    rounds: Sequence[Round]
    """At saturation; empty: not measured."""
    readings: Sequence[Reading] | None
    """Beside the service's metrics; None: not read."""
    figures: Sequence[Figure]
    """The verdict."""

    @property
    def is_met(self) -> bool:
        """Whether nothing is missed."""
        return all(one.is_met for one in self.figures)


def as_json(report: Report) -> dict[str, Any]:
    """For programs; infinities do not occur."""
    ratio = overall_ratio(report.rounds) if report.rounds else None
    return {**asdict(report), "saturation_ratio": ratio, "is_met": report.is_met}


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """For people.

    Args:
        report: of the run.
        pictures: names of files beside the report.
    """
    parts = [
        _head(report),
        _verdict(report),
        _overall(report.summary),
        _latencies(report.summary),
        _waits(report.summary),
        _outcomes(report.summary),
        _faults(report.faults),
        _sweep(report.points, report.knee),
        _saturation(report.rounds),
        _agreement(report.readings),
        "".join(f"![{name.removesuffix('.png')}]({name})\n" for name in pictures),
    ]
    return "\n".join(part for part in parts if part)


def headlines(report: Report) -> str:
    """The few tables for a terminal."""
    parts = [_overall(report.summary), _latencies(report.summary), _sweep(report.points, report.knee)]
    parts += [_saturation(report.rounds), _disagreements(report.readings), _verdict(report)]
    return "\n".join(part for part in parts if part)


def _head(report: Report) -> str:
    facts = "".join(f"- {name}: {value}\n" for name, value in report.facts.items())
    return f"# Load test {report.facts['run']}\n\n{facts}"


def _verdict(report: Report) -> str:
    return f"## Verdict: {'met' if report.is_met else 'MISSED'}\n\n{table(report.figures)}"


def _overall(summary: Summary) -> str:
    seconds = summary.gang_seconds_per_video, summary.rank_seconds_per_video
    rows = [
        ("jobs due", f"{summary.total.num_jobs}"),
        ("duration, first intended arrival to last end", f"{summary.duration_s:.1f} s"),
        ("offered rate", f"{summary.offered_rate:.3f} jobs/s"),
        ("achieved rate", f"{summary.achieved_rate:.3f} jobs/s"),
        ("request throughput, completed by duration", f"{summary.request_throughput:.3f} jobs/s"),
        ("request goodput, within objective by duration", _optional(summary.request_goodput, "jobs/s")),
        ("peak in flight", f"{summary.peak_in_flight}"),
        ("completed / rejected / errors", _triple(summary.total)),
        ("completed after a lost attempt", f"{summary.num_resumed}"),
        ("gang-seconds a video", _optional(seconds[0], "s")),
        ("rank-seconds a video", _optional(seconds[1], "s")),
        ("Jain index of the tenants' served parts", f"{summary.jain_index:.4f}"),
        ("Jain index of the tenants' service by latency", f"{summary.jain_of_speed:.4f}"),
        ("p99 lag of the load generator", f"{1000 * summary.p99_lag_s:.0f} ms"),
    ]
    return "## Overall\n\n" + _table(("figure", "value"), rows)


def _latencies(summary: Summary) -> str:
    """With confidence intervals; an interval's end that n is too small for is a dash."""
    rows = []
    for name, group in _groups(summary):
        if group.latency is not None:
            figures = [_interval(one) for one in (group.latency.mean, *group.latency.percentiles.values())]
            attained = (
                "-" if group.attainment is None else f"{group.attainment.value:.1%} {_percents(group.attainment)}"
            )
            rows.append((name, f"{group.latency.mean.n}", *figures, attained))
    head = ("jobs", "n", "mean", "p50", "p90", "p95", "p99", "attainment")
    return "## End-to-end latency, seconds from the intended arrival [95 % interval]\n\n" + _table(head, rows)


def _waits(summary: Summary) -> str:
    rows = []
    for name, group in _groups(summary):
        if group.latency is not None:
            one = group.latency
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in one.stage_seconds.items())
            rows.append((name, f"{one.wait_s:.2f}", f"{one.service_s:.2f}", f"{one.rest_s:.2f}", stages))
    head = ("jobs", "wait for a gang", "service", "rest: HTTP, queue, lost attempts", "stages, as the API tells")
    return "## Waits against service, mean seconds\n\n" + _table(head, rows)


def _outcomes(summary: Summary) -> str:
    rows = [(name, f"{group.num_jobs}", _triple(group), _counts(group)) for name, group in _groups(summary)]
    return "## Outcomes\n\n" + _table(("jobs", "due", "completed / rejected / errors", "by outcome"), rows)


def _faults(faults: Sequence[Struck]) -> str:
    if not faults:
        return ""
    rows = [(one.what, f"{one.at_s:.1f} s", _optional(one.whole_after_s, "s")) for one in faults]
    return "## Faults\n\n" + _table(("fault", "at", "gang whole again after"), rows)


def _sweep(points: Sequence[Point], found: Knee | None) -> str:
    if not points:
        return ""
    rows = []
    for one in sorted(points, key=lambda point: point.offered):
        p95 = Estimate(value=one.p95_s, low=one.p95_low_s, high=one.p95_high_s, n=one.n)
        is_knee = found is not None and one.offered == found.offered
        note = " ".join(word for word, holds in (("knee", is_knee), ("saturated", one.is_saturated)) if holds)
        rates = (f"{one.offered:.3f}", f"{one.achieved:.3f}", f"{one.goodput:.3f}")
        rows.append((*rates, f"{one.mean_s:.2f}", f"{one.p50_s:.2f}", _interval(p95), f"{one.n}", note))
    text = "No knee: it takes three rates.\n"
    if found is not None:
        text = f"Knee, where throughput by mean latency is greatest: {found.offered:.3f} jobs/s offered"
        text += ".\n" if found.is_bracketed else ", which is the sweep's end: run rates beyond it.\n"
    head = ("offered, jobs/s", "achieved", "goodput", "mean, s", "p50, s", "p95, s", "n", "")
    return f"## Latency by load\n\n{_table(head, rows)}\n{text}"


def _saturation(rounds: Sequence[Round]) -> str:
    if not rounds:
        return ""
    rows = [
        (f"{number}", f"{one.num_jobs}", f"{one.plain_s:.2f}", f"{one.service_s:.2f}", f"{one.ratio:.3f}")
        for number, one in enumerate(rounds, start=1)
    ]
    rows.append(("all", f"{sum(one.num_jobs for one in rounds)}", *_sums(rounds), f"{overall_ratio(rounds):.3f}"))
    head = ("round", "jobs", "plain loop, s", "service, s", "service's throughput by the loop's")
    return "## Throughput at saturation\n\n" + _table(head, rows)


def _sums(rounds: Sequence[Round]) -> tuple[str, str]:
    return f"{sum(one.plain_s for one in rounds):.2f}", f"{sum(one.service_s for one in rounds):.2f}"


def _agreement(readings: Sequence[Reading] | None) -> str:
    if readings is None:
        return "## The service's own metrics\n\nNot read: no --metrics-url was given.\n"
    rows = [
        (one.what, f"{one.clients:.3f}", _optional(one.service), "agrees" if one.agrees else "DISAGREES", one.note)
        for one in readings
    ]
    head = ("figure", "clients", "service's metrics", "", "note")
    return f"## The service's own metrics\n\n{_table(head, rows)}\n{_disagreements(readings)}"


def _disagreements(readings: Sequence[Reading] | None) -> str:
    if readings is None:
        return ""
    names = [one.what for one in readings if not one.agrees]
    if not names:
        return f"The service's metrics agree with the clients in all {len(readings)} figures.\n"
    return f"The service's metrics disagree with the clients in {len(names)} of {len(readings)}: {'; '.join(names)}.\n"


def _groups(summary: Summary) -> Iterator[tuple[str, Group]]:
    yield "all", summary.total
    yield from ((f"class {name}", group) for name, group in summary.classes.items())
    yield from ((f"tenant {name}", group) for name, group in summary.tenants.items())


def _triple(group: Group) -> str:
    return f"{group.completed} / {group.rejected} / {group.errors}"


def _counts(group: Group) -> str:
    return ", ".join(f"{outcome} {count}" for outcome, count in sorted(group.outcomes.items()))


def _interval(one: Estimate) -> str:
    low, high = ("-" if end is None else f"{end:.2f}" for end in (one.low, one.high))
    return f"{one.value:.2f} [{low}, {high}]"


def _percents(one: Estimate) -> str:
    low, high = ("-" if end is None else f"{end:.1%}" for end in (one.low, one.high))
    return f"[{low}, {high}]"


def _optional(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3f} {unit}".strip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
