"""Whose turn it is: start-time fair queueing over tenants, in units of delivered cost.

Every tenant has a weight and a *virtual time*: the cost delivered to it, divided by its weight. A job
begins at its tenant's virtual time plus what the tenant's jobs in hand will still add (its *start
tag*), and the least start tag goes first: backlogged tenants stay within a job's cost of each other
and of their weights on one gang, within the jobs in service on several (Goyal, Vin, Cheng: Start-time
Fair Queuing, SIGCOMM 1996; several servers: SFQ(D), Jin, Chase, Kaur, SIGMETRICS 2004).

The *virtual clock* is how far service has come. A tenant that lagged behind it, because it asked for
nothing or for less than its share, is lifted to it when it asks again, so that nobody saves up a claim
and starves the others with it (the counter lift of the Virtual Token Counter: Sheng et al., Fairness
in Serving Large Language Models, OSDI 2024); but only to one job before it, so that a newcomer's first
job need not wait for a longer one to end (the warp of Borrowed-Virtual-Time, Duda, Cheriton, SOSP 1999).

Where this differs from "virtual_time = max(own, least of the active - one job)" and why:

- The lift happens whenever a job is ordered, not when an idle tenant becomes active: a tenant that
  always has one job on one of eight gangs is never idle, lags behind without bound, and would then
  starve the seven others for as long. A tenant that waits is never behind the clock, so nothing is
  taken from it.
- The clock never falls and, when everything is idle, stands at the largest virtual time of *all*
  tenants: with the least of those at work, one that had worked alone for a week would wait for a week
  after its rival's first job. A dispatcher that starts begins there, too; nothing else is stored.
- Jobs in hand count in advance: otherwise one newcomer with a hundred jobs takes every gang before
  its first charge is written.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import inf

from serve.policy.priority import PATIENCE_S, Priority, is_urgent


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A tenant's line in the ledger."""

    weight: float
    """Above 0."""
    virtual_time: float
    """Cost delivered so far by weight, in gang-seconds, and what it was lifted by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job that is on no gang: queued, being prepared, or released by one."""

    id: str
    tenant: str
    priority: Priority
    created_at: float
    """Unix seconds."""
    cost: float
    """Gang-seconds left."""
    is_started: bool = False
    """Whether steps of it are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InHand:
    """A job that has had its turn: given to a gang, and not at its last step yet."""

    tenant: str
    cost: float
    """Gang-seconds left."""
    is_urgent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A waiting job's place in the order."""

    job_id: str
    tenant: str
    virtual_time: float
    """Its start tag: where the tenant's virtual time will be when the job begins."""
    lifted_to: float
    """What the tenant's virtual time becomes if the job is given to a gang: ``JobStore.activate``."""


def in_order(
    waiting: Iterable[Waiting],
    standings: Mapping[str, Standing],
    in_hand: Iterable[InHand] = (),
    *,
    clock: float,
    now: float,
    switch_s: float = 0.0,
    patience_s: float = PATIENCE_S,
) -> Iterator[Turn]:
    """Waiting jobs, first to run first: by fair share, then class, then age. Lazy: the first few are cheap.

    Among a tenant's own jobs: urgent ones first, then those with steps done, then the oldest.

    Args:
        waiting: at most a few of every tenant and class will do, the oldest.
        standings: of every tenant among them.
        in_hand: jobs that gangs hold; a tenant's batch jobs there do not delay its urgent ones.
        clock: see ``virtual_clock``.
        now: Unix seconds.
        switch_s: of changing a gang's LoRA strength; a newcomer's credit covers it both ways.
        patience_s: see ``is_urgent``.
    """
    queues: dict[str, list[tuple[bool, bool, float, str, float]]] = {}
    for job in waiting:
        is_batch = not is_urgent(job.priority, job.created_at, now, patience_s)
        entry = (is_batch, not job.is_started, job.created_at, job.id, job.cost)
        queues.setdefault(job.tenant, []).append(entry)
    taken: dict[str, list[float]] = {}
    for held in in_hand:
        taken.setdefault(held.tenant, [0.0, 0.0])[not held.is_urgent] += held.cost
    heap = []
    for tenant, queue in queues.items():
        queue.sort(reverse=True)
        standing = standings[tenant]
        urgent, batch = taken.get(tenant, (0.0, 0.0))
        is_batch, _, _, _, cost = queue[-1]
        own = standing.virtual_time + (urgent + is_batch * batch) / standing.weight
        start = max(own, clock - (cost + 2 * switch_s) / standing.weight)
        heap.append(((start, *queue[-1]), tenant, standing.virtual_time + (start - own)))
    heapify(heap)
    while heap:
        (start, is_batch, _, _, job_id, cost), tenant, lifted_to = heap[0]
        yield Turn(job_id=job_id, tenant=tenant, virtual_time=start, lifted_to=lifted_to)
        queue, weight = queues[tenant], standings[tenant].weight
        queue.pop()
        if not queue:
            heappop(heap)
            continue
        begins_batch = queue[-1][0] and not is_batch
        start += (cost + (taken.get(tenant, (0.0, 0.0))[1] if begins_batch else 0.0)) / weight
        heapreplace(heap, ((start, *queue[-1]), tenant, lifted_to))


def virtual_clock(
    before: float, starts: Iterable[float], virtual_times: Iterable[float], turns: Iterable[float]
) -> float:
    """How far service has come, never less than before.

    The largest start tag that is in service, or where all running jobs are past, but never past one that waits.

    Args:
        before: what this returned the last time; at first ``idle_clock``.
        starts: of the jobs that gangs are stepping, the virtual time at which each came to its gang.
        virtual_times: of the same jobs, where each is now.
        turns: virtual times of waiting jobs, at least the first of every tenant that could run now.
    """
    level = max(max(starts, default=-inf), min(virtual_times, default=-inf))
    return max(before, min(level, min(turns, default=inf)))


def idle_clock(standings: Iterable[Standing]) -> float:
    """The virtual clock when no job waits or runs: the largest virtual time of all tenants, busy or not."""
    return max((standing.virtual_time for standing in standings), default=0.0)
