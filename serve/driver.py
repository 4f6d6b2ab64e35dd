"""An attempt from its claim to its end: its stages, what an error means for its job, and what is written of that."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from pusa_dist.errors import CheckpointError, RequestError
from serve.attempt import Attempt, DecodeTurn, Denoise, run_stages
from serve.ending import MAX_ATTEMPTS, Again, Failed, ending, replica_lost
from serve.moderation import Moderation
from serve.patience import patiently
from serve.policy.priority import Priority
from serve.reports import Reports
from serve.stages import Stages
from serve.store.artifacts import ArtifactStore, unfinished_prefixes
from serve.store.jobs import Artifact, Job, JobStore
from serve.store.threads import StoreThreads
from serve.sweeper import remove_unneeded
from serve.traces import Traces

logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """Where outcomes and durations are reported; see ``serve.metrics.JobMetrics``."""

    def stage(self, stage: str, seconds: float) -> None: ...  # noqa: D102
    def ended(self, code: str, seconds: float, priority: Priority) -> None: ...  # noqa: D102
    def requeued(self, reason: str) -> None: ...  # noqa: D102


class Driver:
    """Drives attempts, any number at once.

    Args:
        store: of the jobs.
        artifacts: where an attempt that published nothing leaves no files.
        stages: text encoder and VAE.
        denoise: the gangs.
        decode_turn: see ``DecodeTurn``.
        reports: writes where an attempt stands.
        metrics: where outcomes are reported.
        moderation: asked before a result is published.
        traces: where spans of the stages go.
        db: how the store is called.
        precision: what the gangs compute in, recorded with every job.
        job_deadline_s: a job not finished this long after it was created is failed.
        replacement_s: how long a job waits after a process of it was lost.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        stages: Stages,
        denoise: Denoise,
        decode_turn: DecodeTurn,
        reports: Reports,
        metrics: Metrics,
        moderation: Moderation,
        traces: Traces,
        db: StoreThreads,
        *,
        precision: str,
        job_deadline_s: float,
        replacement_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._stages = stages
        self._denoise = denoise
        self._decode_turn = decode_turn
        self._reports = reports
        self._metrics = metrics
        self._moderation = moderation
        self._traces = traces
        self._db = db
        self._precision = precision
        self._job_deadline_s = job_deadline_s
        self._replacement_s = replacement_s
        self._clock = clock

    async def drive(self, attempt: Attempt) -> None:
        """Take it through its stages, and write how it ended; a store that is gone leaves it to its lease."""
        job = attempt.job
        try:
            await self._ended(attempt, await self._outcome(attempt))
        except Exception:  # the job is tried again when its lease runs out
            logger.exception("job %s: the end of attempt %d could not be written", job.id, job.attempt)

    async def give_back(self, attempt: Attempt) -> None:
        """Put the job of an attempt that has been interrupted back in the queue."""
        if await self._requeued(attempt, gang_died=False) == "cancelled":
            await self._ended(attempt, "cancelled")

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
        await asyncio.to_thread(remove_unneeded, self._artifacts, job.id, *unneeded)

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
            attempt, self._stages, self._denoise, self._decode_turn, self._metrics.stage, self._traces
        )

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
        await patiently(lambda: self._reports.write(attempt))
        return await patiently(lambda: self._requeued(attempt, gang_died=gang_died))

    async def _requeued(self, attempt: Attempt, *, gang_died: bool) -> str | None:
        """Give the job back to the queue; "cancelled": its owner had asked for that, and it has ended instead."""
        status = await self._db(self._store.requeue, attempt.job.id, attempt.job.attempt, gang_died)
        return status if status == "cancelled" else None

    async def _failed(self, job: Job, code: str, message: str) -> str | None:
        """Give the job up, however long that cannot be written: tried again, it would take another gang with it."""
        written = await patiently(lambda: self._db(self._store.fail, job.id, job.attempt, code, message))
        return code if written else None
