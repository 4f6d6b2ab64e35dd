"""Which of the jobs that a gang holds make the next step.

A job runs to completion. It is interrupted at a step boundary for two reasons only: a more urgent job
of the same tenant, or a job of a tenant so far behind that it can run to its end before it has come as
far as the interrupted one. Its own end then lies before the other's next step, so the other cannot
interrupt it in turn: jobs do not turn round, and every arrival interrupts at most one job.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_ROUNDING = 1e-9
"""Virtual times are sums in different orders; this relative error does not decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job's claim to its gang's next step: fixed when it is given to the gang, so that it says the same later."""

    tenant: str
    weight: float
    """Of the tenant."""
    virtual_time: float
    """The start tag it had (``fairness.Turn``): where its tenant's virtual time is when step ``step`` begins."""
    step: int
    """Steps done when it came to the gang."""
    num_steps: int
    step_cost: float
    """Predicted gang-seconds of a step."""
    is_urgent: bool
    """See ``priority.is_urgent``; a renewed claim may say so when the first one did not."""
    created_at: float
    """Unix seconds."""
    num_tokens: int = 0
    """Of one forward of this job alone."""
    lora: Hashable = None
    """Equal for jobs that want the same LoRA strengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A job on a gang, or about to be given to one, between two steps."""

    job_id: str
    claim: Claim
    step: int
    """Steps done."""
    signature: Hashable = None
    """Equal for jobs that may share the forward of their next step; None: shares with nobody."""

    @property
    def virtual_time(self) -> float:
        """Where its tenant's virtual time is when its next step begins, as far as this job goes."""
        return self.claim.virtual_time + (self.step - self.claim.step) * self.claim.step_cost / self.claim.weight

    @property
    def cost(self) -> float:
        """Predicted gang-seconds left."""
        return (self.claim.num_steps - self.step) * self.claim.step_cost


def next_step(
    residents: Iterable[Resident],
    *,
    running: str | None,
    lora: Hashable = None,
    switch_s: float = 0.0,
    share_tokens: int = 0,
) -> tuple[str, ...]:
    """Jobs to advance by one step in one forward, the first of them the running one; empty when there are none.

    Args:
        residents: those that can make a step now.
        running: the job that the last step ran for; None, or one that is not among them, at a job boundary.
        lora: strengths that the gang has merged.
        switch_s: seconds that a change of strength takes.
        share_tokens: jobs of equal signature share a forward up to this many tokens together; 0: never.
    """
    jobs = list(residents)
    if not jobs:
        return ()
    jobs.sort(key=lambda one: _order(one, lora, switch_s))
    # A tenant's batch jobs stand back while an urgent one is there: it would interrupt them at once.
    urgent = {one.claim.tenant for one in jobs if one.claim.is_urgent}
    candidates = [one for one in jobs if one.claim.is_urgent or one.claim.tenant not in urgent]
    now_running = next((one for one in jobs if one.job_id == running), None)
    if now_running is None:
        chosen = candidates[0]
    else:
        stronger = (one for one in candidates if one is not now_running and preempts(one, now_running, switch_s))
        chosen = next(stronger, now_running)
    return tuple(one.job_id for one in _sharing(chosen, jobs, share_tokens))


def preempts(candidate: Resident, running: Resident, switch_s: float = 0.0) -> bool:
    """Whether ``candidate`` may interrupt ``running``, which has steps left.

    Args:
        candidate: a resident, or a job that could become one.
        running: of the same gang.
        switch_s: seconds of a change of LoRA strength; there and back counts if the two differ.
    """
    mine, other = candidate.claim, running.claim
    if mine.tenant == other.tenant:
        return mine.is_urgent and not other.is_urgent
    switches = 0.0 if mine.lora == other.lora else 2 * switch_s
    ends = candidate.virtual_time + (candidate.cost + switches) / mine.weight
    limit = running.virtual_time
    return ends <= limit + _ROUNDING * max(1.0, abs(limit))


def precedence(resident: Resident) -> tuple[float, bool, bool, float, str]:
    """Sorts jobs into the order in which gangs should run them."""
    claim = resident.claim
    return resident.virtual_time, not claim.is_urgent, resident.step == 0, claim.created_at, resident.job_id


def _order(resident: Resident, lora: Hashable, switch_s: float) -> tuple[float, bool, bool, float, str]:
    start, is_batch, is_fresh, created_at, job_id = precedence(resident)
    switches = 0.0 if resident.claim.lora == lora else switch_s
    return start + switches / resident.claim.weight, is_batch, is_fresh, created_at, job_id


def _sharing(chosen: Resident, in_order: Iterable[Resident], share_tokens: int) -> list[Resident]:
    together = [chosen]
    tokens = chosen.claim.num_tokens
    for one in in_order:
        is_alike = one is not chosen and one.signature is not None and one.signature == chosen.signature
        if is_alike and tokens + one.claim.num_tokens <= share_tokens:
            together.append(one)
            tokens += one.claim.num_tokens
    return together
