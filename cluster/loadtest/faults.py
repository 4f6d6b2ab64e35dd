"""A rank killed while jobs run: only in a service of our own, whose processes are below ours."""

import asyncio
import time
from dataclasses import dataclass

from cluster.chaos.faults import Fault, is_ready, strike
from cluster.loadtest.drive import Target
from cluster.processes import roles

RANK = Fault(role="Rank", is_gang_death=True)
_WHOLE_S = 180.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault that was made."""

    what: str
    at_s: float
    """From the beginning of the run."""
    whole_after_s: float | None
    """Until all ranks were there again, and the service ready; None: not within three minutes."""


async def kill_rank(service: int, target: Target, at_s: float, began: float) -> Struck:
    """Kill a rank at a time of the run, one in a step if there is one, and wait until its gang is there again.

    Args:
        service: the service's first process.
        target: the same service.
        at_s: seconds from the beginning.
        began: the instant of ``time.monotonic`` of it.
    """
    await asyncio.sleep(began + at_s - time.monotonic())
    num_ranks = len(roles(service).get("Rank", []))
    if not num_ranks:
        return Struck(what="no rank was there to kill", at_s=at_s, whole_after_s=None)
    pid = strike(RANK, service)
    struck_at = time.monotonic()
    key = next(iter(target.keys.values()))
    while time.monotonic() - struck_at < _WHOLE_S:
        await asyncio.sleep(_POLL_S)
        ranks = roles(service).get("Rank", [])
        # Ranks are there before their gang is ready.
        if len(ranks) == num_ranks and pid not in ranks and await asyncio.to_thread(is_ready, target.url, key):
            whole_after_s = time.monotonic() - struck_at
            return Struck(what=RANK.name, at_s=struck_at - began, whole_after_s=whole_after_s)
    return Struck(what=RANK.name, at_s=struck_at - began, whole_after_s=None)
