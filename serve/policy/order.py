"""Which waiting job goes first."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_URGENCY = {"interactive": 0, "batch": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What the order of a queued job depends on."""

    id: str
    priority: Literal["interactive", "batch"]
    created_at: float
    """Unix seconds."""


def in_order(jobs: Iterable[Waiting]) -> list[str]:
    """Ids, first to run first: interactive before batch, then by age; the id breaks a tie."""
    return [job.id for job in sorted(jobs, key=lambda job: (_URGENCY[job.priority], job.created_at, job.id))]
