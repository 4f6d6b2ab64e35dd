"""Gangs, and the jobs on them, as a dispatcher keeps them. Changed by its event loop alone."""

import asyncio
import time
from dataclasses import dataclass, field

from serve.attempt import Attempt
from serve.patience import MAX_PAUSE_S
from serve.policy import placement
from serve.policy.tick import Claim, Resident
from serve.stages import Checkpoint, Conditions, GangHandle, GangState
from serve.store.jobs import Job

DOUBT_S = 2 * MAX_PAUSE_S
"""A gang that could not reach the artifact store is asked last for this long: a job that it failed pauses before it
looks for a place again, and should not find the same one."""


@dataclass(slots=True, eq=False)
class RegisteredGang:
    """A gang that jobs may be given to."""

    name: str
    handle: GangHandle
    max_resident: int
    seats: "dict[str, Seat]" = field(default_factory=dict)
    state: GangState | None = None
    """None until it has answered, and after it has refused a job: it gets none."""
    num_missed: int = 0
    running: str | None = None
    """The job that its last step was for."""
    holding: "asyncio.Task[None] | None" = None
    store_failed_at: float | None = None
    """When (``time.monotonic()``) a job left it because the artifact store could not be reached from there; None: not
    since it last wrote a checkpoint."""
    has_said_goodbye: bool = False
    """Its last answer was that it leaves, and not that it is lost."""

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        return self.state is not None and not self.state.is_closed and self.state.num_others < self.max_resident

    @property
    def num_free(self) -> int:
        """Places for further jobs."""
        return max(0, self.max_resident - len(self.seats)) if self.is_open else 0

    @property
    def condition(self) -> str:
        """``open``, ``full`` of others' jobs, ``leaving`` or ``silent``."""
        if self.state is None:
            return "silent"
        return "leaving" if self.state.is_closed else "open" if self.is_open else "full"

    def seen(self, state: GangState, now: float) -> placement.Gang:
        """What the choice of places depends on, while the gang is in this state; ``now`` is ``time.monotonic()``."""
        seats = self.seats.values()
        return placement.Gang(
            name=self.name,
            residents=tuple(
                Resident(job_id=seat.job.id, claim=seat.claim, step=seat.step)
                for seat in seats
                if seat.claim is not None
            ),
            running=self.running if self.running in self.seats else None,
            leaving=frozenset(seat.job.id for seat in seats if seat.is_leaving or seat.is_done),
            lora=state.lora,
            max_resident=self.max_resident - state.num_others,
            is_draining=state.is_closed,
            is_doubtful=self.store_failed_at is not None and now - self.store_failed_at < DOUBT_S,
        )


@dataclass(slots=True, eq=False)
class Seat:
    """A job that is on a gang, or waits for one."""

    attempt: Attempt
    source: Conditions | Checkpoint
    step: int
    gang: RegisteredGang | None = None
    claim: Claim | None = None
    is_leaving: bool = False
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    silence: asyncio.Timeout | None = None
    """Ends its stay when the gang is given up."""
    ready_at: float = field(default_factory=time.perf_counter)

    @property
    def job(self) -> Job:
        """That of the attempt."""
        return self.attempt.job

    @property
    def is_done(self) -> bool:
        """Whether its last step is made."""
        return self.step == self.job.request.num_inference_steps

    def place(self, gang: RegisteredGang, claim: Claim) -> None:
        """Give it a place on a gang."""
        self.gang, self.claim, self.is_leaving = gang, claim, False
        gang.seats[self.job.id] = self
        self.placed.set()

    def leave(self) -> None:
        """Take it off its gang."""
        if self.gang is not None:
            self.gang.seats.pop(self.job.id, None)
        self.gang = None
        self.placed.clear()
