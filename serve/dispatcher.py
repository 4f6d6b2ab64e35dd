"""The dispatcher: takes jobs from the store and drives each through its stages.

Everything it knows of a job is in the store, so it may die at any moment: the next dispatcher takes
over what it held when the lease runs out. It never sees a tensor, only references.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from pusa_dist.errors import GangError, NumericsError, PusaError, RequestError
from serve.policy.order import Waiting, in_order
from serve.stages import Finished, GangUnavailableError, ReplicaLostError, Stages, TensorRef
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Artifact, Job, JobStore, Stage

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.1
LEASE_S = 10.0
REPLACEMENT_S = 3.0
GANG_POLL_S = 0.5
MAX_GANG_DEATHS = 2
"""A job that was on a gang this many times when it died is failed."""
MAX_ATTEMPTS = 6
"""A job whose processes were lost this many times, for whatever reason, is failed."""
_QUEUE_PAGE = 200


class Metrics(Protocol):
    """Where outcomes and durations are reported; see ``serve.metrics.JobMetrics``."""

    def ended(self, outcome: str, seconds: float) -> None: ...  # noqa: D102
    def requeued(self, reason: str) -> None: ...  # noqa: D102
    def stage(self, stage: str, seconds: float) -> None: ...  # noqa: D102
    def depth(self, counts: Any) -> None: ...  # noqa: D102


@dataclass(slots=True, eq=False)
class _Attempt:
    """One job in the dispatcher's hands."""

    job: Job
    stage: Stage = "text"
    step: int = 0
    is_reported: bool = False
    """Whether the store knows this stage and step."""
    seconds: dict[str, float] = field(default_factory=dict)
    stop: Literal["cancelled", "stale"] | None = None
    """Why it is being stopped: its owner asked, or another attempt has taken over."""
    is_over: bool = False
    """Its stages have ended; what is left is to write how, and no request to stop may interrupt that."""
    task: "asyncio.Task[None] | None" = None


