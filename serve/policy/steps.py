"""Which of the jobs a gang holds make the next step together: what ``tick`` replaces."""

from collections.abc import Iterable
from dataclasses import dataclass

from serve.policy.tick import Claim as Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """What the choice depends on, for one job that is on the gang."""

    job_id: str
    arrival: int
    """Order in which the gang was given its jobs."""


def next_step(residents: Iterable[Resident]) -> tuple[str, ...]:
    """Jobs to advance by one step in one forward; empty when there are none.

    The oldest runs to completion: sharing a gang in turns makes every job late and none early.
    """
    oldest = min(residents, key=lambda resident: resident.arrival, default=None)
    return () if oldest is None else (oldest.job_id,)
