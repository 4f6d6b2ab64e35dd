"""The stages of a job as calls to Ray Serve deployments, and their failures in our own words."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from pusa_dist.errors import GangError, PusaError
from pusa_dist.request import GenerationRequest
from serve.stages import Finished, GangUnavailableError, Progress, ReplicaLostError, TensorRef
from serve.store.jobs import Artifact, Job

Handle = DeploymentHandle[Any]
# Cancelled, yet not by us (that would be asyncio's own error): the replica was stopped under the call.
_LOST = (RayActorError, ObjectLostError, DeploymentUnavailableError, ReplicaUnavailableError, TaskCancelledError)


class ServeStages:
    """``Stages`` over the handles of the three deployments."""

    def __init__(self, text_encoder: Handle, vae: Handle, denoiser: Handle) -> None:
        self._text_encoder = text_encoder
        self._vae = vae
        self._denoiser = denoiser.options(stream=True)

    async def embed(self, prompt: str) -> TensorRef:
        """See ``Stages.embed``."""
        embedded: TensorRef = await _result(self._text_encoder.embed.remote(prompt))
        return embedded

    async def encode(self, job: Job) -> TensorRef:
        """See ``Stages.encode``."""
        encoded: TensorRef = await _result(self._vae.encode.remote(job.request, [one.key for one in job.inputs]))
        return encoded

    async def denoise(
        self,
        job_id: str,
        request: GenerationRequest,
        context: TensorRef,
        negative: TensorRef | None,
        given: TensorRef | None,
    ) -> AsyncGenerator[Progress | Finished, None]:
        """See ``Stages.denoise``."""
        messages: Any = self._denoiser.generate.remote(job_id, request, context, negative, given)
        is_held = False
        try:
            async for message in messages:
                is_held = True
                yield message
        except (RayError, *_LOST) as error:
            if isinstance(error, RayActorError):
                # With the job on its gang, the coordinator's death is the gang's; before, nothing of the job ran.
                died = GangError if is_held else GangUnavailableError
                raise died(f"the denoiser died: {error}") from error
            raise _translated(error) from error
        finally:
            messages.cancel()

    async def decode(self, job: Job, latents: TensorRef) -> dict[str, Artifact]:
        """See ``Stages.decode``."""
        files: dict[str, Artifact] = await _result(self._vae.decode.remote(job.id, job.attempt, job.request, latents))
        return files


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
