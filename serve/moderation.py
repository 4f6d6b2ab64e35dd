"""The operator's say over what is made: one callable, asked before a job is accepted and before a result is published.

Off unless the configuration names one (``moderation: package.module:function``). It is given a
``Submission`` or a ``Finished``, and answers with None, or with the reason for a refusal, which the
tenant reads. A callable that fails lets nothing pass.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pusa_dist.errors import ConfigError, RequestError
from pusa_dist.request import GenerationRequest
from serve.store.artifacts import ArtifactStore, StorageError
from serve.store.jobs import Job

logger = logging.getLogger(__name__)

REFUSED = "moderation_refused"
UNAVAILABLE = "moderation_unavailable"


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
"""Answers None, or why not. Called from worker threads, several at once; it may block."""
OnVerdict = Callable[[str, str], None]
"""Told of what was judged (``request``, ``video``) and how it went (``passed``, ``refused``, ``failed``)."""


class ModerationUnavailableError(Exception):
    """The hook failed, so nobody knows whether this may pass."""


class Moderation:
    """Asks the hook, if there is one."""

    def __init__(self, hook: Hook | None, on_verdict: OnVerdict | None = None) -> None:
        self._hook = hook
        self._on_verdict = on_verdict

    @classmethod
    def load(cls, import_string: str | None, on_verdict: OnVerdict | None = None) -> "Moderation":
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
        return cls(hook, on_verdict)

    def check_submission(self, tenant: str, request: GenerationRequest, inputs: Sequence[bytes]) -> None:
        """Before a job is accepted.

        Raises:
            RequestError: it is refused.
            ModerationUnavailableError: the hook failed.
        """
        if self._hook is not None:
            self._ask(Submission(tenant=tenant, request=request, inputs=tuple(inputs)), "request")

    def check_result(self, job: Job, keys: dict[str, str], artifacts: ArtifactStore) -> None:
        """Before a result is published.

        Args:
            job: whose result it is.
            keys: of its files in the artifact store, by content variant.
            artifacts: where they are.

        Raises:
            RequestError: it is refused.
            ModerationUnavailableError: the hook failed.
            StorageError: it could not read the result.
        """
        if self._hook is not None:
            finished = Finished(
                tenant=job.tenant,
                job_id=job.id,
                request=job.request,
                variants=frozenset(keys),
                read=lambda variant: artifacts.read(keys[variant]),
            )
            self._ask(finished, "video")

    def _ask(self, subject: Submission | Finished, what: str) -> None:
        assert self._hook is not None
        try:
            reason = self._hook(subject)
        except StorageError:  # it could not be shown the video: that is not for the hook to answer for
            raise
        except Exception as error:  # noqa: BLE001 - the operator's code: whatever it raises, nothing passes
            # Not the error's own words: they may quote the prompt.
            logger.error("the moderation hook failed with %s", type(error).__name__)
            self._tell(what, "failed")
            raise ModerationUnavailableError(f"the {what} could not be moderated; try again later") from None
        self._tell(what, "passed" if reason is None else "refused")
        if reason is not None:
            raise RequestError(f"the {what} was refused: {reason}", "prompt" if what == "request" else None, REFUSED)

    def _tell(self, what: str, verdict: str) -> None:
        if self._on_verdict is not None:
            self._on_verdict(what, verdict)


NO_MODERATION = Moderation(None)
