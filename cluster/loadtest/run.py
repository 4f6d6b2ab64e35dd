"""A load test from its first job to its report: warm-up, sweep, the run itself, and what the service says of it."""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.loadtest.agreement import Reading, readings
from cluster.loadtest.audit import audit, list_jobs, read_usage, usage_since
from cluster.loadtest.drive import LEAD_S, Run, Target, drive
from cluster.loadtest.faults import Struck, kill_rank
from cluster.loadtest.knee import Point, knee
from cluster.loadtest.orders import forms
from cluster.loadtest.report import Report
from cluster.loadtest.rows import ALONE, TOGETHER, Row, write_rows
from cluster.loadtest.saturation import Generation, Round, measure, overall_ratio
from cluster.loadtest.schedule import Arrival, schedule, write_schedule
from cluster.loadtest.slo import NO_OBJECTIVES, Slo
from cluster.loadtest.summary import point, summarise
from cluster.loadtest.verdict import verdict
from cluster.loadtest.workload import Workload, write_workload
from cluster.orders import served_model
from cluster.prometheus import Scrape, scrape_settled

SETTLE_S = 3.0
"""Between two runs, so that none begins with the other's last work."""


class UnusableError(RuntimeError):
    """The service cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done to whom."""

    name: str
    """Part of every prompt, so it must be new to the service."""
    workload: Workload
    trace: Sequence[Arrival]
    """For a workload that replays one."""
    slo: Slo | None
    target: Target
    folder: Path
    """For the report."""
    job_timeout_s: float
    rates: Sequence[float] = ()
    """Of a sweep before the run; empty: none."""
    sweep_jobs: int = 40
    """For each of them."""
    kill_at: Sequence[float] = ()
    """Seconds of the run at which a rank is killed; only where ``pid`` is known."""
    pid: int | None = None
    """First process of a service of our own."""
    metrics_url: str | None = None
    ranks_per_gang: int | None = None
    alone: int = 0
    """Jobs of each class to measure the service by, with nothing else to do: what a simulation of the run is fed."""
    rounds: int = 0
    """Against a plain loop, at saturation; only where ``pid`` is known."""
    round_jobs: int = 4


def perform(plan: Plan) -> tuple[Report, list[Row]]:
    """Do it; returns the report and the run's rows.

    Raises:
        UnusableError: a job of the warm-up, or of those that measure the service alone, did not complete.
        httpx.HTTPError: the service cannot be asked.
    """
    workload, target = plan.workload, plan.target
    model = _served(target)
    arrivals = schedule(workload, workload.request_rate, workload.num_jobs, plan.trace)
    write_schedule(plan.folder / "schedule.jsonl", arrivals)
    _warm_up(plan)
    write_workload(plan.folder / "workload.yaml", workload)
    _measure_alone(plan)
    points = list(_swept(plan))
    say(f"{len(arrivals)} jobs within {arrivals[-1].at:.0f} s ...")
    before, used, since = _scraped(plan), read_usage(target), time.time()
    rows, faults = asyncio.run(_driven(plan, "run", arrivals, plan.kill_at))
    write_rows(plan.folder / "jobs.jsonl", rows)
    say("every job has ended; asking the service what it has ...")
    delta = usage_since(target, used)
    found = audit(rows, list_jobs(target, f"{plan.name}-run", since), delta.completed)
    compared = _compared(plan, before, rows)
    rounds = list(_rounds(plan, str(model["id"])))
    summary = summarise(rows, plan.slo, delta.gang_seconds, plan.ranks_per_gang)
    ratio = overall_ratio(rounds) if rounds else None
    report = Report(
        facts=_facts(plan, model),
        summary=summary,
        audit=found,
        faults=faults,
        points=points,
        knee=knee(points),
        rounds=rounds,
        readings=compared,
        figures=verdict(summary, found, plan.slo or NO_OBJECTIVES, ratio),
    )
    return report, rows


