"""A job's server-sent events: a view over its row, so that any gateway tells them and any can go on.

Nothing is kept for a stream. The id of an event says where the job was (attempt, phase, step, newest
preview), and a client that comes back with it as ``Last-Event-ID`` is told what differs now. What
happened in between is superseded, not repeated: a step that is over needs no event of its own.
"""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from serve.http.views import Answer, VideoError, error_view
from serve.http.watch import Watch, Watcher
from serve.store.job import Job, JobProgress, Stage, Status

ENDS = ("completed", "failed", "cancelled", "deleted")
"""Names of the event after which a stream ends."""
KEEP_ALIVE_S = 15.0
_RECONNECT_MS = 2000
_IMAGE_TYPES = {".webp": "image/webp", ".jpg": "image/jpeg", ".png": "image/png"}


class ProgressEvent(Answer):
    """Data of ``progress``, and of the last event: ``completed``, ``failed`` or ``cancelled``."""

    id: str
    """Of the video."""
    state: Status
    """State of the job."""
    stage: Stage | None
    """What is being done for it, or was when it failed or was cancelled; None if it waits or is completed."""
    step: int
    """Denoising steps done."""
    num_steps: int
    """Denoising steps in all."""
    attempt: int
    """How often work on it was begun."""
    estimated_seconds_left: float | None
    """Of work on it, waiting not counted; None while steps like its own were never measured."""
    error: VideoError | None
    """Why it did not end well; None if it did, or has not ended."""


class PreviewEvent(Answer):
    """Data of ``preview``: what the video looks like so far."""

    id: str
    """Of the video."""
    step: int
    """Denoising steps that the picture was taken after."""
    image: str
    """A data URL."""


class DeletedEvent(Answer):
    """Data of ``deleted``: somebody removed the job."""

    id: str
    """Of the video that was removed."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a client is in the story of a job: what the ``id`` of an event spells."""

    attempt: int = 0
    phase: str = "none"
    """The stage of a job in progress, else its state."""
    step: int = 0
    preview_step: int = 0

    @classmethod
    def parse(cls, text: str | None) -> "Cursor":
        """Inverse of ``str``; what is no id of ours is a client that has seen nothing."""
        match = re.fullmatch(r"(\d{1,9})-([a-z_]{1,20})-(\d{1,9})-(\d{1,9})", text or "", re.ASCII)
        if match is None:
            return cls()
        attempt, phase, step, preview_step = match.groups()
        return cls(int(attempt), phase, int(step), int(preview_step))

    def __str__(self) -> str:
        return f"{self.attempt}-{self.phase}-{self.step}-{self.preview_step}"

    @property
    def is_end(self) -> bool:
        """Whether the client has seen the last event."""
        return self.phase in ENDS

    def at(self, job: JobProgress) -> "Cursor":
        """The client after it was told how far the job is."""
        phase = job.stage or "starting" if job.status == "in_progress" else job.status
        return replace(self, attempt=job.attempt, phase=phase, step=job.step)


class EventStream(Response):
    """The events of a job, from where the client was, to its end.

    Args:
        watch: of this gateway.
        tenant: whose job it is.
        job: as it is now.
        cursor: what the client has seen.
        seconds_left: estimates the work on a job that is this far; blocks.
        read: bytes of an artifact; blocks.
        is_allowed: whether the client still is the tenant; asked before anything more is told.
    """

    def __init__(
        self,
        watch: Watch[JobProgress],
        tenant: str,
        job: Job,
        cursor: Cursor,
        seconds_left: Callable[[JobProgress], float | None],
        read: Callable[[str], bytes],
        is_allowed: Callable[[], Awaitable[bool]],
    ) -> None:
        super().__init__()
        self._watch = watch
        self._tenant = tenant
        self._job = job
        self._cursor = cursor
        self._seconds_left = seconds_left
        self._read = read
        self._is_allowed = is_allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI); the place among the watchers is given back however the connection ends."""
        if self._cursor.is_end:
            await Response(status_code=204)(scope, receive, send)  # tells an EventSource not to come again
            return
        # A refusal is raised here, before anything is sent.
        with self._watch.watch(self._tenant, self._job.id) as watcher:
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            answer = StreamingResponse(self._events(watcher), 200, headers, "text/event-stream")
            await answer(scope, receive, send)

    async def _events(self, watcher: Watcher[JobProgress]) -> AsyncIterator[str]:
        yield f"retry: {_RECONNECT_MS}\n\n"
        job: JobProgress | None = self._job.progress
        while await self._is_allowed():
            if job is None:
                cursor = replace(self._cursor, phase="deleted")
                yield _event("deleted", cursor, DeletedEvent(id=self._job.id))
                return
            async for event in self._news(job):
                yield event
            if self._cursor.is_end:
                return
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        job = await watcher.next()
                    break
                except TimeoutError:
                    if not await self._is_allowed():
                        return
                    yield ": still here\n\n"

    async def _news(self, job: JobProgress) -> AsyncIterator[str]:
        """What the client has not been told; the preview first, because the other may be the last."""
        if job.preview_key is not None and job.preview_step not in (None, self._cursor.preview_step):
            self._cursor = replace(self._cursor, preview_step=job.preview_step)
            image = await asyncio.to_thread(self._image, job.preview_key)
            if image is not None:
                yield _event("preview", self._cursor, PreviewEvent(id=job.id, step=job.preview_step, image=image))
        now = self._cursor.at(job)
        if now != self._cursor:
            self._cursor = now
            name = job.status if job.status in ENDS else "progress"
            facts = ProgressEvent(
                id=job.id,
                state=job.status,
                stage=job.stage,
                step=job.step,
                num_steps=job.num_steps,
                attempt=job.attempt,
                estimated_seconds_left=await asyncio.to_thread(self._seconds_left, job),
                error=error_view(job.status, job.error_code, job.error_message),
            )
            yield _event(name, self._cursor, facts)

    def _image(self, key: str) -> str | None:
        try:
            data = self._read(key)
        except FileNotFoundError:  # a newer one has taken its place, or the job is deleted
            return None
        return f"data:{_IMAGE_TYPES[PurePosixPath(key).suffix]};base64,{base64.b64encode(data).decode()}"


def _event(name: str, cursor: Cursor, data: BaseModel) -> str:
    return f"id: {cursor}\nevent: {name}\ndata: {data.model_dump_json()}\n\n"
