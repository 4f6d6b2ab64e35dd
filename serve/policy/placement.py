"""Which job goes to which gang: gangs and jobs as plain values in, orders out.

Called again whenever something has changed; an order that is under way shows in the values (a job
that was placed is a resident, one that was released is leaving), so that nothing is ordered twice.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

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
    """Jobs that its ranks hold. One more may wait beside them, so that a gang that holds an interrupted job and
    ends another need not go on with the interrupted one only because nothing else has come yet."""
    is_draining: bool = False
    """It gets no more jobs and lets go of those it has."""
    is_doubtful: bool = False
    """Jobs have lately failed to read or write their checkpoints on it: it gets those that no other has a place for."""


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


def orders(gangs: Iterable[Gang], ready: Sequence[Resident], *, switch_s: float = 0.0) -> list[Order]:
    """What to do now.

    Idle gangs get the first ready jobs, those that want the strengths a gang has merged if possible. A
    job that may interrupt a running one goes to that gang, and if it is full its last waiting resident
    makes room. Free second places are filled, so that a gang has no gap between two jobs. A gang that
    stays idle takes over a resident that waits on another. Doubtful gangs are asked last, whatever they offer: they are
    idle because jobs cannot stay on them. Where all are doubtful, nothing is different.

    Args:
        gangs: all of them.
        ready: prepared jobs that are on no gang, in order.
        switch_s: seconds of a change of LoRA strength.
    """
    sound, doubtful = list[Gang](), list[Gang]()
    for gang in gangs:
        (doubtful if gang.is_doubtful else sound).append(gang)
    made, left = _orders(sound, ready, switch_s)
    return made + _orders(doubtful, left, switch_s)[0]


def _orders(
    gangs: Iterable[Gang], ready: Sequence[Resident], switch_s: float
) -> tuple[list[Order], Sequence[Resident]]:
    """Orders for these gangs alone, and the jobs for which they neither have a place nor will."""
    made, idle, busy = list[Order](), list[Gang](), list[_Room]()
    num_coming = num_emptying = 0
    for gang in gangs:
        staying = [one for one in gang.residents if one.job_id not in gang.leaving]
        num_coming += len(gang.leaving)
        if gang.is_draining:
            made += [Release(one.job_id, gang.name) for one in staying]
        elif staying:
            busy.append(_room(gang, staying))
        elif gang.residents:
            num_emptying += 1
        else:
            idle.append(gang)
    left: Sequence[Resident] = ()
    made += _begin(ready[: len(idle)], idle)
    if len(ready) > len(idle):
        board = _Board(busy, num_emptying, switch_s)
        # First who interrupts: a job that follows must not take a place that one of them would take from it.
        others = [job for job in ready[len(idle) :] if not board.interrupts(job)]
        left = [job for job in others if not board.follows(job)]
        made += board.made
    num_coming += sum(isinstance(order, Release) for order in made)
    return made + _take_over(busy, len(idle) - len(ready) - num_coming), left


@dataclass(slots=True, eq=False)
class _Room:
    """What is left of a busy gang while orders are made."""

    gang: Gang
    running: Resident
    """The one that runs, or will."""
    begun: list[Resident]
    """Those that stay and have made a step here, the running one among them."""
    waiting: list[Resident]
    """Those that stay and have not: nothing is lost if one of them goes elsewhere."""
    num_leaving: int
    is_spoken_for: bool = False
    """Whether the next place that becomes free is meant for a job."""

    @property
    def is_open(self) -> bool:
        """Whether a job may follow the running one."""
        return not (self.waiting or self.is_spoken_for)

    @property
    def has_place(self) -> bool:
        """Whether one more may wait beside those that its ranks hold."""
        return not self.is_spoken_for and len(self.gang.residents) <= self.gang.max_resident


def _room(gang: Gang, staying: list[Resident]) -> _Room:
    running = next((one for one in staying if one.job_id == gang.running), None) or min(staying, key=precedence)
    begun, waiting = list[Resident](), list[Resident]()
    for one in staying:
        (begun if one is running or one.step > one.claim.step else waiting).append(one)
    return _Room(gang, running, begun, waiting, len(gang.residents) - len(staying))


def _begin(jobs: Sequence[Resident], idle: Sequence[Gang]) -> list[Order]:
    left: dict[Hashable, list[Gang]] = {}
    for gang in reversed(idle):
        left.setdefault(gang.lora, []).append(gang)
    made, others = list[Order](), []
    for job in jobs:
        if same := left.get(job.claim.lora):
            made.append(Place(job.job_id, same.pop().name))
        else:
            others.append(job)
    rest = (gang for group in left.values() for gang in reversed(group))
    return made + [Place(job.job_id, gang.name) for job, gang in zip(others, rest, strict=False)]


class _Board:
    """Busy gangs, sorted once by what jobs look for; jobs are put in order, so what one cannot have none after can.

    Attributes:
        made: the orders so far.
    """

    def __init__(self, busy: Sequence[_Room], num_emptying: int, switch_s: float) -> None:
        self.made: list[Order] = []
        self._num_emptying = num_emptying
        self._switch_s = switch_s
        self._promised = set[str]()
        """Tenants with a job whose place is being made: one of theirs that came in before it would put it behind."""
        self._furthest = sorted(busy, key=lambda room: precedence(room.running))
        self._furthest_job = self._furthest[-1].running if busy else None
        """That runs: who may interrupt it is owed the next step of some gang."""
        self._batch: dict[str, list[_Room]] = {}
        for room in self._furthest:
            if not room.running.claim.is_urgent:
                self._batch.setdefault(room.running.claim.tenant, []).append(room)
        self._soonest: dict[Hashable, list[_Room]] = {}
        for room in sorted(busy, key=lambda room: room.running.cost, reverse=True):
            if room.is_open and not room.num_leaving:
                self._soonest.setdefault(room.running.claim.lora, []).append(room)
        self._ending = [
            (room.waiting[0], room)
            for room in busy
            if len(room.waiting) == 1 and room.has_place and room.running.claim.num_steps - room.running.step <= 1
        ]
        self._emptying = [room for room in busy if room.num_leaving and not room.waiting]
        self._last = [(one, room) for room in busy for one in room.waiting if not self._may_stay(one, room)]
        self._last.sort(key=lambda pair: precedence(pair[0]))

    def interrupts(self, job: Resident) -> bool:
        """Give a job to a gang whose running job it may interrupt; False: there is none."""
        if job.claim.tenant in self._promised:
            return False
        own = self._batch.get(job.claim.tenant, []) if job.claim.is_urgent else []
        return self._interrupt(job, own) or self._interrupt(job, self._furthest)

    def follows(self, job: Resident) -> bool:
        """Give a job to a gang for when its running job has ended; it may have to wait for a place. False: for none."""
        if job.claim.tenant in self._promised:
            return True
        return self._overtake(job) or self._follow(job) or self._replace(job)

    def _interrupt(self, job: Resident, rooms: list[_Room]) -> bool:
        for index in range(len(rooms) - 1, -1, -1):  # the furthest ahead first
            room = rooms[index]
            if not preempts(job, room.running, self._switch_s):
                if not preempts(job, room.running):
                    return False  # nor any that is less far
                continue
            is_done = self._make_way(job, room)
            del rooms[index]  # if there is no way for this job, there is none for those after it
            if is_done:
                return True
        return False

    def _make_way(self, job: Resident, room: _Room) -> bool:
        """A place on the ranks: free, becoming free, or that of a job that has not begun."""
        places = room.gang.max_resident - len(room.begun)
        if places <= 0 or room.is_spoken_for:
            return False
        if len(room.waiting) < places:
            self._enter(job, room, wait=len(room.waiting) + room.num_leaving >= places)
            return True
        # Beside those that hold a place one more may wait, which makes room for nobody by itself.
        going = sorted(room.waiting, key=lambda one: (not self._is_interrupting(one, room), *precedence(one)))
        going = going[min(places, len(going)) - 1 :]
        # One that only follows loses nothing by following later.
        if not going or (self._is_interrupting(going[0], room) and precedence(going[0]) <= precedence(job)):
            return False
        self._displace(going, job, room)
        return True

    def _is_interrupting(self, job: Resident, room: _Room) -> bool:
        return preempts(job, room.running, self._switch_s)

    def _may_stay(self, job: Resident, room: _Room) -> bool:
        return self._is_interrupting(job, room) or self._is_owed_a_step(job)

    def _is_owed_a_step(self, job: Resident) -> bool:
        return self._furthest_job is not None and preempts(job, self._furthest_job, self._switch_s)

    def _overtake(self, job: Resident) -> bool:
        """On a gang that makes a last step, before the one that is next there.

        With many gangs one is always about to be free: the first in order gets it, though others were given theirs
        ahead of time, and need not wait for the end of a job that has just begun. So does one that may interrupt a
        running job and comes too late for it, because another has.
        """
        for index in range(len(self._ending) - 1, -1, -1):
            next_one, room = self._ending[index]
            if room.waiting != [next_one] or self._precedence_here(job) >= self._precedence_here(next_one):
                continue
            if precedence(job) >= precedence(next_one):  # the gang would begin with that, were the two together
                room.waiting.remove(next_one)
                self.made.append(Release(next_one.job_id, room.gang.name))
            del self._ending[index]
            self._enter(job, room, wait=False)
            return True
        return False

    def _precedence_here(self, job: Resident) -> tuple[bool, tuple[float, bool, bool, float, str]]:
        """Sorts those that want the place of a job that ends: first who is owed a step that another gang makes."""
        return not self._is_owed_a_step(job), precedence(job)

    def _follow(self, job: Resident) -> bool:
        """After the running job of the gang that is first done with its own, or in the next place that becomes free."""
        if self._num_emptying:
            self._num_emptying -= 1
            return True
        best: tuple[float, _Room] | None = None
        for lora, rooms in self._soonest.items():
            while rooms and not rooms[-1].is_open:
                rooms.pop()
            if not rooms:
                continue
            room = rooms[-1]
            wait_s = room.running.cost + (0.0 if lora == job.claim.lora else self._switch_s)
            if best is None or wait_s < best[0]:
                best = wait_s, room
        if best is not None:
            self._enter(job, best[1], wait=False)
            return True
        while self._emptying:
            room = self._emptying.pop()
            if room.is_open:
                self._enter(job, room, wait=True)
                return True
        return False

    def _replace(self, job: Resident) -> bool:
        """In the place of the last of all that wait on gangs, if that is to go after this one."""
        while self._last:
            last, room = self._last[-1]
            if last not in room.waiting:
                self._last.pop()
                continue
            if precedence(last) <= precedence(job):
                return False
            self._displace([last], job, room)
            return True
        return False

    def _enter(self, job: Resident, room: _Room, *, wait: bool) -> None:
        if wait:
            self._promise(job, room)
            return
        room.waiting.append(job)
        self.made.append(Place(job.job_id, room.gang.name))

    def _displace(self, going: Sequence[Resident], job: Resident, room: _Room) -> None:
        room.waiting = [one for one in room.waiting if one not in going]
        self.made += [Release(one.job_id, room.gang.name) for one in going]
        self._promise(job, room)

    def _promise(self, job: Resident, room: _Room) -> None:
        room.is_spoken_for = True
        self._promised.add(job.claim.tenant)


def _take_over(busy: Iterable[_Room], num_idle: int) -> list[Order]:
    if num_idle <= 0:
        return []
    others = [(one, room) for room in busy for one in (*room.begun, *room.waiting) if one is not room.running]
    others.sort(key=lambda pair: precedence(pair[0]))
    return [Release(one.job_id, room.gang.name) for one, room in others[:num_idle]]
