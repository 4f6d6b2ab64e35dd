"""The dispatcher: takes jobs from the store in fair order, has each driven through its stages, and keeps the leases.

Everything it knows of a job is in the store, so it may die at any moment: the next dispatcher takes
over what it held when the lease runs out, and goes on from its checkpoints. It never sees a tensor,
only references. Any number of dispatchers may share a store: each job is claimed by one.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol

from serve.attempt import Attempt
from serve.driver import Driver
from serve.driver import Metrics as DriverMetrics
from serve.fair_turns import FairTurns
from serve.gangs import Gangs
from serve.gangs import Metrics as GangsMetrics
from serve.ledger import Ledger
from serve.logs import about
from serve.moderation import NO_MODERATION, Moderation
from serve.policy.admission import Held, Queued, claims
from serve.policy.cost import Backlog
from serve.policy.demand import NOTHING, Demand, runnable
from serve.policy.fairness import Turn, Waiting
from serve.policy.priority import Priority, is_urgent
from serve.previews import Previews
from serve.reports import Metrics as ReportsMetrics
from serve.reports import Reports
from serve.stages import GangHandle, Stages
from serve.store.artifacts import ArtifactStore, unfinished_prefixes
from serve.store.attempts import UnreadableJobError
from serve.store.jobs import Job, JobStore
from serve.store.threads import StoreThreads
from serve.sweeper import remove_unneeded
from serve.traces import NO_TRACES, Traces
from serve.watched import StuckError

logger = logging.getLogger(__name__)

POLL_S = 0.1
LEASE_S = 10.0
REPLACEMENT_S = 3.0
_MAX_PER_TENANT = 32
"""Jobs of a tenant and class that are looked at when some are claimed."""
_DB_SHARE = 0.2
"""Of the time is spent on looking at the queue, at most: a long look is followed by a longer pause."""
STUCK_AFTER_S = 180.0
"""A round that takes longer never ends: a database that does not answer has ended it long before."""


class Metrics(GangsMetrics, DriverMetrics, ReportsMetrics, Protocol):
    """Where waits and the state of queue and gangs are reported; see ``serve.metrics.JobMetrics``."""

    def waited(self, seconds: float, priority: Priority, weight: float) -> None: ...  # noqa: D102
    def gangs(self, states: Mapping[str, int], num_free: int) -> None: ...  # noqa: D102
    def round(self, backlog: Iterable[Backlog], weight_of: Callable[[str], float]) -> None: ...  # noqa: D102


class Dispatcher:
    """Drives jobs of one model.

    Args:
        store: jobs.
        artifacts: where an attempt that published nothing leaves no files.
        stages: text encoder and VAE; gangs register.
        metrics: where outcomes are reported.
        model: name of the model that the gangs hold.
        precision: what they compute in, recorded with every job.
        job_deadline_s: a job not finished this long after it was created is failed, of whatever model it is.
        moderation: asked before a preview or a result is published.
        num_decoders: jobs that the VAE is given at once.
        max_decoding: while this many are with the VAE or wait for it, only tenants that have none there get jobs taken.
        lease_s: another dispatcher takes over this long after this one has died.
        replacement_s: how long a job waits after a process of it was lost, so that Ray Serve has noticed
            and the next attempt does not go to the same dead replica.
        handover_s: how long ``close`` waits for the gangs to hand over what they hold.
        traces: where spans of the stages go.
        clock: Unix seconds.

    Attributes:
        demand: what gangs are needed for, a second ago: queued jobs that may run, and those in hand before the VAE.
    """

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        stages: Stages,
        metrics: Metrics,
        *,
        model: str,
        precision: str,
        job_deadline_s: float,
        moderation: Moderation = NO_MODERATION,
        num_decoders: int = 2,
        max_decoding: int = 8,
        lease_s: float = LEASE_S,
        replacement_s: float = REPLACEMENT_S,
        handover_s: float = 120.0,
        traces: Traces = NO_TRACES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._metrics = metrics
        self._model = model
        self._job_deadline_s = job_deadline_s
        self._decoding = FairTurns(num_decoders)
        self._max_decoding = max_decoding
        self._lease_s = lease_s
        self._handover_s = handover_s
        self._traces = traces
        self._clock = clock
        self._owner = secrets.token_hex(8)
        self._ledger = Ledger(store, model, clock)
        self._db = StoreThreads()
        self._reports = Reports(store, artifacts, metrics, self._db)
        previews = Previews(store, artifacts, stages, moderation, self._db)
        self._gangs = Gangs(self._owner, self._ledger, metrics, self._reports.publish, previews.show, clock)
        self._driver = Driver(
            store,
            artifacts,
            stages,
            self._gangs.denoise,
            self._decode_turn,
            self._reports,
            metrics,
            moderation,
            traces,
            self._db,
            precision=precision,
            job_deadline_s=job_deadline_s,
            replacement_s=replacement_s,
            clock=clock,
        )
        self._attempts: dict[str, Attempt] = {}
        self._unreadable = set[str]()
        """Queued jobs that another version of the service may have made."""
        self._started_at, self._began = time.time(), time.monotonic()
        self.demand = NOTHING
        self._is_closing = False
        self._looping = asyncio.Lock()
        self._round_at: float | None = None
        """When the loop began what it is at; None: there is none yet."""

    def register(self, name: str, gang: GangHandle, max_resident: int) -> None:
        """A gang is there, and may be given jobs; said again and again as long as it is."""
        self._gangs.register(name, gang, max_resident)

    def check(self) -> None:
        """Raise if the loop stands still.

        Raises:
            StuckError: it does; the process has to be replaced, its jobs are taken over when their leases end.
        """
        if self._round_at is None or self._is_closing:
            return
        if time.monotonic() - self._round_at > STUCK_AFTER_S:
            raise StuckError(f"the dispatcher's loop has stood still for more than {STUCK_AFTER_S:g} s")

    def resize_decoders(self, num_decoders: int) -> None:
        """The VAE can be given more jobs at once, or fewer."""
        self._decoding.resize(num_decoders, self._clock())

    def _demand(self, queued: Sequence[Backlog]) -> Demand:
        in_hand = [one for one in self._attempts.values() if one.stage != "decode"]
        left_s = sum(one.cost for one in queued) + sum(self._ledger.cost_left(one.job, one.step) for one in in_hand)
        whole_s = sum(one.whole for one in queued) + sum(self._ledger.cost_left(one.job, 0) for one in in_hand)
        num_jobs = sum(one.num for one in queued) + len(in_hand)
        return Demand(
            started_at=self._started_at,
            age_s=time.monotonic() - self._began,
            num_jobs=num_jobs,
            backlog_s=left_s,
            job_s=whole_s / num_jobs if num_jobs else 0.0,
            asked_s=self._ledger.delivered_s + left_s,
        )

    async def run(self) -> None:
        """Take and drive jobs until ``close``; a store that cannot be reached is retried for ever."""
        async with self._looping:
            arranging = asyncio.create_task(self._gangs.run())
            try:
                await self._loop(arranging)
            finally:
                arranging.cancel()

    async def _loop(self, arranging: "asyncio.Task[None]") -> None:
        next_lease = next_second = next_look = 0.0
        is_ready = False
        while not self._is_closing:
            self._round_at = time.monotonic()
            if arranging.done():
                arranging.result()  # a bug: the process is replaced
            try:
                if not is_ready:
                    await self._db(self._ledger.read)
                    is_ready = True
                if time.monotonic() >= next_lease:
                    await self._keep_leases()
                    next_lease = time.monotonic() + self._lease_s / 5
                if time.monotonic() >= next_second:
                    await self._every_second()
                    next_second = time.monotonic() + 1.0
                await self._report_and_stop()
                if time.monotonic() >= next_look:
                    began = time.monotonic()
                    await self._take()
                    next_look = time.monotonic() + (time.monotonic() - began) / _DB_SHARE
            except Exception:  # the outermost loop: the store may be back the next time
                logger.exception("the dispatcher could not reach its store")
                await asyncio.sleep(1.0)
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Stop, and give every job in hand back to the queue, where it stands."""
        self._is_closing = True
        async with self._looping:  # the loop has ended: no job is taken any more
            leases = asyncio.create_task(self._keep_leases_until_cancelled())
            await self._gangs.close(self._handover_s)
            await self._give_back()
            leases.cancel()
            await asyncio.gather(leases, return_exceptions=True)
            await self._if_possible(self._ledger.flush(self._db))
        self._db.close()

    async def _give_back(self) -> None:
        # What is being decoded has nothing left to hand over: it is quicker to let it end.
        decoding = [one.task for one in self._attempts.values() if one.stage == "decode" and one.task is not None]
        if decoding:
            await asyncio.wait(decoding, timeout=self._handover_s)
        attempts = list(self._attempts.values())
        for attempt in attempts:
            if attempt.task is not None:
                attempt.task.cancel()
        await asyncio.gather(*(one.task for one in attempts if one.task is not None), return_exceptions=True)
        for attempt in attempts:
            await self._if_possible(self._reports.write(attempt))
            await self._if_possible(self._driver.give_back(attempt))

    async def _keep_leases_until_cancelled(self) -> None:
        while True:
            await self._if_possible(self._db(self._store.renew, self._owner, list(self._attempts), self._lease_s))
            await asyncio.sleep(self._lease_s / 5)

    async def _if_possible(self, write: Awaitable[object]) -> None:
        try:
            await write
        except Exception:  # one of the last things that are written: those that follow may work
            logger.exception("the dispatcher could not reach its store while it closed")

    async def _keep_leases(self) -> None:
        # Only what is in hand: a job whose end could not be written has nobody who drives it.
        await self._db(self._store.renew, self._owner, list(self._attempts), self._lease_s)
        for job_id, status in (await self._db(self._store.requeue_expired, self._clock())).items():
            logger.warning("job %s: the lease of its dispatcher ran out; %s", job_id, status)
            if status == "cancelled":
                # Not waited for: a bucket that does not answer must cost nobody his lease.
                asyncio.get_running_loop().run_in_executor(
                    None, remove_unneeded, self._artifacts, job_id, *unfinished_prefixes(job_id)
                )
            else:
                self._metrics.requeued("lease_expired")

    async def _every_second(self) -> None:
        await self._ledger.flush(self._db)
        # Nothing is claimed meanwhile, so no job is counted twice.
        room = await self._db(self._store.room)
        backlog = await self._db(self._store.backlog, self._model)
        self.demand = self._demand(runnable((one for one in backlog if one.status == "queued"), room))
        self._metrics.round(backlog, lambda tenant: self._ledger.standing(tenant).weight)
        self._metrics.gangs(self._gangs.states, self._gangs.num_free)

    async def _report_and_stop(self) -> None:
        if not self._attempts:
            return
        for job_id in await self._db(self._store.cancel_requests, list(self._attempts)):
            if job_id in self._attempts:
                self._attempts[job_id].interrupt("cancelled")
        await asyncio.gather(*(self._reports.write_if_new(attempt) for attempt in list(self._attempts.values())))

    async def _take(self) -> None:
        decoding = [one.job.tenant for one in self._attempts.values() if one.stage == "decode"]
        held_up = set(decoding) if len(decoding) >= self._max_decoding else set()
        window = self._gangs.num_free + 1
        limit = min(window + 1, _MAX_PER_TENANT)
        room = await self._db(self._store.room)
        waiting = await self._db(self._store.waiting, self._model, limit, list(self._unreadable))
        queued = {one.id: one for one in waiting}
        if not all(self._ledger.knows(one.tenant) for one in queued.values()):
            await self._ledger.flush(self._db)
        turns = [turn for turn in self._turns(queued.values()) if turn.job_id in queued]
        # Whoever may claim nothing must not hold the clock back: others would be lifted no further than that.
        turns = [turn for turn in turns if turn.tenant not in held_up and room.get(turn.tenant, 1) > 0]
        first = {turn.tenant: turn for turn in reversed(turns)}
        self._gangs.note_queue(list(first.values()))
        # An overdue job ends as soon as it is claimed: more urgent ones must not keep it waiting for ever, nor that
        # nobody serves its model.
        overdue = await self._db(self._store.overdue, self._clock() - self._job_deadline_s, _MAX_PER_TENANT)
        chosen = claims(
            (self._queued(queued[turn.job_id]) for turn in turns),
            (self._held(attempt) for attempt in self._attempts.values()),
            window=window,
            room=room,
        )
        for job_id in dict.fromkeys([*overdue, *chosen]):
            # A job given back a moment ago is still ours until its attempt has ended here, too.
            if job_id in self._attempts:
                continue
            job = await self._claimed(job_id, is_overdue=job_id in overdue)
            if job is not None:
                if job.attempt == 1:
                    weight = self._ledger.standing(job.tenant).weight
                    now = self._clock()
                    self._metrics.waited(now - job.created_at, job.priority, weight)
                    self._traces.past("queued", job.traceparent, job.created_at, now)
                attempt = self._attempts[job_id] = Attempt(job)
                with about(job=job_id, tenant=job.tenant):
                    attempt.task = asyncio.create_task(self._drive(attempt), name=job_id)

    async def _claimed(self, job_id: str, *, is_overdue: bool) -> Job | None:
        claim = partial(self._store.claim, to_fail=is_overdue)
        try:
            return await self._db(claim, job_id, self._owner, self._lease_s)
        except UnreadableJobError as error:
            # Not the cause's own words: they may quote the prompt.
            logger.error("job %s: its row cannot be read: %s", job_id, type(error.__cause__).__name__)
            self._unreadable.add(job_id)  # another version of the service, on the same store, may read it
            message = "the service cannot read this job any more; send it again"
            if is_overdue and await self._db(self._store.fail, job_id, error.attempt, "unreadable_job", message):
                self._metrics.ended("unreadable_job", self._clock() - error.created_at, error.priority)
                self._unreadable.discard(job_id)
            return None

    def _turns(self, queued: Iterable[Waiting]) -> list[Turn]:
        """The order of all that waits, ready or not."""
        preparing = [self._waiting(one.job) for one in self._attempts.values() if one.stage in ("text", "encode")]
        # A job given back a moment ago may be both queued and still in hand.
        return self._gangs.turns({one.id: one for one in (*preparing, *queued)}.values())

    def _waiting(self, job: Job) -> Waiting:
        cost = self._ledger.cost_left(job, 0)
        return Waiting(id=job.id, tenant=job.tenant, priority=job.priority, created_at=job.created_at, cost=cost)

    def _queued(self, one: Waiting) -> Queued:
        urgent = is_urgent(one.priority, one.created_at, self._clock())
        return Queued(id=one.id, tenant=one.tenant, is_urgent=urgent)

    def _held(self, attempt: Attempt) -> Held:
        is_ahead = attempt.stage != "decode" and not self._gangs.is_placed(attempt.job.id)
        urgent = is_urgent(attempt.job.priority, attempt.job.created_at, self._clock())
        return Held(tenant=attempt.job.tenant, is_urgent=urgent, is_ahead=is_ahead)

    async def _drive(self, attempt: Attempt) -> None:
        try:
            await self._driver.drive(attempt)
        finally:
            self._attempts.pop(attempt.job.id, None)

    def _decode_turn(self, job: Job) -> AbstractAsyncContextManager[None]:
        """See ``serve.attempt.DecodeTurn``; what a decode costs grows with the tokens."""
        cost = float(job.request.num_tokens)
        waiting = Waiting(id=job.id, tenant=job.tenant, priority=job.priority, created_at=job.created_at, cost=cost)
        return self._decoding.turn(waiting, self._ledger.standing(job.tenant).weight, self._clock())
