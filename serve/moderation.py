"""The operator's say over what is made: one callable, asked before a job is accepted and before a result is published.

Off unless the configuration names one (``moderation: package.module:function``). It is given a
``Submission`` or a ``Finished``, and answers with None, or with the reason for a refusal, which the
tenant reads. A callable that fails lets nothing pass, nor does one that does not answer in time. It runs on threads
of its own: those that it keeps are missed by nobody else.
"""

import asyncio
import errno
import importlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from threading import BoundedSemaphore, Event

from pusa_dist.errors import ConfigError, RequestError
from pusa_dist.request import GenerationRequest
from serve.store.artifacts import ArtifactStore, StorageError
from serve.store.jobs import Job

logger = logging.getLogger(__name__)

REFUSED = "moderation_refused"
UNAVAILABLE = "moderation_unavailable"
TIMEOUT_S = 30.0
_NUM_THREADS = 24
"""Of the hook. Each order that is judged holds one of the 40 threads that answer requests, too: some are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a tenant asks for, validated and not stored yet."""

    tenant: str
    request: GenerationRequest
    inputs: tuple[bytes, ...]
    """Uploaded images and clips, as they came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A result, or a preview of one, that nobody has seen yet."""

    tenant: str
    job_id: str
    request: GenerationRequest
    variants: frozenset[str]
    """What there is: ``preview`` while the job runs; then video, thumbnail, spritesheet, frames."""
    read: Callable[[str], bytes]
    """The bytes of one of ``variants``; only what is asked for is fetched."""


Hook = Callable[[Submission | Finished], str | None]
"""Answers None, or why not. Called from worker threads, several at once; it may block, for
no longer than the configuration's ``moderation_timeout_s``."""
OnVerdict = Callable[[str, str], None]
"""Told of what was judged (``request``, ``video``) and how it went (``passed``, ``refused``, ``failed``)."""


class ModerationUnavailableError(Exception):
    """The hook failed, or was late, so nobody knows whether this may pass."""


class Moderation:
    """Asks the hook, if there is one.

    Args:
        hook: to ask; None: everything passes.
        on_verdict: told of every answer.
        timeout_s: for how long an answer is waited for.
    """

    def __init__(self, hook: Hook | None, on_verdict: OnVerdict | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._hook = hook
        self._on_verdict = on_verdict
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "moderation")
        self._free = BoundedSemaphore(_NUM_THREADS)
        """For orders, none of which waits for a thread."""

    @classmethod
    def load(
        cls, import_string: str | None, on_verdict: OnVerdict | None = None, timeout_s: float = TIMEOUT_S
    ) -> "Moderation":
        """The hook of a configuration; None: everything passes.

        Raises:
            ConfigError: there is no such callable.
        """
        if import_string is None:
            return cls(None)
        module, _, name = import_string.partition(":")
        try:
            hook = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"moderation={import_string}: {error}; write 'package.module:function'") from error
        if not callable(hook):
            raise ConfigError(f"moderation={import_string} cannot be called; name a function")
        return cls(hook, on_verdict, timeout_s)

    def check_submission(self, tenant: str, request: GenerationRequest, inputs: Sequence[bytes]) -> None:
        """Before a job is accepted; blocks.

        Raises:
            RequestError: it is refused.
            ModerationUnavailableError: the hook failed, is late, or keeps all its threads.
        """
        if self._hook is None:
            return
        if not self._free.acquire(blocking=False):
            raise self._unavailable("request", f"keeps all its {_NUM_THREADS} threads")
        asked = self._ask(self._hook, Submission(tenant=tenant, request=request, inputs=tuple(inputs)))
        asked.add_done_callback(lambda _: self._free.release())
        try:
            reason = asked.result(self._timeout_s)
        except Exception as error:  # noqa: BLE001 - the operator's code: whatever it raises, nothing passes
            raise self._unavailable("request", self._outline(error, asked)) from None
        self._judge("request", reason)

    async def check_result(self, job: Job, keys: dict[str, str], artifacts: ArtifactStore) -> None:
        """Before a result is published.

        Args:
            job: whose result it is.
            keys: of its files in the artifact store, by content variant.
            artifacts: where they are.

        Raises:
            RequestError: it is refused.
            ModerationUnavailableError: the hook failed, or is late.
            StorageError: it could not read the result.
        """
        if self._hook is None:
            return
        is_reading = Event()

        def read(variant: str) -> bytes:
            is_reading.set()
            try:
                return artifacts.read(keys[variant])
            finally:
                is_reading.clear()

        finished = Finished(tenant=job.tenant, job_id=job.id, request=job.request, variants=frozenset(keys), read=read)
        asked = self._ask(self._hook, finished)
        try:
            async with asyncio.timeout(self._timeout_s):
                reason = await asyncio.wrap_future(asked)
        except StorageError:  # it could not be shown the video: that is not for the hook to answer for
            raise
        except Exception as error:  # noqa: BLE001 - as above
            if isinstance(error, TimeoutError) and is_reading.is_set():
                raise StorageError(errno.ETIMEDOUT, "reading a result for moderation: no answer") from None
            raise self._unavailable("video", self._outline(error, asked)) from None
        self._judge("video", reason)

    def _ask(self, hook: Hook, subject: Submission | Finished) -> "Future[str | None]":
        return self._threads.submit(copy_context().run, hook, subject)

    def _outline(self, error: Exception, asked: "Future[str | None]") -> str:
        """What is logged of a failure: not the error's own words, which may quote the prompt."""
        if isinstance(error, TimeoutError) and (asked.cancelled() or not asked.done()):
            return f"has not answered within moderation_timeout_s={self._timeout_s:g}"
        return f"failed with {type(error).__name__}"

    def _unavailable(self, what: str, why: str) -> ModerationUnavailableError:
        logger.error("the moderation hook %s", why)
        self._tell(what, "failed")
        return ModerationUnavailableError(f"the {what} could not be moderated; try again later")

    def _judge(self, what: str, reason: str | None) -> None:
        self._tell(what, "passed" if reason is None else "refused")
        if reason is not None:
            raise RequestError(f"the {what} was refused: {reason}", "prompt" if what == "request" else None, REFUSED)

    def _tell(self, what: str, verdict: str) -> None:
        if self._on_verdict is not None:
            self._on_verdict(what, verdict)


NO_MODERATION = Moderation(None)
