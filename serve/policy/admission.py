"""Which queued jobs a dispatcher takes in hand.

It prepares a few jobs (text, conditioning) ahead of the gangs, so that none of them waits for a text
encoder. How many is bounded, but not so that one tenant's jobs in hand keep another's, or the same
tenant's more urgent ones, from being prepared: those may go over the bound, by one a tenant and class.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """A job that nobody has claimed."""

    id: str
    tenant: str
    is_urgent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A job that is claimed and has not ended."""

    tenant: str
    is_urgent: bool
    is_ahead: bool
    """Whether it has not come to a gang yet: it is being prepared, or waits for a place."""


def claims(queued: Iterable[Queued], held: Iterable[Held], *, window: int, room: Mapping[str, int]) -> list[str]:
    """Ids to claim now, in this order.

    Args:
        queued: in the order of ``fairness.in_order``.
        held: jobs in this dispatcher's hands.
        window: jobs ahead of the gangs that are enough to keep them busy.
        room: by tenant, jobs that may begin beside those in progress (``Quota.max_running``); absent: any number.
    """
    num_chosen = Counter[str]()
    ahead = [one for one in held if one.is_ahead]
    num_ahead = len(ahead)
    has_any = {one.tenant for one in ahead}
    has_urgent = {one.tenant for one in ahead if one.is_urgent}
    chosen = []
    for job in queued:
        if num_chosen[job.tenant] >= room.get(job.tenant, inf):
            continue
        if num_ahead >= window and job.tenant in (has_urgent if job.is_urgent else has_any):
            continue
        chosen.append(job.id)
        num_chosen[job.tenant] += 1
        num_ahead += 1
        has_any.add(job.tenant)
        if job.is_urgent:
            has_urgent.add(job.tenant)
    return chosen
