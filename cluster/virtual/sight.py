"""Which gangs a look at placement is about: of a thousand, all but those that an order could name are left out."""

from collections.abc import Mapping
from heapq import nlargest, nsmallest
from itertools import islice

from cluster.virtual.gang import Gang
from cluster.virtual.job import Job
from cluster.virtual.shares import Shares

_FEW_GANGS = 32
"""Up to this many, placement looks at all of them every time."""


class Sight:
    """What has changed since the last look, and which gangs have places."""

    def __init__(self) -> None:
        self._gangs: dict[str, Gang] = {}
        self._idle: dict[str, None] = {}
        """Gangs without a job."""
        self._open: dict[str, None] = {}
        """Other gangs with a place free."""
        self._shared: dict[str, None] = {}
        """Gangs with more than one job."""
        self._changed: dict[str, None] = {}
        """Gangs whose jobs are others."""
        self._fresh: set[str] = set()
        """Jobs that became ready."""
        self._furthest = 0.0
        """No running job has come further than this."""

    def note(self, gang: Gang) -> None:
        """What it holds or does is not what it was."""
        name = gang.name
        self._gangs[name] = gang
        self._changed[name] = None
        for known in (self._idle, self._open, self._shared):
            known.pop(name, None)
        if gang.has_place:
            (self._open if gang.jobs else self._idle)[name] = None
        if len(gang.jobs) > 1:
            self._shared[name] = None

    def note_progress(self, gang: Gang) -> None:
        """It has begun steps."""
        self._furthest = max(self._furthest, gang.progress + (gang.uncharged - 1) * gang.pace)

    def note_ready(self, job: Job) -> None:
        """It waits for a gang."""
        self._fresh.add(job.ask.id)

    def forget(self, gang: Gang) -> None:
        """It is gone."""
        for known in (self._gangs, self._idle, self._open, self._shared, self._changed):
            known.pop(gang.name, None)

    def has_changed(self, gang: Gang) -> bool:
        """Since the last look."""
        return gang.name in self._changed

    def look(self, ready: Mapping[str, Job], shares: Shares, now: float) -> tuple[list[Gang], int | None]:
        """Gangs that an order could be about, and how many jobs in fair order could get one; None: all.

        Args:
            ready: jobs that wait, by id.
            shares: whose turn it is.
            now: virtual seconds.
        """
        found = self._look(ready, shares, now)
        self._changed.clear()
        self._fresh.clear()
        return found

    def _look(self, ready: Mapping[str, Job], shares: Shares, now: float) -> tuple[list[Gang], int | None]:
        gangs = self._gangs.values()
        num_ready = len(ready)
        if len(gangs) <= _FEW_GANGS:
            return list(gangs), None
        if num_ready < len(self._idle) and self._shared:
            return list(gangs), None  # some may be taken over
        names = {**self._changed, **dict.fromkeys(islice(self._idle, num_ready))}
        if num_ready > len(self._idle):
            open_gangs = (self._gangs[name] for name in self._open)
            names |= {gang.name: None for gang in nsmallest(num_ready, open_gangs, key=lambda gang: gang.ends_at)}
        # Jobs that have waited for long have been looked at; new ones may interrupt whoever has come furthest.
        num_rivals = sum(
            shares.start_of(job, now) + job.cost / job.weight <= self._furthest
            for job in (ready[name] for name in self._fresh)
        )
        if num_rivals:
            most = 2 * num_rivals + 8
            names |= {gang.name: None for gang in nlargest(most, gangs, key=lambda gang: gang.progress_at(now))}
            ending = (gang.name for gang in gangs if len(gang.jobs) == 2 and gang.is_ending(now))
            names |= dict.fromkeys(islice(ending, most))
        return [self._gangs[name] for name in names], len(names) + len(self._fresh)
