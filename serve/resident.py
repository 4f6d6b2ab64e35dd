"""One job on one gang: what its stream is told, and how far it may run beyond its last checkpoint."""

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from pusa_dist.errors import PusaError
from serve.policy import tick
from serve.policy.tick import Claim
from serve.stages import Assignment, Checkpoint, Message, Released


@dataclass(slots=True, eq=False)
class Resident:
    """A job that a gang was given. Changed by the coordinator's event loop alone."""

    assignment: Assignment
    arrival: int
    """Order in which the gang was given its jobs."""
    renewed_at: float
    """When its owner last asked to keep it."""
    claim: Claim
    step: int
    """Steps done."""
    published: int
    """Steps done in its newest published checkpoint; 0 without one."""
    saved: Checkpoint | None = None
    """Newest checkpoint that was written here."""
    fetching: "asyncio.Task[None] | None" = None
    """The checkpoint that it goes on from is on its way to the gang."""
    fetched: Any = None
    """Reference to that checkpoint's bytes, from when they are there until the ranks have them."""
    saving: "asyncio.Task[None] | None" = None
    failing_since: float | None = None
    """When the first of its checkpoints that failed in a row was begun; None: the last one was written."""
    previewing: "asyncio.Task[None] | None" = None
    signature: Hashable = None
    is_admitted: bool = False
    is_busy: bool = False
    """The ranks work on it: it is admitted, stepped or finished right now."""
    is_leaving: bool = False
    """It makes no further step here."""
    is_gone: bool = False
    """Nobody listens any more: its stream has ended, or was closed."""
    messages: "asyncio.Queue[Message | PusaError]" = field(default_factory=asyncio.Queue)

    @property
    def job_id(self) -> str:
        """Of the job."""
        return self.assignment.job_id

    @property
    def attempt(self) -> int:
        """Number of the attempt."""
        return self.assignment.attempt

    @property
    def name(self) -> str:
        """What the ranks call it: a job that comes back to a gang that still holds its former self is another."""
        return f"{self.job_id}#{self.arrival}"

    @property
    def num_steps(self) -> int:
        """Of the generation."""
        return self.assignment.request.num_inference_steps

    def may_step(self, checkpoint_every: int) -> bool:
        """Whether its next step would still be within ``checkpoint_every`` of what is published."""
        return self.is_steady and self.step - self.published < checkpoint_every

    def is_due(self, checkpoint_every: int) -> bool:
        """Whether a checkpoint should be started now; half of what may be lost, so that none waits for it."""
        newest = max(self.published, self.saved.step if self.saved else 0)
        return self.is_steady and self.saving is None and self.step - newest >= max(1, checkpoint_every // 2)

    def wants_preview(self) -> bool:
        """Whether one should be made of its last step."""
        every = self.assignment.preview_every
        return every > 0 and self.step % every == 0 and 0 < self.step < self.num_steps and self.previewing is None

    @property
    def is_expected(self) -> bool:
        """Whether the ranks should be given it: what it starts from is there."""
        return not self.is_admitted and not self.is_leaving and self.fetching is None

    @property
    def is_steady(self) -> bool:
        """Whether it is on the ranks and meant to stay."""
        return self.is_admitted and not self.is_leaving

    def seen(self, name: str) -> tick.Resident:
        """What the choice of the next step depends on, under that name."""
        return tick.Resident(job_id=name, claim=self.claim, step=self.step, signature=self.signature)

    def released(self) -> Released:
        """The last message of a stream whose job goes on elsewhere."""
        source = self.assignment.source
        given = source if isinstance(source, Checkpoint) else None
        return Released(checkpoint=self.saved or given)
