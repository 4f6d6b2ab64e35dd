"""Turns at something that only a few jobs can have at once, fair over tenants as the gangs are.

The VAE is such a thing: where it takes the jobs of a backlog in the order in which they come, a tenant
with one job waits for all of them there, however soon a gang had it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serve.policy.fairness import Standing, Waiting, in_order


class FairTurns:
    """At most ``num_places`` jobs at once; who waits goes first by weighted fair share of cost, then class, then age.

    Start-time fair queueing, as ``serve.policy.fairness`` has it; what was delivered is forgotten with the process.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = self._num_free = num_places
        self._waiting: dict[str, tuple[Waiting, asyncio.Event]] = {}
        self._standings: dict[str, Standing] = {}
        self._clock = 0.0
        """Start tag of the last that had its turn: how far service has come."""

    @asynccontextmanager
    async def turn(self, job: Waiting, weight: float, now: float) -> AsyncIterator[None]:
        """Wait for a place, and have it as long as the block lasts.

        Args:
            job: its cost in any unit that is the same for all.
            weight: of its tenant.
            now: Unix seconds.
        """
        before = self._standings.get(job.tenant)
        self._standings[job.tenant] = Standing(weight=weight, virtual_time=before.virtual_time if before else 0.0)
        given = asyncio.Event()
        self._waiting[job.id] = job, given
        self._give(now)
        try:
            await given.wait()
            yield
        finally:
            self._waiting.pop(job.id, None)
            self._num_free += given.is_set()
            self._give(now)

    def resize(self, num_places: int, now: float) -> None:
        """There are more places, or fewer: who has a place keeps it."""
        self._num_free += num_places - self._num_places
        self._num_places = num_places
        self._give(now)

    def _give(self, now: float) -> None:
        while self._num_free > 0 and self._waiting:
            jobs = [job for job, _ in self._waiting.values()]
            turn = next(in_order(jobs, self._standings, clock=self._clock, now=now))
            job, given = self._waiting.pop(turn.job_id)
            weight = self._standings[job.tenant].weight
            self._standings[job.tenant] = Standing(weight=weight, virtual_time=turn.virtual_time + job.cost / weight)
            self._clock = max(self._clock, turn.virtual_time)
            self._num_free -= 1
            given.set()
