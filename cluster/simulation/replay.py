"""A run of the load test, again under virtual time: whether the simulation says what really happened.

The arrivals are the run's, and so is when a rank was killed and its gang made steps again. What the service takes
for a job is not: it was measured before, on single jobs (``loadtest --alone``). Of those each job of the run draws
one of its class; two at a time said what sharing the machine's processors costs.
"""

import json
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.loadtest.rows import ALONE, TOGETHER, Row, read_rows
from cluster.loadtest.settings import SettingsError
from cluster.loadtest.workload import Workload, read_workload
from cluster.verdicts import Figure, near, percentile, told
from cluster.virtual.cluster import VirtualCluster
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Ask, Times

TOLERANCE = 0.15
Outage = tuple[float, float]
"""When a gang died, and when the next made its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What is simulated."""

    workload: Workload
    rows: Sequence[Row]
    """Of the run: when jobs were due, and of whom."""
    alone: Mapping[str, Sequence[Row]]
    """By class."""
    crowded: float
    outages: Sequence[Outage] = ()
    num_gangs: int = 1
    num_decoders: int = 1
    seed: int = 0


def read_replay(path: Path) -> Replay:
    """A run from the folder of its load test; a file of a sweep's rows in it is that rate's run.

    Raises:
        SettingsError: it was not measured what it takes.
    """
    folder, run = (path, path / "jobs.jsonl") if path.is_dir() else (path.parent, path)
    files = [run, *(folder / f"jobs-{part}.jsonl" for part in (ALONE, TOGETHER)), folder / "workload.yaml"]
    if missing := [one.name for one in files if not one.is_file()]:
        raise SettingsError(f"{folder}: there is no {', '.join(missing)}; run the load test with --alone")
    rows, alone, together = (read_rows(one) for one in files[:3])
    by_class: dict[str, list[Row]] = {}
    for one in _completed(alone):
        by_class.setdefault(one.job_class, []).append(one)
    if unknown := {one.job_class for one in rows} - by_class.keys():
        raise SettingsError(f"{folder}: no job of {', '.join(sorted(unknown))} was measured alone")
    deaths = [] if run.name != "jobs.jsonl" else _deaths(folder / "report.json")
    return Replay(
        workload=read_workload(files[3]),
        rows=rows,
        alone=by_class,
        crowded=crowding(by_class, _completed(together)),
        outages=[(died, _first_step_after(whole, rows)) for died, whole in deaths],
    )


def crowding(alone: Mapping[str, Sequence[Row]], together: Iterable[Row]) -> float:
    """By how much steps take longer while there is another job; never less than 1.

    The median, since a job that another was put before has that one's steps in its time, too.
    """
    ratios = [_steps_s(one) / statistics.fmean(map(_steps_s, alone[one.job_class])) for one in together]
    return max(1.0, statistics.median(ratios))


def latencies(replay: Replay) -> list[float]:
    """Of every job of the run, simulated."""
    dice, loop = random.Random(replay.seed), EventLoop()
    workload = replay.workload
    cluster = VirtualCluster(
        loop,
        {name: one.weight for name, one in workload.tenants.items()},
        replay.num_gangs,
        Times(crowded=replay.crowded),
        window=2 * replay.num_gangs,
        num_decoders=replay.num_decoders,
    )
    rest_s = {}
    for row in replay.rows:
        job, like = workload.classes[row.job_class], dice.choice(replay.alone[row.job_class])
        seconds = like.stage_seconds
        ask = Ask(
            id=f"{row.number:06d}",
            tenant=row.tenant,
            num_steps=job.num_inference_steps,
            step_s=_steps_s(like) / job.num_inference_steps,
            priority=job.priority,
            # Alone, the wait for a gang is what it takes to get on one.
            prepare_s=seconds["text"] + seconds.get("encode", 0.0) + like.wait_s,
            decode_s=seconds["decode"],
        )
        rest_s[ask.id] = like.rest_s
        loop.at(row.intended_s, partial(cluster.ask, ask))
    for died, back in replay.outages:
        loop.at(died, partial(_fail, cluster))
        loop.at(back, cluster.add)
    loop.run()
    return [one.ended_at - one.asked_at + rest_s[name] for name, one in cluster.records.items()]


def compare(replay: Replay) -> list[Figure]:
    """The run's mean and p95 latency beside the simulated ones."""
    real, simulated = [one.latency_s for one in _completed(replay.rows)], latencies(replay)
    lines = [told("service times", "longer with company", replay.crowded)]
    for name, of in (("mean", statistics.fmean), ("p95", partial(percentile, part=0.95))):
        scenario = f"{name} latency"
        lines += [
            told(scenario, "real, seconds", of(real)),
            told(scenario, "simulated, seconds", of(simulated)),
            near(scenario, "simulated by real", of(simulated) / of(real), TOLERANCE),
        ]
    return lines


def _fail(cluster: VirtualCluster) -> None:
    cluster.fail(cluster.gangs[0])


def _completed(rows: Iterable[Row]) -> list[Row]:
    return [one for one in rows if one.outcome == "completed"]


def _steps_s(row: Row) -> float:
    return row.stage_seconds["denoise"] - row.wait_s


def _deaths(report: Path) -> list[Outage]:
    """When ranks were killed, and when all were there again."""
    faults = json.loads(report.read_text())["faults"] if report.is_file() else []
    if any(one["whole_after_s"] is None for one in faults):
        raise SettingsError(f"{report}: a gang that did not come back leaves nothing to compare")
    return [(one["at_s"], one["at_s"] + one["whole_after_s"]) for one in faults]


def _first_step_after(instant: float, rows: Iterable[Row]) -> float:
    """When a gang made a step again: new ranks have a model to load before."""
    began = (
        one.ended_s - one.stage_seconds["decode"] - _steps_s(one) for one in _completed(rows) if one.ended_s > instant
    )
    return max(instant, min(began, default=instant))
