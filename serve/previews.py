"""Previews of running jobs: drawn beside the steps, one of a job at a time, and shown to the job's owner."""

import asyncio
import logging

from serve.attempt import Attempt
from serve.moderation import Moderation
from serve.stages import Previewed, Stages
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import JobStore
from serve.store.threads import StoreThreads

logger = logging.getLogger(__name__)


class Previews:
    """Draws and publishes them.

    Args:
        store: where a job's newest one is published.
        artifacts: where the file of a former one is removed.
        stages: the VAE draws.
        moderation: asked before one is published.
        db: how the store is called.
    """

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        stages: Stages,
        moderation: Moderation,
        db: StoreThreads,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._stages = stages
        self._moderation = moderation
        self._db = db
        self._tasks: set[asyncio.Task[None]] = set()

    def show(self, attempt: Attempt, preview: Previewed) -> None:
        """See ``serve.gangs.Show``."""
        if attempt.is_drawing:  # a VAE that is busy is given one at a time, and they are shown in order
            return
        attempt.is_drawing = True
        task = asyncio.create_task(self._draw(attempt, preview))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _draw(self, attempt: Attempt, preview: Previewed) -> None:
        job = attempt.job
        try:
            key = await self._stages.preview(job, preview.step, preview.latents)
            await self._moderation.check_result(job, {"preview": key}, self._artifacts)
            published = await self._db(self._store.preview, job.id, job.attempt, preview.step, key)
            unneeded, attempt.preview_key = (attempt.preview_key, key) if published else (key, attempt.preview_key)
            if unneeded is not None:
                await asyncio.to_thread(self._artifacts.delete, unneeded)
        except Exception as error:  # noqa: BLE001 - a video is worth more than its previews
            logger.warning("job %s: no preview after step %d: %s", job.id, preview.step, type(error).__name__)
        finally:
            attempt.is_drawing = False
