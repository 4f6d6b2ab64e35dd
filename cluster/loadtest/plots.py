"""The report's pictures: one question each, with axes that say what they show, and in which unit."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.loadtest.faults import Struck
from cluster.loadtest.knee import Knee, Point
from cluster.loadtest.rows import Row
from cluster.loadtest.slo import Slo
from cluster.loadtest.summary import Summary

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart."""
_GREY = "#777777"
_PARTS = (
    ("rest", "HTTP, queue, lost attempts"),
    ("text", "text"),
    ("encode", "conditioning"),
    ("wait", "wait for a gang"),
    ("steps", "steps"),
    ("decode", "decode"),
)
_NUM_BINS = 40


def draw(
    folder: Path,
    rows: Sequence[Row],
    summary: Summary,
    slo: Slo | None,
    faults: Sequence[Struck],
    points: Sequence[Point],
    found_knee: Knee | None,
) -> list[Path]:
    """Write all pictures that there is something for; returns their paths."""
    made = [
        _saved(folder / "latency.png", lambda axes: latency(axes, rows, slo)),
        _saved_pair(folder / "timeline.png", rows, faults),
        _saved(folder / "stages.png", lambda axes: stages(axes, summary), height=0.7 * len(summary.classes) + 1.9),
        _saved(folder / "tenants.png", lambda axes: tenants(axes, rows, summary)),
    ]
    if len(points) > 1:
        made.append(_saved_sweep(folder / "knee.png", points, found_knee, slo))
    return made


