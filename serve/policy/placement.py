"""Which job goes to which gang: gangs and jobs as plain values in, orders out.

Called again whenever something has changed; an order that is under way shows in the values (a job
that was placed is a resident, one that was released is leaving), so that nothing is ordered twice.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from serve.policy.tick import Resident, precedence, preempts


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A gang as the dispatcher knows it."""

    name: str
    residents: tuple[Resident, ...] = ()
    """Every job it holds or was given, and those that are leaving."""
    running: str | None = None
    """The job that it makes steps for; None before the first."""
    leaving: frozenset[str] = frozenset()
    """Residents that were asked to leave, or are past their last step."""
    lora: Hashable = None
    """Strengths that it has merged."""
    max_resident: int = 2
    max_tokens: int | None = None
    """Of all residents together, as memory allows; a single one is always admitted."""
    is_draining: bool = False
    """It gets no more jobs and lets go of those it has."""


@dataclass(frozen=True, slots=True)
class Place:
    """Give a ready job to a gang."""

    job_id: str
    gang: str


@dataclass(frozen=True, slots=True)
class Release:
    """Ask a gang to let go of a resident between two steps; the job is then ready again."""

    job_id: str
    gang: str


Order = Place | Release


@dataclass(slots=True, eq=False)
class _Room:
    """What is left of a gang while orders are made."""

    gang: Gang
    residents: list[Resident] = field(default_factory=list)
    """Those that stay."""
    running: Resident | None = None
    num_free: int = 0
    num_soon: int = 0
    """Places that residents are leaving."""

    def fits(self, job: Resident) -> bool:
        """Whether memory allows one more."""
        limit, held = self.gang.max_tokens, self.residents
        return limit is None or not held or sum(one.claim.num_tokens for one in (*held, job)) <= limit


def orders(gangs: Iterable[Gang], ready: Sequence[Resident], *, switch_s: float = 0.0) -> list[Order]:
    """What to do now.

    Idle gangs get the first ready jobs, those that want the strengths a gang has merged if possible. A
    job that may interrupt a running one goes to that gang, and if it is full its last waiting resident
    makes room. Free second places are filled, so that a gang has no gap between two jobs. A gang that
    stays idle takes over a resident that waits on another.

    Args:
        gangs: all of them.
        ready: prepared jobs that are on no gang, in order.
        switch_s: seconds of a change of LoRA strength.
    """
    rooms, made, num_coming = [], list[Order](), 0
    for gang in gangs:
        num_coming += len(gang.leaving)
        if gang.is_draining:
            made += [Release(one.job_id, gang.name) for one in gang.residents if one.job_id not in gang.leaving]
        else:
            rooms.append(_room(gang))
    idle = [room for room in rooms if not room.gang.residents]
    first, rest = ready[: len(idle)], ready[len(idle) :]
    made += _begin(first, idle)
    busy = sorted((room for room in rooms if room.running is not None), key=_by_running, reverse=True)
    for job in rest:
        order = _interrupt(job, busy, switch_s) or _follow(job, busy, switch_s)
        if order is not None and order is not _WAIT:
            made.append(order)
    num_coming += sum(isinstance(order, Release) for order in made)
    made += _take_over(busy, len(idle) - len(first) - num_coming)
    return made


_WAIT = Release("", "")
"""A place is becoming free: no order."""


def _room(gang: Gang) -> _Room:
    staying = [one for one in gang.residents if one.job_id not in gang.leaving]
    running = next((one for one in staying if one.job_id == gang.running), None)
    return _Room(
        gang,
        staying,
        running or min(staying, key=precedence, default=None),
        gang.max_resident - len(gang.residents),
        len(gang.residents) - len(staying),
    )


def _by_running(room: _Room) -> tuple[float, bool, bool, float, str]:
    assert room.running is not None
    return precedence(room.running)


def _begin(jobs: Sequence[Resident], idle: list[_Room]) -> list[Order]:
    made, others = list[Order](), []
    left = list(idle)
    for job in jobs:
        same = next((room for room in left if room.gang.lora == job.claim.lora), None)
        if same is None:
            others.append(job)
            continue
        left.remove(same)
        made.append(Place(job.job_id, same.gang.name))
    made += [Place(job.job_id, room.gang.name) for job, room in zip(others, left, strict=False)]
    return made


def _interrupt(job: Resident, busy: list[_Room], switch_s: float) -> Order | None:
    for room in busy:  # the gang whose running job is furthest ahead comes first
        assert room.running is not None
        if not preempts(job, room.running, switch_s):
            continue
        if room.num_free + room.num_soon:
            order = _enter(job, room)
        else:
            order = _displace(job, room, [one for one in room.residents if one is not room.running])
        if order is not None:
            return order
    return None


def _follow(job: Resident, busy: list[_Room], switch_s: float) -> Order | None:
    open_rooms = [room for room in busy if room.num_free and room.fits(job)] or [room for room in busy if room.num_soon]
    if open_rooms:
        return _enter(job, min(open_rooms, key=lambda room: _wait_s(job, room, switch_s)))
    fresh = [(one, room) for room in busy for one in room.residents if one is not room.running and one.step == 0]
    if not fresh:
        return None
    last, room = max(fresh, key=lambda pair: precedence(pair[0]))
    return _displace(job, room, [last])


def _wait_s(job: Resident, room: _Room, switch_s: float) -> float:
    assert room.running is not None
    return room.running.cost + (0.0 if room.running.claim.lora == job.claim.lora else switch_s)


def _enter(job: Resident, room: _Room) -> Order | None:
    if not room.fits(job):
        return None
    if not room.num_free:
        room.num_soon -= 1
        return _WAIT
    room.num_free -= 1
    room.residents.append(job)
    return Place(job.job_id, room.gang.name)


def _displace(job: Resident, room: _Room, candidates: list[Resident]) -> Order | None:
    last = max(candidates, key=precedence, default=None)
    if last is None or precedence(last) <= precedence(job):
        return None
    room.residents.remove(last)  # the place that it leaves is spoken for
    return Release(last.job_id, room.gang.name)


def _take_over(busy: list[_Room], num_idle: int) -> list[Order]:
    if num_idle <= 0:
        return []
    waiting = [(one, room) for room in busy for one in room.residents if one is not room.running]
    waiting.sort(key=lambda pair: precedence(pair[0]))
    return [Release(one.job_id, room.gang.name) for one, room in waiting[:num_idle]]
