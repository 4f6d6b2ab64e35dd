"""What the unfinished jobs ask of the gangs, as the dispatcher tells it to whoever decides how many there should be."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from serve.policy.cost import Backlog


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Jobs that have not come to their decoding, in predicted gang-seconds.

    Gangs pass it on, so it may come late, more than once and out of order; its stamp says what it is worth.
    """

    started_at: float
    """Of which dispatcher: Unix seconds, by its own clock, when it started."""
    age_s: float
    """How long that one had run when it said so: its own clock, which never goes back."""
    num_jobs: int
    backlog_s: float
    """What they still need, together."""
    job_s: float
    """What one of them needs from its first step to its last, on average."""
    asked_s: float
    """What has ever been asked for, as far as one dispatcher knows: its rise is the load."""

    def stats(self) -> dict[str, float]:
        """As a replica reports it to Ray Serve: names and numbers."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def of_stats(cls, stats: Mapping[str, float]) -> "Demand":
        """The reverse of ``stats``."""
        return cls(
            started_at=stats["started_at"],
            age_s=stats["age_s"],
            num_jobs=round(stats["num_jobs"]),
            backlog_s=stats["backlog_s"],
            job_s=stats["job_s"],
            asked_s=stats["asked_s"],
        )


NOTHING = Demand(started_at=0.0, age_s=0.0, num_jobs=0, backlog_s=0.0, job_s=0.0, asked_s=0.0)
"""Of a dispatcher that has not looked yet; it takes no part in an estimate, as no dispatcher started then."""


def runnable(queued: Iterable[Backlog], room: Mapping[str, int]) -> list[Backlog]:
    """What gangs could be used for of what is queued: a job that its tenant's quota keeps waiting needs none.

    Args:
        queued: of all tenants.
        room: see ``admission.claims``; interactive jobs take it first.
    """
    left = dict(room)
    found = []
    for one in sorted(queued, key=lambda one: one.priority == "batch"):
        num = min(one.num, left.get(one.tenant, one.num))
        if one.tenant in left:
            left[one.tenant] -= num
        if num:
            part = num / one.num
            found.append(replace(one, num=num, cost=one.cost * part, whole=one.whole * part))
    return found
