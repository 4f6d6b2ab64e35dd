"""Text encoder, VAE and gangs as calls to Ray, and their failures in our own words."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from pusa_dist.errors import GangError, PusaError
from serve.stages import (
    Assignment,
    Finished,
    GangState,
    GangUnavailableError,
    Kept,
    Message,
    Released,
    Renewal,
    ReplicaLostError,
    TensorRef,
)
from serve.store.jobs import Artifact, Job

Handle = DeploymentHandle[Any]
# Cancelled, yet not by us (that would be asyncio's own error): the replica was stopped under the call.
_LOST = (RayActorError, ObjectLostError, DeploymentUnavailableError, ReplicaUnavailableError, TaskCancelledError)


class ServeStages:
    """``Stages`` over the handles of two deployments."""

    def __init__(self, text_encoder: Handle, vae: Handle) -> None:
        self._text_encoder = text_encoder
        self._vae = vae

    async def embed(self, prompt: str) -> TensorRef:
        """See ``Stages.embed``."""
        embedded: TensorRef = await _result(self._text_encoder.embed.remote(prompt))
        return embedded

    async def encode(self, job: Job) -> TensorRef:
        """See ``Stages.encode``."""
        encoded: TensorRef = await _result(self._vae.encode.remote(job.request, [one.key for one in job.inputs]))
        return encoded

    async def preview(self, job: Job, step: int, latents: TensorRef) -> str:
        """See ``Stages.preview``."""
        key: str = await _result(self._vae.preview.remote(job.id, job.attempt, step, job.request, latents))
        return key

    async def decode(self, job: Job, latents: TensorRef) -> dict[str, Artifact]:
        """See ``Stages.decode``."""
        files: dict[str, Artifact] = await _result(self._vae.decode.remote(job.id, job.attempt, job.request, latents))
        return files


class ActorGang:
    """``GangHandle`` over the handle of a coordinator's actor."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    async def generate(self, assignment: Assignment) -> AsyncGenerator[Message, None]:
        """See ``GangHandle.generate``; closing the generator drops the job."""
        stream = self._coordinator.generate.options(num_returns="streaming").remote(assignment)
        is_held = has_ended = False
        try:
            async for ref in stream:
                message: Message | Kept = await ref
                is_held = True
                if isinstance(message, Kept):
                    taken = self._coordinator.take.remote(assignment.job_id, assignment.attempt)
                    message = Finished(latents=await taken)
                has_ended = isinstance(message, Finished | Released)
                yield message
        except (RayError, *_LOST) as error:
            has_ended = True
            if isinstance(error, RayActorError):
                # With the job on its gang, the coordinator's death is the gang's; before, nothing of the job ran.
                died = GangError if is_held else GangUnavailableError
                raise died(f"the denoiser died: {error}") from error
            raise _translated(error) from error
        finally:
            if not has_ended:
                self._coordinator.drop.remote(assignment.job_id, assignment.attempt)

    async def release(self, job_id: str, attempt: int) -> None:
        """See ``GangHandle.release``."""
        await self._call("release", job_id, attempt)

    async def published(self, job_id: str, attempt: int, step: int) -> None:
        """See ``GangHandle.published``."""
        await self._call("published", job_id, attempt, step)

    async def hold(self, owner: str, renewals: Mapping[str, Renewal]) -> GangState:
        """See ``GangHandle.hold``."""
        state: GangState = await self._call("hold", owner, renewals)
        return state

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._coordinator, method).remote(*arguments)
        except (RayError, *_LOST) as error:
            raise _translated(error) from error


async def _result(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except (RayError, *_LOST) as error:
        raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    """The engine's own error as it was raised, ReplicaLostError for a lost process or tensor, else the error itself."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, PusaError):
        return cause
    if isinstance(cause, _LOST):
        return ReplicaLostError(f"{type(cause).__name__}: {cause}")
    return error