class Dispatcher:
    """Drives up to ``window`` jobs at once.

    Args:
        store: jobs.
        artifacts: where an attempt that published nothing leaves no files.
        stages: the rest of the cluster.
        metrics: where outcomes are reported.
        window: jobs in flight; more than the gangs hold, so that text and VAE work overlaps denoising.
        precision: what the denoiser computes in, recorded with every job.
        job_deadline_s: a job not finished this long after it was created is failed.
        lease_s: another dispatcher takes over this long after this one has died.
        replacement_s: how long a job waits after a process of it was lost, so that Ray Serve has noticed
            and the next attempt does not go to the same dead replica.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        stages: Stages,
        metrics: Metrics,
        *,
        window: int,
        precision: str,
        job_deadline_s: float,
        lease_s: float = LEASE_S,
        replacement_s: float = REPLACEMENT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._stages = stages
        self._metrics = metrics
        self._window = window
        self._precision = precision
        self._job_deadline_s = job_deadline_s
        self._lease_s = lease_s
        self._replacement_s = replacement_s
        self._clock = clock
        self._owner = secrets.token_hex(8)
        self._attempts: dict[str, _Attempt] = {}
        self._database = ThreadPoolExecutor(1, "database")
        self._is_closing = False
        self._looping = asyncio.Lock()

    async def run(self) -> None:
        """Take and drive jobs until ``close``; a store that cannot be reached is retried for ever."""
        async with self._looping:
            await self._loop()

    async def _loop(self) -> None:
        next_lease = next_depth = 0.0
        while not self._is_closing:
            try:
                if time.monotonic() >= next_lease:
                    await self._keep_leases()
                    next_lease = time.monotonic() + self._lease_s / 5
                await self._poll()
                if time.monotonic() >= next_depth:
                    self._metrics.depth(await self._db(self._store.counts))
                    next_depth = time.monotonic() + 1.0
            except Exception:  # the outermost loop: the store may be back the next time
                logger.exception("the dispatcher could not reach its store")
                await asyncio.sleep(1.0)
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Stop, and give every job in hand back to the queue."""
        self._is_closing = True
        async with self._looping:  # the loop has ended: no job is taken any more
            await self._give_back()
        self._database.shutdown()

    async def _give_back(self) -> None:
        attempts = list(self._attempts.values())
        for attempt in attempts:
            if attempt.task is not None:
                attempt.task.cancel()
        await asyncio.gather(*(one.task for one in attempts if one.task is not None), return_exceptions=True)
        for attempt in attempts:
            await self._db(self._store.requeue, attempt.job.id, attempt.job.attempt, False)

    async def _keep_leases(self) -> None:
        # Only what is in hand: a job whose end could not be written has nobody who drives it.
        await self._db(self._store.renew, self._owner, list(self._attempts), self._lease_s)
        for job_id in await self._db(self._store.requeue_expired, self._clock()):
            logger.warning("job %s: the lease of its dispatcher ran out; queued again", job_id)
            self._metrics.requeued("lease_expired")

    async def _poll(self) -> None:
        if self._attempts:
            for job_id in await self._db(self._store.cancel_requests, list(self._attempts)):
                self._stop(self._attempts.get(job_id), "cancelled")
            for attempt in list(self._attempts.values()):
                await self._report(attempt)
        if len(self._attempts) < self._window:
            await self._take()

    async def _take(self) -> None:
        queued = await self._db(self._store.queued, _QUEUE_PAGE)
        waiting = (Waiting(id=job.id, priority=job.priority, created_at=job.created_at) for job in queued)
        # An overdue job ends as soon as it is claimed: more urgent ones must not keep it waiting for ever.
        overdue = [job.id for job in queued if self._seconds_left(job) <= 0]
        for job_id in dict.fromkeys([*overdue, *in_order(waiting)]):
            if len(self._attempts) >= self._window:
                return
            # A job given back a moment ago is still ours until its attempt has ended here, too.
            if job_id in self._attempts:
                continue
            job = await self._db(self._store.claim, job_id, self._owner, self._lease_s)
            if job is not None:
                attempt = self._attempts[job_id] = _Attempt(job)
                attempt.task = asyncio.create_task(self._drive(attempt), name=job_id)

    async def _report(self, attempt: _Attempt) -> None:
        if attempt.is_reported or attempt.is_over or attempt.stop is not None:
            return
        attempt.is_reported = True
        job = attempt.job
        if not await self._db(
            self._store.progress, job.id, job.attempt, attempt.stage, attempt.step, job.request.num_inference_steps
        ):
            self._stop(attempt, "stale")

    def _stop(self, attempt: _Attempt | None, why: Literal["cancelled", "stale"]) -> None:
        if attempt is not None and attempt.stop is None and not attempt.is_over and attempt.task is not None:
            attempt.stop = why
            attempt.task.cancel()

    async def _drive(self, attempt: _Attempt) -> None:
        job = attempt.job
        try:
            outcome = await self._outcome(attempt)
            if outcome != "completed":
                await asyncio.to_thread(self._artifacts.delete, f"jobs/{job.id}/attempts/{job.attempt}")
            if outcome is not None:
                self._metrics.ended(outcome, self._clock() - job.created_at)
                logger.info("job %s: %s after attempt %d", job.id, outcome, job.attempt)
        except Exception:  # the store is gone, too: the lease runs out and the job is tried again
            logger.exception("job %s: the end of attempt %d could not be written", job.id, job.attempt)
        finally:
            self._attempts.pop(job.id, None)

    async def _outcome(self, attempt: _Attempt) -> str | None:
        """Run the job and write how it ended; None when it has not ended."""
        job = attempt.job
        deadline = asyncio.timeout(max(0.0, self._seconds_left(job)))
        try:
            async with deadline:
                try:
                    results = await self._run_stages(attempt)
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
        finished = await self._db(self._store.complete, job.id, job.attempt, results, attempt.seconds)
        return "completed" if finished else await self._stopped(attempt)

    def _seconds_left(self, job: Job) -> float:
        return job.created_at + self._job_deadline_s - self._clock()

    async def _run_stages(self, attempt: _Attempt) -> dict[str, Artifact]:
        job, stages = attempt.job, self._stages
        await self._db(self._store.record_precision, job.id, job.attempt, self._precision)
        with self._stage(attempt, "text"):
            context, negative = await self._embed(job)
        given = None
        if job.request.conditioning:
            with self._stage(attempt, "encode"):
                given = await stages.encode(job)
        with self._stage(attempt, "denoise"):
            latents = await self._denoise(attempt, context, negative, given)
        with self._stage(attempt, "decode"):
            return await stages.decode(job, latents)

    async def _embed(self, job: Job) -> tuple[TensorRef, TensorRef | None]:
        if not job.request.uses_guidance:
            return await self._stages.embed(job.request.prompt), None
        context, negative = await asyncio.gather(
            self._stages.embed(job.request.prompt), self._stages.embed(job.request.negative_prompt)
        )
        return context, negative

    async def _denoise(
        self, attempt: _Attempt, context: TensorRef, negative: TensorRef | None, given: TensorRef | None
    ) -> TensorRef:
        job = attempt.job
        while True:
            messages = self._stages.denoise(job.id, job.request, context, negative, given)
            try:
                async with aclosing(messages):
                    async for message in messages:
                        if isinstance(message, Finished):
                            return message.latents
                        attempt.step, attempt.is_reported = message.step, False
                raise ReplicaLostError("the denoiser ended its stream without a result")
            except GangUnavailableError:
                await asyncio.sleep(GANG_POLL_S)  # nothing of the job ran there; its replacement is on the way

    @contextmanager
    def _stage(self, attempt: _Attempt, stage: Stage) -> Any:
        attempt.stage, attempt.is_reported = stage, False
        started = time.perf_counter()
        try:
            yield
        finally:
            attempt.seconds[stage] = time.perf_counter() - started
            self._metrics.stage(stage, attempt.seconds[stage])

    async def _stopped(self, attempt: _Attempt) -> str | None:
        job = attempt.job
        # False: the row is deleted, or another attempt has it; either way nothing is left to write.
        written = await self._db(self._store.cancelled, job.id, job.attempt) if attempt.stop == "cancelled" else False
        return "cancelled" if written or attempt.stop == "cancelled" else None

    async def _ended_by(self, attempt: _Attempt, error: Exception) -> str | None:
        job = attempt.job
        if isinstance(error, GangError):
            if job.gang_deaths + 1 >= MAX_GANG_DEATHS:
                message = f"the gang that held the job was lost {MAX_GANG_DEATHS} times, last: {error}"
                return await self._failed(job, "gang_died_twice", message)
            await self._again(job, "gang_lost", error, gang_died=True)
            return None
        if isinstance(error, ReplicaLostError) and job.attempt < MAX_ATTEMPTS:
            await asyncio.sleep(self._replacement_s)
            await self._again(job, "replica_lost", error, gang_died=False)
            return None
        if isinstance(error, ReplicaLostError):
            return await self._failed(
                job, "replica_lost", f"processes were lost in {job.attempt} attempts, last: {error}"
            )
        if isinstance(error, NumericsError):
            return await self._failed(job, "numerics_error", str(error))
        if isinstance(error, RequestError):
            return await self._failed(job, error.code, error.message)
        logger.error("job %s: internal error in stage %s", job.id, attempt.stage, exc_info=error)
        return await self._failed(
            job, "internal_error", "the service failed in a way it should not; the operator has the log"
        )

    async def _again(self, job: Job, reason: str, error: PusaError, *, gang_died: bool) -> None:
        logger.warning("job %s: attempt %d given up, queued again: %s", job.id, job.attempt, error)
        self._metrics.requeued(reason)
        await self._db(self._store.requeue, job.id, job.attempt, gang_died)

    async def _failed(self, job: Job, code: str, message: str) -> str | None:
        return code if await self._db(self._store.fail, job.id, job.attempt, code, message) else None

    async def _db(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, function, *arguments)