def say(line: str) -> None:
    """Tell whoever watches; the figures come at the end."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def _warm_up(plan: Plan) -> None:
    """One job of each class, which the first of its shape is slow for; and it shows whether any can be made at all."""
    tenant = next(iter(plan.workload.tenants))
    arrivals = [
        Arrival(number=number, at=0.0, tenant=tenant, job_class=name, seed=number)
        for number, name in enumerate(plan.workload.classes)
    ]
    say(f"warming up with {len(arrivals)} jobs ...")
    rows, _ = asyncio.run(_driven(plan, "warm", arrivals))
    _require_completed(rows, "warm-up")


def _measure_alone(plan: Plan) -> None:
    """Every class alone, and then two jobs at a time, which is what sharing processors costs."""
    tenant = next(iter(plan.workload.tenants))
    arrivals = [
        Arrival(number=number, at=0.0, tenant=tenant, job_class=name, seed=number)
        for number, name in enumerate(list(plan.workload.classes) * plan.alone)
    ]
    for part, at_once in ((ALONE, 1), (TOGETHER, 2)) if arrivals else ():
        say(f"{len(arrivals)} jobs {part} ...")
        rows, _ = asyncio.run(_driven(plan, part, arrivals, at_once=at_once))
        write_rows(plan.folder / f"jobs-{part}.jsonl", rows)
        _require_completed(rows, f"{part} measurement")


def _require_completed(rows: Sequence[Row], what: str) -> None:
    for one in rows:
        if one.outcome != "completed":
            raise UnusableError(f"{what}, a job of class {one.job_class}: {one.outcome} ({one.code})")


def _swept(plan: Plan) -> Iterator[Point]:
    for rate in plan.rates:
        arrivals = schedule(plan.workload, rate, plan.sweep_jobs, plan.trace)
        time.sleep(SETTLE_S)
        rows, _ = asyncio.run(_driven(plan, f"rate-{rate:g}", arrivals))
        write_rows(plan.folder / f"jobs-rate-{rate:g}.jsonl", rows)
        found = point(summarise(rows, plan.slo))
        if found is not None:
            say(f"{found.offered:.2f} jobs/s offered, {found.achieved:.2f} achieved, p95 {found.p95_s:.2f} s")
            yield found
    time.sleep(SETTLE_S)


async def _driven(
    plan: Plan, part: str, arrivals: Sequence[Arrival], kill_at: Sequence[float] = (), at_once: int | None = None
) -> tuple[list[Row], list[Struck]]:
    name = f"{plan.name}-{part}"
    run = Run(
        name=name,
        arrivals=arrivals,
        forms=forms(plan.workload, arrivals, name),
        tasks={key: one.task for key, one in plan.workload.classes.items()},
        job_timeout_s=plan.job_timeout_s,
    )
    began = time.monotonic() + LEAD_S
    async with asyncio.TaskGroup() as group:
        strikes = [
            group.create_task(kill_rank(plan.pid, plan.target, at, began)) for at in kill_at if plan.pid is not None
        ]
        rows = group.create_task(drive(plan.target, run, began, at_once))
    return rows.result(), [one.result() for one in strikes]


def _scraped(plan: Plan) -> Scrape:
    return Scrape({}) if plan.metrics_url is None else scrape_settled(plan.metrics_url)


def _compared(plan: Plan, before: Scrape, rows: Sequence[Row]) -> list[Reading] | None:
    return None if plan.metrics_url is None else readings(rows, _scraped(plan).since(before))


def _rounds(plan: Plan, model: str) -> Iterator[Round]:
    if plan.rounds and plan.pid is not None and plan.ranks_per_gang is not None:
        with _client(plan.target) as http:
            work = (Generation(), plan.round_jobs, plan.rounds, plan.folder)
            for one in measure(http, model, plan.ranks_per_gang, *work):
                say(f"saturation: plain loop {one.plain_s:.1f} s, service {one.service_s:.1f} s")
                yield one


def _served(target: Target) -> dict[str, Any]:
    with _client(target) as http:
        return served_model(http)


def _client(target: Target) -> httpx.Client:
    key = next(iter(target.keys.values()))
    return httpx.Client(base_url=target.url, headers={"Authorization": f"Bearer {key}"} if key else None, timeout=60)


def _facts(plan: Plan, model: dict[str, Any]) -> dict[str, Any]:
    workload, arrivals = plan.workload, plan.workload.arrivals
    return {
        "run": plan.name,
        "service": plan.target.url if plan.pid is None else "of our own, on this machine",
        "model": f"{model['id']}, revision {model['pusa']['revision']}",
        "arrivals": f"{arrivals.process}, burstiness {arrivals.burstiness:g}, seed {workload.seed}",
        "request rate": f"{workload.request_rate:g} jobs/s",
        "jobs": workload.num_jobs,
        "tenants": ", ".join(workload.tenants),
        "classes": ", ".join(f"{name} ({one.task})" for name, one in workload.classes.items()),
        "ranks a gang": plan.ranks_per_gang if plan.ranks_per_gang is not None else "not known",
    }
