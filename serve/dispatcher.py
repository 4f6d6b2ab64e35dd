"""The dispatcher: takes jobs from the store and drives each through its stages.

Everything it knows of a job is in the store, so it may die at any moment: the next dispatcher takes
over what it held when the lease runs out, and goes on from its checkpoints. It never sees a tensor,
only references. Any number of dispatchers may share a store: each job is claimed by one.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from pusa_dist.errors import CheckpointError, RequestError
from serve.attempt import Attempt, run_stages
from serve.ending import MAX_ATTEMPTS, Again, Failed, ending, replica_lost
from serve.fair_turns import FairTurns
from serve.gangs import Gangs
from serve.gangs import Metrics as GangsMetrics
from serve.ledger import Ledger
from serve.logs import about
from serve.moderation import NO_MODERATION, Moderation
from serve.patience import patiently
from serve.policy.admission import Held, Queued, claims
from serve.policy.cost import Backlog
from serve.policy.demand import NOTHING, Demand, runnable
from serve.policy.fairness import Turn, Waiting
from serve.policy.priority import Priority, is_urgent
from serve.previews import Previews
from serve.stages import Checkpoint, GangHandle, Stages
from serve.store.artifacts import ArtifactStore, StorageError, unfinished_prefixes
from serve.store.attempts import UnreadableJobError
from serve.store.jobs import Artifact, Job, JobStore
from serve.traces import NO_TRACES, Traces
from serve.watched import StuckError

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.1
LEASE_S = 10.0
REPLACEMENT_S = 3.0
_MAX_PER_TENANT = 32
"""Jobs of a tenant and class that are looked at when some are claimed."""
_DB_SHARE = 0.2
"""Of the time is spent on looking at the queue, at most: a long look is followed by a longer pause."""
_DB_THREADS = 4
STUCK_AFTER_S = 180.0
"""A round that takes longer never ends: a database that does not answer has ended it long before."""


class Metrics(GangsMetrics, Protocol):
    """Where outcomes and durations are reported; see ``serve.metrics.JobMetrics``."""

    def waited(self, seconds: float, priority: Priority, weight: float) -> None: ...  # noqa: D102
    def ended(self, code: str, seconds: float, priority: Priority) -> None: ...  # noqa: D102
    def requeued(self, reason: str) -> None: ...  # noqa: D102
    def gangs(self, states: Mapping[str, int], num_free: int) -> None: ...  # noqa: D102
    def checkpointed(self) -> None: ...  # noqa: D102
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
        self._stages = stages
        self._metrics = metrics
        self._model = model
        self._precision = precision
        self._job_deadline_s = job_deadline_s
        self._moderation = moderation
        self._decoding = FairTurns(num_decoders)
        self._max_decoding = max_decoding
        self._lease_s = lease_s
        self._replacement_s = replacement_s
        self._handover_s = handover_s
        self._traces = traces
        self._clock = clock
        self._owner = secrets.token_hex(8)
        self._ledger = Ledger(store, model, clock)
        previews = Previews(store, artifacts, stages, moderation, self._db)
        self._gangs = Gangs(self._owner, self._ledger, metrics, self._publish, previews.show, clock)
        self._attempts: dict[str, Attempt] = {}
        self._unreadable = set[str]()
        """Queued jobs that another version of the service may have made."""
        self._started_at, self._began = time.time(), time.monotonic()
        self.demand = NOTHING
        self._database = ThreadPoolExecutor(_DB_THREADS, "database")
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
        self._database.shutdown()

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
            await self._if_possible(self._write_progress(attempt))
            await self._if_possible(self._give_up(attempt))

    async def _give_up(self, attempt: Attempt) -> None:
        if await self._requeued(attempt, gang_died=False) == "cancelled":
            await self._ended(attempt, "cancelled")

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
                asyncio.get_running_loop().run_in_executor(None, self._remove, job_id, *unfinished_prefixes(job_id))
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
            self._stop(self._attempts.get(job_id), "cancelled")
        await asyncio.gather(*(self._report(attempt) for attempt in list(self._attempts.values())))

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

    async def _report(self, attempt: Attempt) -> None:
        if not (attempt.is_reported or attempt.is_over or attempt.stop is not None):
            await self._write_progress(attempt)

    async def _write_progress(self, attempt: Attempt) -> None:
        attempt.is_reported = True
        job = attempt.job
        try:
            is_ours = await self._db(
                self._store.progress, job.id, job.attempt, attempt.stage, attempt.step, job.request.num_inference_steps
            )
        except BaseException:
            attempt.is_reported = False
            raise
        if not is_ours:
            self._stop(attempt, "stale")

    def _stop(self, attempt: Attempt | None, why: Literal["cancelled", "stale"]) -> None:
        if attempt is not None and attempt.stop is None and not attempt.is_over and attempt.task is not None:
            attempt.stop = why
            attempt.task.cancel()

    async def _drive(self, attempt: Attempt) -> None:
        job = attempt.job
        try:
            await self._ended(attempt, await self._outcome(attempt))
        except Exception:  # the store is gone, too: the lease runs out and the job is tried again
            logger.exception("job %s: the end of attempt %d could not be written", job.id, job.attempt)
        finally:
            self._attempts.pop(job.id, None)

    async def _ended(self, attempt: Attempt, outcome: str | None) -> None:
        """Tell how the job has ended, if it has, and remove the files that nobody will need."""
        job = attempt.job
        attempts, checkpoints = unfinished_prefixes(job.id)
        if outcome is None:
            unneeded = [f"{attempts}/{job.attempt}"]
        else:
            self._metrics.ended(outcome, self._clock() - job.created_at, job.priority)
            logger.info("job %s: %s after attempt %d", job.id, outcome, job.attempt)
            unneeded = [checkpoints] if outcome == "completed" else [attempts, checkpoints]
        await asyncio.to_thread(self._remove, job.id, *unneeded)

    def _remove(self, job_id: str, *prefixes: str) -> None:
        for prefix in prefixes:
            try:
                self._artifacts.delete(prefix)
            except StorageError as error:  # the sweeper will, some time after the job has ended
                logger.warning("job %s: files that nobody needs cannot be removed now: %s", job_id, error)

    async def _outcome(self, attempt: Attempt) -> str | None:
        """Run the job and write how it ended; None when it has not ended."""
        job = attempt.job
        if job.attempt > MAX_ATTEMPTS:
            lost = replica_lost(MAX_ATTEMPTS)
            return await self._failed(job, lost.code, lost.message)
        deadline = asyncio.timeout(max(0.0, self._seconds_left(job.created_at)))
        try:
            async with deadline:
                try:
                    with self._traces.span(
                        "attempt", job.traceparent, job=job.id, tenant=job.tenant, number=job.attempt
                    ):
                        results = await self._run_stages(attempt)
                    keys = {variant: file.key for variant, file in results.items()}
                    await patiently(lambda: self._moderation.check_result(job, keys, self._artifacts))
                finally:
                    attempt.is_over = True
        except asyncio.CancelledError:
            if attempt.stop is None:  # the dispatcher is closing
                raise
            return await self._stopped(attempt)
        except Exception as error:  # noqa: BLE001 - the boundary of a job: every way it can fail gets a code here
            if deadline.expired():
                message = f"not finished within {self._job_deadline_s:g} s of its creation; try again later"
                return await self._failed(job, "deadline_exceeded", message)
            return await self._ended_by(attempt, error)
        finished = await patiently(lambda: self._complete(attempt, results))
        return "completed" if finished else await self._stopped(attempt)

    async def _complete(self, attempt: Attempt, results: Mapping[str, Artifact]) -> bool:
        job = attempt.job
        if await self._db(self._store.complete, job.id, job.attempt, results, attempt.seconds):
            return True
        # It may be complete because an earlier call worked, whose answer got lost.
        found = (await self._db(self._store.progress_of, [job.id])).get(job.id)
        return found is not None and (found.status, found.attempt) == ("completed", job.attempt)

    def _seconds_left(self, created_at: float) -> float:
        return created_at + self._job_deadline_s - self._clock()

    async def _run_stages(self, attempt: Attempt) -> dict[str, Artifact]:
        job = attempt.job
        await patiently(lambda: self._db(self._store.record_precision, job.id, job.attempt, self._precision))
        try:
            return await self._through_stages(attempt)
        except CheckpointError as error:
            if attempt.checkpoint is None:
                raise
            logger.warning("job %s: begins anew, its checkpoint cannot be used: %s", job.id, error)
        await patiently(lambda: self._db(self._store.forget_checkpoint, job.id, job.attempt))
        attempt.start_afresh()
        return await self._through_stages(attempt)

    async def _through_stages(self, attempt: Attempt) -> dict[str, Artifact]:
        return await run_stages(
            attempt, self._stages, self._gangs.denoise, self._decode_turn, self._metrics.stage, self._traces
        )

    def _decode_turn(self, job: Job) -> AbstractAsyncContextManager[None]:
        """See ``serve.attempt.DecodeTurn``; what a decode costs grows with the tokens."""
        cost = float(job.request.num_tokens)
        waiting = Waiting(id=job.id, tenant=job.tenant, priority=job.priority, created_at=job.created_at, cost=cost)
        return self._decoding.turn(waiting, self._ledger.standing(job.tenant).weight, self._clock())

    async def _publish(self, attempt: Attempt, checkpoint: Checkpoint) -> bool:
        """See ``serve.gangs.Publish``."""
        job, former = attempt.job, attempt.checkpoint
        # Steps are counted before the next attempt may begin after them. The gang waits for an answer, if need be.
        await patiently(lambda: self._report(attempt))
        written = self._store.checkpoint, job.id, job.attempt, checkpoint.key, checkpoint.step
        if not await patiently(lambda: self._db(*written)):
            self._stop(attempt, "stale")
            return False
        attempt.checkpoint = checkpoint
        self._metrics.checkpointed()
        if former is not None and former.key != checkpoint.key:
            await asyncio.to_thread(self._remove, job.id, former.key)
        return True

    async def _stopped(self, attempt: Attempt) -> str | None:
        if attempt.stop != "cancelled":
            return None
        job = attempt.job
        if await self._db(self._store.cancelled, job.id, job.attempt):
            return "cancelled"
        # Deleted, or another attempt has it, whose files are not this one's to remove.
        return None if await self._db(self._store.known, [job.id]) else "cancelled"

    async def _ended_by(self, attempt: Attempt, error: Exception) -> str | None:
        job = attempt.job
        match ending(job, error):
            case Again(reason, gang_died):
                if not gang_died:  # a lost gang takes no job while it is replaced, other replicas may
                    await asyncio.sleep(self._replacement_s)
                return await self._again(attempt, reason, error, gang_died=gang_died)
            case Failed(code, message):
                if not isinstance(error, RequestError):  # whose words, the owner's to read, may quote the prompt
                    logger.warning("job %s: %s in attempt %d: %s", job.id, code, job.attempt, error)
                return await self._failed(job, code, message)
        if await self._db(self._store.cancel_requests, [job.id]):
            # Deleted while a stage read its inputs, or wrote its files: whatever that led to is no failure.
            attempt.stop = "cancelled"
            return await self._stopped(attempt)
        logger.error("job %s: internal error in stage %s", job.id, attempt.stage, exc_info=error)
        return await self._failed(
            job, "internal_error", "the service failed in a way it should not; the operator has the log"
        )

    async def _again(self, attempt: Attempt, reason: str, error: Exception, *, gang_died: bool) -> str | None:
        job = attempt.job
        logger.warning("job %s: attempt %d given up, queued again: %s", job.id, job.attempt, error)
        self._metrics.requeued(reason)
        # Were this left to the lease, no lost gang would count against the job, and it would take more with it.
        await patiently(lambda: self._write_progress(attempt))
        return await patiently(lambda: self._requeued(attempt, gang_died=gang_died))

    async def _requeued(self, attempt: Attempt, *, gang_died: bool) -> str | None:
        """Give the job back to the queue; "cancelled": its owner had asked for that, and it has ended instead."""
        status = await self._db(self._store.requeue, attempt.job.id, attempt.job.attempt, gang_died)
        return status if status == "cancelled" else None

    async def _failed(self, job: Job, code: str, message: str) -> str | None:
        """Give the job up, however long that cannot be written: tried again, it would take another gang with it."""
        written = await patiently(lambda: self._db(self._store.fail, job.id, job.attempt, code, message))
        return code if written else None

    async def _db(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, function, *arguments)
