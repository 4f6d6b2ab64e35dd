"""A job under virtual time: what is asked for, what everything but its steps takes, and what became of it."""

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf

from serve.policy.fairness import Waiting
from serve.policy.priority import Priority, is_urgent
from serve.policy.tick import Claim, Resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A job that somebody asks for."""

    id: str
    tenant: str
    num_steps: int
    step_s: float
    """Seconds of a step, as predicted."""
    priority: Priority = "interactive"
    lora: Hashable = None
    signature: Hashable = None
    num_tokens: int = 0
    slowness: float = 1.0
    """What a step really takes, by what is predicted."""
    prepare_s: float | None = None
    decode_s: float | None = None
    """None: as long as everybody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long everything but steps takes, in virtual seconds."""

    prepare_s: float = 0.0
    """Text and conditioning."""
    decode_s: float = 0.0
    switch_s: float = 0.0
    """A change of LoRA strength."""
    release_s: float = 0.0
    """Writing the checkpoint of a job that leaves its gang with steps done."""
    poll_s: float = 0.1
    """Between two looks at the queue."""
    crowded: float = 1.0
    """What everything takes longer that begins while another job is in hand: stages that share processors."""
    arrange_s: float = 0.0
    """From a gang's turning to another job to a look at who could follow; a ready job causes one at once."""


@dataclass(slots=True)
class Record:
    """What became of a job; times are virtual seconds."""

    ask: Ask
    asked_at: float
    ready_at: float = inf
    """Prepared."""
    began_at: float = inf
    """Its first step began."""
    denoised_at: float = inf
    ended_at: float = inf
    steps_run: int = 0
    num_interrupted: int = 0
    """How often a gang turned from it to another with steps left."""
    num_released: int = 0
    """How often it left a gang with steps left."""


@dataclass(slots=True, eq=False)
class Job:
    """A job on its way."""

    record: Record
    weight: float
    step: int = 0
    resident: Resident | None = None
    """As its gang sees it; None while it is on none."""

    @property
    def ask(self) -> Ask:
        """What it is."""
        return self.record.ask

    @property
    def cost(self) -> float:
        """Gang-seconds that it still needs, as predicted."""
        return (self.ask.num_steps - self.step) * self.ask.step_s

    def is_urgent(self, now: float) -> bool:
        """As ``serve.policy.priority`` says."""
        return is_urgent(self.ask.priority, self.record.asked_at, now)

    def waiting(self) -> Waiting:
        """As the fair order sees it."""
        ask = self.ask
        return Waiting(
            id=ask.id,
            tenant=ask.tenant,
            priority=ask.priority,
            created_at=self.record.asked_at,
            cost=self.cost,
            is_started=self.step > 0,
        )

    def candidate(self, virtual_time: float, now: float) -> Resident:
        """As placement sees it."""
        ask = self.ask
        claim = Claim(
            tenant=ask.tenant,
            weight=self.weight,
            virtual_time=virtual_time,
            step=self.step,
            num_steps=ask.num_steps,
            step_cost=ask.step_s,
            is_urgent=self.is_urgent(now),
            created_at=self.record.asked_at,
            num_tokens=ask.num_tokens,
            lora=ask.lora,
        )
        return Resident(job_id=ask.id, claim=claim, step=self.step, signature=ask.signature)

    def advance(self, num_steps: int) -> None:
        """Count steps that its gang has made."""
        assert self.resident is not None
        self.step += num_steps
        self.record.steps_run += num_steps
        resident = self.resident
        self.resident = Resident(
            job_id=resident.job_id, claim=resident.claim, step=self.step, signature=resident.signature
        )
