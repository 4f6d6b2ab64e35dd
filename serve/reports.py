"""What is written of an attempt as it goes on: where it stands, and its newest checkpoint.

Whoever finds that the job is another attempt's by now ends this one.
"""

import asyncio
from typing import Protocol

from serve.attempt import Attempt
from serve.patience import patiently
from serve.stages import Checkpoint
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import JobStore
from serve.store.threads import StoreThreads
from serve.sweeper import remove_unneeded


class Metrics(Protocol):
    """Where checkpoints are counted; see ``serve.metrics.JobMetrics``."""

    def checkpointed(self) -> None: ...  # noqa: D102


class Reports:
    """Writes them.

    Args:
        store: of the jobs.
        artifacts: where a former checkpoint is removed.
        metrics: told of every checkpoint.
        db: how the store is called.
    """

    def __init__(self, store: JobStore, artifacts: ArtifactStore, metrics: Metrics, db: StoreThreads) -> None:
        self._store = store
        self._artifacts = artifacts
        self._metrics = metrics
        self._db = db

    async def write_if_new(self, attempt: Attempt) -> None:
        """Write where it stands, unless that is written, or its stages have ended."""
        if not (attempt.is_reported or attempt.is_over or attempt.stop is not None):
            await self.write(attempt)

    async def write(self, attempt: Attempt) -> None:
        """Write where it stands."""
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
            attempt.interrupt("stale")

    async def publish(self, attempt: Attempt, checkpoint: Checkpoint) -> bool:
        """See ``serve.gangs.Publish``."""
        job, former = attempt.job, attempt.checkpoint
        # Steps are counted before the next attempt may begin after them. The gang waits for an answer, if need be.
        await patiently(lambda: self.write_if_new(attempt))
        is_ours = await patiently(
            lambda: self._db(self._store.checkpoint, job.id, job.attempt, checkpoint.key, checkpoint.step)
        )
        if not is_ours:
            attempt.interrupt("stale")
            return False
        attempt.checkpoint = checkpoint
        self._metrics.checkpointed()
        if former is not None and former.key != checkpoint.key:
            await asyncio.to_thread(remove_unneeded, self._artifacts, job.id, former.key)
        return True
