"""The stages of a job as the dispatcher sees them: what it asks, what it is told, what can go wrong.

``Stages`` and ``GangHandle`` are the seam between driving jobs (``serve.dispatcher``, ``serve.gangs``)
and Ray (``serve.serve_stages``); tensors appear here only as opaque references.
"""

from collections.abc import AsyncGenerator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pusa_dist.errors import PusaError
from pusa_dist.request import GenerationRequest
from serve.policy.tick import Claim
from serve.store.jobs import Artifact, Job


class ReplicaLostError(PusaError):
    """A process that held the job, or a tensor of it, is gone; running the job again may well work."""


class GangSilentError(ReplicaLostError):
    """A gang that held the job does not answer any more: it is dead, or cut off; nobody can tell which."""


class GangUnavailableError(ReplicaLostError):
    """The job came to a gang that had already been given up, or is leaving; nothing of it ran there."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor somewhere in the cluster.

    The reference is wrapped so that whoever passes it on does not fetch the tensor on the way.
    """

    ref: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a generation starts from."""

    context: TensorRef
    """(L, E) embedding of the prompt."""
    negative: TensorRef | None
    """(L, E) of the negative prompt; None without guidance."""
    given: TensorRef | None
    """(C, K, H, W) conditioning latents; None without conditioning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A generation in the artifact store, published for its job."""

    key: str
    step: int
    """Steps done in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """An attempt at a job as a gang is given it: to start from its conditions or go on from its checkpoint."""

    job_id: str
    attempt: int
    owner: str
    """The dispatcher whose renewals keep it resident."""
    request: GenerationRequest
    source: Conditions | Checkpoint
    claim: Claim
    """What the gang's own choice of the next step depends on."""
    preview_every: int = 0
    """Steps between previews; 0: none wanted."""

    @property
    def step(self) -> int:
        """Steps done when it comes to the gang."""
        return self.source.step if isinstance(self.source, Checkpoint) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What keeps a resident on its gang."""

    attempt: int
    published_step: int
    """Of the newest checkpoint that is published."""
    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The gang holds the job (seconds 0), or a denoising step is done."""

    step: int
    num_steps: int
    seconds: float
    """Duration of that step."""
    num_tokens: int = 0
    """Tokens of its forward, over all jobs that shared it."""
    num_sharing: int = 1
    """Jobs that shared it."""
    is_guest: bool = False
    """Whether the step was another job's, and this one only came along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """A checkpoint is written; it counts once it is published."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Previewed:
    """What the video is going to be, as far as can be told."""

    step: int
    latents: TensorRef
    """(C, F, H, W) float32 in NumPy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The job has left the gang between two steps, and can go on elsewhere."""

    checkpoint: Checkpoint | None
    """Where it stands; None: where it stood when it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last step is done."""

    latents: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What crosses Ray in place of ``Finished``: the latents wait on the gang until they are asked for."""


Message = Progress | Checkpointed | Previewed | Released | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class GangState:
    """What a gang says of itself to one of its users."""

    num_others: int
    """Jobs it holds for anybody else."""
    is_closed: bool
    """It takes no more jobs: it hands over those it has, or is lost."""
    lora: Hashable
    """LoRA strengths that it has merged."""
    switch_s: float
    """Seconds that a change of strength was seen to take."""
    is_lost: bool = False
    """Its ranks are dead; it is being replaced."""


class GangHandle(Protocol):
    """One gang, wherever it runs. Every method may raise ReplicaLostError."""

    def generate(self, assignment: Assignment) -> AsyncGenerator[Message, None]:
        """Progress, checkpoints, then the final latents (C, F, H, W), or that the job was released.

        Closing the generator drops the job at its next step.

        Raises:
            GangError: the gang was lost while it held the job.
            GangUnavailableError: the gang had been lost before, or is leaving.
            CheckpointError: the checkpoint it should go on from cannot be used (any more).
            StorageError: the artifact store cannot be reached from the gang, to read that checkpoint or to write one
                that the job waits for; it can go on elsewhere from the published one.
        """
        ...

    async def release(self, job_id: str, attempt: int) -> None:
        """Let the job leave between two steps; its stream ends with Released."""
        ...

    async def published(self, job_id: str, attempt: int, step: int) -> None:
        """The checkpoint of that step is published: the gang may go on from there."""
        ...

    async def hold(self, owner: str, renewals: Mapping[str, Renewal]) -> GangState:
        """Keep these jobs of the owner resident, and no other of its."""
        ...


class Stages(Protocol):
    """What a job goes through beside its gang.

    Every method may raise ReplicaLostError, or the engine's own errors; cancelling the call stops the work.
    """

    async def embed(self, prompt: str) -> TensorRef:
        """(L, E) embedding of a prompt."""
        ...

    async def encode(self, job: Job) -> TensorRef:
        """(C, K, H, W) latents of the job's inputs, in the order of its conditioning."""
        ...

    async def preview(self, job: Job, step: int, latents: TensorRef) -> str:
        """Draw a preview; returns the key of a file of the attempt."""
        ...

    async def decode(self, job: Job, latents: TensorRef) -> dict[str, Artifact]:
        """Write the job's files; returns them by content variant."""
        ...
