"""What every tenant has had, under virtual time, and whose turn it is therefore."""

from collections.abc import Iterable, Iterator
from itertools import islice
from math import inf

from cluster.virtual.job import Job
from serve.policy.fairness import InHand, Standing, Turn, idle_clock, in_order, virtual_clock
from serve.policy.tick import Resident


class Shares:
    """The ledger.

    Args:
        switch_s: of a change of LoRA strength.
    """

    def __init__(self, switch_s: float) -> None:
        self._switch_s = switch_s
        self._standings: dict[str, Standing] = {}
        self._on_gangs: dict[tuple[str, bool], float] = {}
        """Gang-seconds that are still due to jobs on gangs, by tenant and whether they are urgent."""
        self._clock = 0.0

    def add(self, tenant: str, weight: float) -> None:
        """Know a tenant; one that is known stays as it is."""
        self._standings.setdefault(tenant, Standing(weight=weight, virtual_time=0.0))

    def turns(self, jobs: Iterable[Job], now: float, ahead: Iterable[InHand] = ()) -> Iterator[Turn]:
        """Jobs in fair order.

        Args:
            jobs: that wait.
            now: virtual seconds.
            ahead: what their tenants have in hand besides what is on gangs.
        """
        on_gangs = (
            InHand(tenant=tenant, cost=cost, is_urgent=urgent) for (tenant, urgent), cost in self._on_gangs.items()
        )
        return in_order(
            (job.waiting() for job in jobs),
            self._standings,
            (*on_gangs, *ahead),
            clock=self._clock,
            now=now,
            switch_s=self._switch_s,
        )

    def advance(self, at_work: list[Resident], ready: Iterable[Job], now: float) -> None:
        """Let the clock, which newcomers begin at, follow those that are served."""
        first = next(islice(self.turns(ready, now), 1), None)
        if not at_work and first is None:
            self._clock = max(self._clock, idle_clock(self._standings.values()))
            return
        self._clock = virtual_clock(
            self._clock,
            (one.claim.virtual_time for one in at_work),
            (one.virtual_time for one in at_work),
            () if first is None else (first.virtual_time,),
        )

    def lift(self, tenant: str, to: float) -> None:
        """A newcomer begins no further back than this."""
        before = self._standings[tenant]
        if to > before.virtual_time:
            self._standings[tenant] = Standing(weight=before.weight, virtual_time=to)

    def enter(self, job: Job) -> None:
        """It is on a gang."""
        assert job.resident is not None
        self._add(job.ask.tenant, job.resident.claim.is_urgent, job.cost)

    def leave(self, job: Job) -> None:
        """It is on no gang any more."""
        assert job.resident is not None
        key = job.ask.tenant, job.resident.claim.is_urgent
        left = self._on_gangs[key] - job.cost
        if left > 1e-9:
            self._on_gangs[key] = left
        else:
            del self._on_gangs[key]

    def become_urgent(self, job: Job) -> None:
        """A batch job on a gang has waited so long that it counts as urgent."""
        self._add(job.ask.tenant, False, -job.cost)
        self._add(job.ask.tenant, True, job.cost)

    def charge(self, job: Job, cost: float) -> None:
        """Gang-seconds were spent on it."""
        assert job.resident is not None
        tenant = job.ask.tenant
        self._on_gangs[tenant, job.resident.claim.is_urgent] -= cost
        before = self._standings[tenant]
        self._standings[tenant] = Standing(
            weight=before.weight, virtual_time=before.virtual_time + cost / before.weight
        )

    def start_of(self, job: Job, now: float) -> float:
        """Where its tenant's virtual time is when it begins."""
        tenant, weight = job.ask.tenant, job.weight
        urgent, batch = (self._on_gangs.get((tenant, is_urgent), 0.0) for is_urgent in (True, False))
        if job.is_urgent(now) and batch:
            return -inf
        credit = job.cost + 2 * self._switch_s
        return max(self._standings[tenant].virtual_time + (urgent + batch) / weight, self._clock - credit / weight)

    def _add(self, tenant: str, is_urgent: bool, cost: float) -> None:
        key = tenant, is_urgent
        self._on_gangs[key] = self._on_gangs.get(key, 0.0) + cost
