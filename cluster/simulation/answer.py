"""What a pool would take: the least fixed number of gangs that meets the objective, and autoscaling beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.simulation.plan import Arrival, Plan, Pool
from cluster.simulation.pool import Served, serve

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


def _answer(plan: Plan, pool: Pool, how: str, gangs: int, served: Served) -> Answer:
    is_met = served.within >= plan.part
    return Answer(pool=pool, how=how, gangs=gangs, served=served, hours=plan.hours, is_met=is_met)
