"""How many GPUs of which pool a workload needs, and what they cost: ``python -m cluster.simulation``.

A day of jobs runs under virtual time, through the functions that decide in the service (``serve.policy``,
``cluster.autoscaling``). For every pool the least fixed number of gangs that meets the objective is
looked for, and then what autoscaling up to somewhat more would cost. Everything printed is simulated.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from cluster import verdicts
from cluster.capacity_plan import Arrival, Plan, Pool, load_plan
from cluster.replayed_run import compare, read_replay
from cluster.simulated_pool import Served, serve
from cluster.simulation_check import check

_HEADROOM = 1.5
"""Gangs that autoscaling may have, by the fixed number that is enough: a queue that has grown must shrink again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a pool would take."""

    pool: Pool
    how: str
    gangs: int
    served: Served
    hours: float
    is_met: bool

    @property
    def dollars_per_hour(self) -> float:
        """On average."""
        gpu_hours = self.served.gang_hours * self.pool.gpus_per_gang
        return gpu_hours * self.pool.dollars_per_gpu_hour / self.hours


def answers(plan: Plan, pool: Pool, *, max_gpus: int) -> list[Answer]:
    """A fixed number of gangs, and autoscaling; empty if no number up to ``max_gpus`` meets the objective."""
    arrivals = list(plan.arrivals())
    found = fewest(plan, pool, arrivals, most=max_gpus // pool.gpus_per_gang)
    if found is None:
        return []
    gangs, served = found
    most = min(max_gpus // pool.gpus_per_gang, math.ceil(_HEADROOM * gangs))
    scaled = serve(plan, pool, most, plan.autoscaling, arrivals)
    return [_answer(plan, pool, "fixed", gangs, served), _answer(plan, pool, "autoscaled", most, scaled)]


def fewest(plan: Plan, pool: Pool, arrivals: list[Arrival], most: int) -> tuple[int, Served] | None:
    """The fewest gangs that meet the objective, by bisection; None: not even ``most`` do."""
    work_s = sum(one.job.steps * pool.step_s(one.job) for one in arrivals)
    # Fewer than the average load cannot.
    low = max(0, math.ceil(work_s / (plan.hours * 3600)) - 1)
    high, best = max(1, low), None
    while best is None:
        high = min(most, max(high + 1, math.ceil(1.25 * high)))
        served = serve(plan, pool, high, arrivals=arrivals)
        if served.within >= plan.part:
            best = high, served
        elif high >= most:
            return None
        else:
            low = high
    while best[0] - low > 1:
        middle = (low + best[0]) // 2
        served = serve(plan, pool, middle, arrivals=arrivals)
        if served.within >= plan.part:
            best = middle, served
        else:
            low = middle
    return best


def table(found: Sequence[Answer]) -> str:
    """Markdown."""
    head = (
        "| pool | gangs | GPUs at most | GPU-h a day | $/h | p50 s | p95 s | in time | load | failures | verdict |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {one.pool.name}, {one.how} | {one.served.most_gangs} | {one.served.most_gangs * one.pool.gpus_per_gang} "
        f"| {one.served.gang_hours * one.pool.gpus_per_gang * 24 / one.hours:.0f} | {one.dollars_per_hour:.2f} "
        f"| {one.served.p50_s:.0f} | {one.served.p95_s:.0f} | {one.served.within:.1%} | {one.served.load:.0%} "
        f"| {one.served.num_failures} | {'ok' if one.is_met else 'MISSED'} |\n"
        for one in found
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print; 1 if no pool meets the objective."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(next(iter(configs.__path__))) / "simulation/example.yaml")
    parser.add_argument("--max-gpus", type=int, default=8192, help="of one pool (default: %(default)s)")
    parser.add_argument(
        "--against", type=Path, help="judge it by a real run instead: a load test's folder, or its rows"
    )
    parser.add_argument("--check", action="store_true", help="judge the simulation itself instead, by what is known")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            return _judge(check())
        if arguments.against:
            return _judge(compare(read_replay(arguments.against)))
        plan = load_plan(arguments.config)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"simulation: {error}\n")
        return 2
    began = time.perf_counter()
    found = [answer for pool in plan.pools for answer in answers(plan, pool, max_gpus=arguments.max_gpus)]
    sys.stdout.write(table(found))
    without = [pool.name for pool in plan.pools if all(one.pool is not pool for one in found)]
    if without:
        sys.stdout.write(f"\nNot with {arguments.max_gpus} GPUs or fewer: {', '.join(without)}.\n")
    met = sorted((one for one in found if one.is_met), key=lambda one: one.dollars_per_hour)
    objective = f"{plan.part:.0%} within {plan.latency_s:g} s"
    if met:
        best = met[0]
        gpus = best.served.most_gangs * best.pool.gpus_per_gang
        sys.stdout.write(
            f"\n{objective}: cheapest with {best.pool.name}, {best.how}, up to {gpus} GPUs, "
            f"${best.dollars_per_hour:.2f} an hour.\n"
        )
    else:
        sys.stdout.write(f"\n{objective}: with none of these pools.\n")
    num_jobs = found[0].served.num_jobs if found else 0
    sys.stdout.write(f"Simulated {num_jobs} jobs a run in {time.perf_counter() - began:.1f} s in all.\n")
    return 0 if met else 1


def _judge(figures: Iterable[verdicts.Figure]) -> int:
    lines = list(figures)
    sys.stdout.write(verdicts.table(lines))
    return 0 if all(one.is_met for one in lines) else 1


def _answer(plan: Plan, pool: Pool, how: str, gangs: int, served: Served) -> Answer:
    is_met = served.within >= plan.part
    return Answer(pool=pool, how=how, gangs=gangs, served=served, hours=plan.hours, is_met=is_met)


if __name__ == "__main__":
    sys.exit(main())
