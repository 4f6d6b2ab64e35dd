"""The stages of a job as the dispatcher sees them: what it asks, what it is told, what can go wrong.

``Stages`` is the seam between driving jobs (``serve.dispatcher``) and Ray Serve
(``serve.serve_stages``); tensors appear here only as opaque references.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from pusa_dist.errors import PusaError
from pusa_dist.request import GenerationRequest
from serve.store.jobs import Artifact, Job


class ReplicaLostError(PusaError):
    """A process that held the job, or a tensor of it, is gone; running the job again may well work."""


class GangUnavailableError(ReplicaLostError):
    """The job came to a gang that had already been given up; nothing of it ran there."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor somewhere in the cluster.

    The reference is wrapped so that whoever passes it on does not fetch the tensor on the way.
    """

    ref: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The gang holds the job (step 0), or a denoising step is done."""

    step: int
    num_steps: int
    seconds: float
    """Duration of that step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last step is done."""

    latents: TensorRef


class Stages(Protocol):
    """What a job goes through.

    Every method may raise ReplicaLostError, or the engine's own errors; cancelling the call (or closing the
    generator) stops the work.
    """

    async def embed(self, prompt: str) -> TensorRef:
        """(L, E) embedding of a prompt."""
        ...

    async def encode(self, job: Job) -> TensorRef:
        """(C, K, H, W) latents of the job's inputs, in the order of its conditioning."""
        ...

    def denoise(
        self,
        job_id: str,
        request: GenerationRequest,
        context: TensorRef,
        negative: TensorRef | None,
        given: TensorRef | None,
    ) -> AsyncGenerator[Progress | Finished, None]:
        """Progress after each step, then the final latents (C, F, H, W).

        Raises:
            GangError: the gang was lost while it held the job.
            GangUnavailableError: the gang had been lost before.
        """
        ...

    async def decode(self, job: Job, latents: TensorRef) -> dict[str, Artifact]:
        """Write the job's files; returns them by content variant."""
        ...
