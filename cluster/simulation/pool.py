"""A pool of gangs under virtual time: the service's own policies, with cold starts, failures and autoscaling."""

import random
from dataclasses import dataclass
from functools import partial
from math import inf

from cluster.autoscaling import DENOISER, VAE, Fleet, Settings, State, replicas
from cluster.simulation.plan import Arrival, Plan, Pool
from cluster.verdicts import percentile
from cluster.virtual.cluster import VirtualCluster
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Ask, Record, Times

_TICK_S = 15.0
"""Between two decisions of the autoscaling policy."""
_POLL_S = 1.0
_MOST_VAES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came of a plan in a pool."""

    num_jobs: int
    num_unfinished: int
    mean_s: float
    """Latency, from asking to the video."""
    p50_s: float
    p95_s: float
    within: float
    """Part of all jobs that met the objective."""
    most_gangs: int
    gang_hours: float
    """Paid for, cold starts included."""
    load: float
    """Part of them spent on steps."""
    num_failures: int
    num_changes: int
    """How often the number of gangs was changed."""
    most_vaes: int


def serve(
    plan: Plan, pool: Pool, most_gangs: int, scaling: Settings | None = None, arrivals: list[Arrival] | None = None
) -> Served:
    """Run a plan.

    Args:
        plan: what is asked for.
        pool: of the gangs.
        most_gangs: their number; with ``scaling``, the most.
        scaling: begin with none, and let the policy decide; None: a fixed number, ready from the beginning.
        arrivals: the plan's, if they are at hand.
    """
    return _Run(plan, pool, most_gangs, scaling).run(list(plan.arrivals()) if arrivals is None else arrivals)


class _Run:
    def __init__(self, plan: Plan, pool: Pool, most_gangs: int, scaling: Settings | None) -> None:
        self._plan, self._pool, self._most, self._scaling = plan, pool, most_gangs, scaling
        self._loop = EventLoop()
        self._rng = random.Random(plan.seed + 1)
        stages = plan.stages
        times = Times(
            prepare_s=stages.prepare_s,
            decode_s=stages.decode_s,
            release_s=stages.release_s,
            poll_s=_POLL_S if most_gangs < 100 else 5 * _POLL_S,
            arrange_s=0.0 if most_gangs < 100 else _POLL_S,
        )
        weights = {one.name: one.weight for one in plan.tenants}
        num_gangs = most_gangs if scaling is None else 0
        self._cluster = VirtualCluster(
            self._loop,
            weights,
            num_gangs,
            times,
            window=max(8, most_gangs // 4),
            is_coarse=True,
            checkpoint_every=stages.checkpoint_every,
            on_end=self._ended,
        )
        self._latencies: list[float] = []
        self._target, self._num_starting, self._num_stale = num_gangs, 0, 0
        self._vaes = self._most_vaes = 0
        self._state = State()
        self._paid_s, self._paid_until = 0.0, 0.0
        self._num_failures = self._num_changes = self._num_left = 0
        self._most_seen = num_gangs

    def run(self, arrivals: list[Arrival]) -> Served:
        self._num_left = len(arrivals)
        for number, one in enumerate(arrivals):
            ask = Ask(
                id=str(number),
                tenant=one.tenant.name,
                priority=one.tenant.priority,
                num_steps=one.job.steps,
                step_s=self._pool.step_s(one.job),
            )
            self._loop.at(one.at, partial(self._cluster.ask, ask))
        if self._scaling is not None:
            self._loop.at(0.0, self._decide)
        self._fail_later()
        # A pool that is too small ends, too: what is not served by then has missed the objective.
        end = self._plan.hours * 3600 + 4 * self._plan.latency_s
        self._loop.run(until=end)
        self._pay()
        latencies = self._latencies or [inf]
        return Served(
            num_jobs=len(arrivals),
            num_unfinished=self._num_left,
            mean_s=sum(latencies) / len(latencies),
            p50_s=percentile(latencies, 0.5),
            p95_s=percentile(latencies, 0.95),
            within=sum(one <= self._plan.latency_s for one in self._latencies) / max(1, len(arrivals)),
            most_gangs=self._most_seen,
            gang_hours=self._paid_s / 3600,
            load=self._cluster.busy_s / self._paid_s if self._paid_s else 0.0,
            num_failures=self._num_failures,
            num_changes=self._num_changes,
            most_vaes=self._most_vaes,
        )

    def _ended(self, record: Record) -> None:
        self._num_left -= 1
        self._latencies.append(record.ended_at - record.asked_at)

    def _pay(self) -> None:
        """For everything since the last time; called before the number changes."""
        paid = self._cluster.num_gangs + self._num_starting
        self._paid_s += (self._loop.now - self._paid_until) * paid
        self._paid_until = self._loop.now
        self._most_seen = max(self._most_seen, paid)

    def _decide(self) -> None:
        assert self._scaling is not None
        self._pay()
        ready = len(self._cluster.gangs)
        fleets = {
            DENOISER: Fleet(ready=ready, target=self._target, least=0, most=self._most),
            VAE: Fleet(ready=self._vaes, target=self._vaes, least=0, most=_MOST_VAES),
        }
        wanted, self._state = replicas(self._cluster.demand, fleets, self._scaling, self._state, self._loop.now)
        self._vaes = wanted[VAE]
        self._most_vaes = max(self._most_vaes, self._vaes)
        self._num_changes += wanted[DENOISER] != self._target
        self._target = wanted[DENOISER]
        surplus = ready + self._num_starting - self._target
        # What is only starting goes first, as Ray Serve does it.
        unborn = max(0, min(surplus, self._num_starting))
        self._num_starting -= unborn
        self._num_stale += unborn
        for name in self._cluster.gangs[-(surplus - unborn) :] if surplus > unborn else ():
            self._cluster.drain(name)
        for _ in range(-surplus):
            self._start()
        self._loop.after(_TICK_S, self._decide)

    def _start(self) -> None:
        self._num_starting += 1
        self._loop.after(self._pool.cold_start_s, self._started)

    def _started(self) -> None:
        if self._num_stale:
            self._num_stale -= 1  # it was called off
            return
        self._pay()
        self._num_starting -= 1
        self._cluster.add()

    def _fail_later(self) -> None:
        """GPUs fail one by one, at a rate that their number has; a failure takes the whole gang."""
        most_gpus = self._most * self._pool.gpus_per_gang
        mean_s = self._pool.gpu_hours_between_failures * 3600 / most_gpus
        if mean_s != inf:
            self._loop.after(self._rng.expovariate(1 / mean_s), self._fail)

    def _fail(self) -> None:
        self._pay()
        names = self._cluster.gangs
        # Those that are not there do not fail.
        if names and self._rng.random() * self._most < len(names):
            self._num_failures += 1
            self._cluster.fail(self._rng.choice(names))
            self._start()
        self._fail_later()