def latency(axes: Axes, rows: Sequence[Row], slo: Slo | None) -> None:
    """Which part of a class's jobs completed within how long; a curve that ends below 1 has jobs that never did."""
    for name, colour in _coloured({one.job_class for one in rows}).items():
        of_class = [one for one in rows if one.job_class == name]
        seconds = sorted(one.latency_s for one in of_class if one.outcome == "completed")
        parts = [(number + 1) / len(of_class) for number in range(len(seconds))]
        axes.step(seconds, parts, where="post", color=colour, label=f"{name} (n = {len(of_class)})")
        objective = slo.classes.get(name) if slo is not None else None
        if objective is not None:
            axes.plot([objective.latency_s], [objective.attainment], "x", color=colour, markersize=8, mew=2)
    if slo is not None and slo.classes:
        axes.plot([], [], "x", color=_GREY, markersize=8, mew=2, label="objective: the curve passes above and left")
    axes.set(
        title="Latency by job class", xlabel="latency from the intended arrival (s)", ylabel="part of all jobs due"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")


def arrivals_and_ends(axes: Axes, rows: Sequence[Row], faults: Sequence[Struck]) -> None:
    """Offered and achieved rate over the run."""
    end = max(one.ended_s for one in rows)
    width = end / _NUM_BINS
    edges = [number * width for number in range(_NUM_BINS + 1)]
    offered = _per_second([one.intended_s for one in rows], width)
    achieved = _per_second([one.ended_s for one in rows if one.outcome == "completed"], width)
    axes.stairs(offered, edges, color=_GREY, label="offered (due)", linewidth=1.2)
    axes.stairs(achieved, edges, color=_COLOURS[0], label="achieved (completed)", linewidth=1.6)
    axes.set(title="Rates and jobs in flight over the run", ylabel=f"jobs/s, in bins of {width:.1f} s")
    axes.set_ylim(bottom=0)
    _mark(axes, faults)


def in_flight(axes: Axes, rows: Sequence[Row], faults: Sequence[Struck]) -> None:
    """Jobs that are due and have not ended, by how far they are."""
    times = sorted({0.0, *(one.intended_s for one in rows), *(one.ended_s for one in rows)})
    begun, ended = sorted(one.intended_s for one in rows), sorted(one.ended_s for one in rows)
    counts = [bisect_right(begun, at) - bisect_right(ended, at) for at in times]
    axes.fill_between(times, counts, step="post", color=_COLOURS[0], alpha=0.25, linewidth=0)
    axes.step(times, counts, where="post", color=_COLOURS[0], linewidth=1.2)
    axes.set(xlabel="time from the beginning of the run (s)", ylabel="jobs in flight")
    axes.set_xlim(0, times[-1])
    axes.set_ylim(bottom=0)
    _mark(axes, faults)


def stages(axes: Axes, summary: Summary) -> None:
    """Where a class's mean latency goes."""
    names = [name for name, group in sorted(summary.classes.items(), reverse=True) if group.latency is not None]
    left = dict.fromkeys(names, 0.0)
    for (part, label), colour in zip(_PARTS, (_GREY, *_COLOURS[4:6], "#BBBBBB", *_COLOURS[:2]), strict=True):
        widths = [_part(summary, name, part) for name in names]
        if sum(widths) > 0:
            axes.barh(names, widths, left=list(left.values()), color=colour, label=label, height=0.6)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.set(title="Where the time goes, mean of completed jobs", xlabel="seconds of latency")
    axes.grid(visible=False, axis="y")
    figure = axes.get_figure()
    if figure is not None:
        figure.legend(frameon=False, ncols=3, loc="outside lower center")


def tenants(axes: Axes, rows: Sequence[Row], summary: Summary) -> None:
    """Latency of each tenant's completed jobs: box from p25 to p75, whiskers from p5 to p95."""
    seconds = {
        name: [one.latency_s for one in rows if one.tenant == name and one.outcome == "completed"]
        for name in summary.tenants
    }
    seconds = {name: values for name, values in seconds.items() if values}
    boxes = axes.boxplot(
        list(seconds.values()),
        tick_labels=[f"{name}\nn = {len(values)}" for name, values in seconds.items()],
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        widths=0.5,
        medianprops={"color": "black"},
    )
    for box in boxes["boxes"]:
        box.set(facecolor=_COLOURS[5], edgecolor=_GREY)
    axes.set(
        title=f"Latency by tenant (Jain index {summary.jain_index:.3f})",
        ylabel="latency from the intended arrival (s)\nbox p25 to p75, whiskers p5 to p95",
    )
    axes.grid(visible=False, axis="x")
    axes.set_ylim(bottom=0)


def latency_by_load(axes: Axes, points: Sequence[Point], found_knee: Knee | None) -> None:
    """The latency-load curve."""
    rates = [one.offered for one in points]
    axes.fill_between(
        rates,
        [one.p95_s if one.p95_low_s is None else one.p95_low_s for one in points],
        [one.p95_s if one.p95_high_s is None else one.p95_high_s for one in points],
        color=_COLOURS[1],
        alpha=0.15,
        linewidth=0,
        label="95 % interval of p95, where n allows",
    )
    axes.plot(rates, [one.p95_s for one in points], "o-", color=_COLOURS[1], label="p95")
    axes.plot(rates, [one.p50_s for one in points], "o-", color=_COLOURS[0], label="p50")
    _mark_knee(axes, found_knee)
    axes.set(title="Latency by load", xlabel="offered rate (jobs/s)", ylabel="latency (s)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")


def rates_by_load(axes: Axes, points: Sequence[Point], found_knee: Knee | None, slo: Slo | None) -> None:
    """What the service makes of what is asked for."""
    rates = [one.offered for one in points]
    axes.plot([0, max(rates)], [0, max(rates)], "--", color=_GREY, linewidth=1, label="offered")
    axes.plot(rates, [one.achieved for one in points], "o-", color=_COLOURS[0], label="achieved")
    if slo is not None and slo.classes:
        axes.plot(
            rates,
            [one.goodput for one in points],
            "s--",
            color=_COLOURS[2],
            markersize=4,
            label="goodput, by the whole run",
        )
    _mark_knee(axes, found_knee)
    axes.set(title="Throughput by load", xlabel="offered rate (jobs/s)", ylabel="jobs/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")


def _saved(path: Path, paint: Callable[[Axes], None], height: float = 4.2) -> Path:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    paint(axes)
    figure.savefig(path, dpi=140)
    return path


def _saved_pair(path: Path, rows: Sequence[Row], faults: Sequence[Struck]) -> Path:
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for axes in (above, below):
        _plain(axes)
    arrivals_and_ends(above, rows, faults)
    in_flight(below, rows, faults)
    figure.legend(*above.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=140)
    return path


def _saved_sweep(path: Path, points: Sequence[Point], found_knee: Knee | None, slo: Slo | None) -> Path:
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _plain(axes)
    ordered = sorted(points, key=lambda one: one.offered)
    latency_by_load(left, ordered, found_knee)
    rates_by_load(right, ordered, found_knee, slo)
    figure.savefig(path, dpi=140)
    return path


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _coloured(names: set[str]) -> Mapping[str, str]:
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(sorted(names))}


def _per_second(instants: Sequence[float], width: float) -> list[float]:
    counts = [0] * _NUM_BINS
    for at in instants:
        counts[min(int(at / width), _NUM_BINS - 1)] += 1
    return [count / width for count in counts]


def _mark(axes: Axes, faults: Sequence[Struck]) -> None:
    for number, one in enumerate(faults):
        whole_s = one.at_s if one.whole_after_s is None else one.at_s + one.whole_after_s
        label = f"{one.what}: gang not whole" if not number else None
        axes.axvspan(one.at_s, whole_s, color=_COLOURS[1], alpha=0.25, linewidth=0, label=label)


def _mark_knee(axes: Axes, found_knee: Knee | None) -> None:
    if found_knee is not None:
        label = "knee" if found_knee.is_bracketed else "most power, at the sweep's end"
        axes.axvline(found_knee.offered, color=_GREY, linestyle=":", label=label)


def _part(summary: Summary, name: str, part: str) -> float:
    found = summary.classes[name].latency
    if found is None:
        return 0.0
    match part:
        case "rest":
            return found.rest_s
        case "wait":
            return found.wait_s
        case "steps":
            return found.stage_seconds.get("denoise", 0.0) - found.wait_s
        case _:
            return found.stage_seconds.get(part, 0.0)
