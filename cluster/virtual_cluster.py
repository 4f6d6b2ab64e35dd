"""The service under virtual time: a dispatcher and gangs that know no tensors, driven by ``serve.policy``.

What the policy decides is decided here by the same functions; what takes time (a step, a text embedding,
a change of strength) takes it by the clock of an ``EventLoop``. Text encoder and VAE have no queues.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nlargest, nsmallest
from itertools import islice
from math import inf

from cluster.event_loop import EventLoop
from serve.policy.admission import Held, Queued, claims
from serve.policy.fairness import InHand, Standing, Turn, Waiting, idle_clock, in_order, virtual_clock
from serve.policy.placement import Gang, Place, orders
from serve.policy.priority import Priority, is_urgent
from serve.policy.tick import Claim, Resident, next_step

_LOOK_AHEAD = 8
"""Queued jobs of every tenant and class that one look at the queue shows."""
_FEW_GANGS = 32
"""Up to this many, placement looks at all of them every time."""


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
class _Job:
    record: Record
    weight: float
    step: int = 0
    resident: Resident | None = None
    """As its gang sees it; None while it is on none."""

    @property
    def ask(self) -> Ask:
        return self.record.ask

    @property
    def cost(self) -> float:
        return (self.ask.num_steps - self.step) * self.ask.step_s

    def is_urgent(self, now: float) -> bool:
        return is_urgent(self.ask.priority, self.record.asked_at, now)

    def waiting(self) -> Waiting:
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


@dataclass(slots=True, eq=False)
class _Gang:
    name: str
    jobs: dict[str, _Job] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    running: str | None = None
    stepping: tuple[str, ...] = ()
    """Jobs whose step is under way."""
    lora: Hashable = None
    is_draining: bool = False
    progress: float = -inf
    """Virtual time of the running job."""
    left: float = 0.0
    """Gang-seconds left of it."""
    is_ending: bool = False
    """It makes its last step."""
    next_at: float = -inf
    """Virtual time of the job that waits for it to end."""


class VirtualCluster:
    """Runs the jobs it is asked for.

    Args:
        loop: whose time it lives in.
        weights: by tenant; a tenant that is not there has 1.
        num_gangs: all alike.
        times: of everything but steps.
        max_resident: jobs that a gang holds.
        window: prepared jobs ahead of the gangs; None: as many as gangs.
        max_running: by tenant, jobs claimed at once.
        share_tokens: see ``next_step``.
        on_end: told of every job that has ended.

    Attributes:
        records: by job id.
        delivered: (virtual seconds, tenant, gang-seconds) of every step.
    """

    def __init__(
        self,
        loop: EventLoop,
        weights: Mapping[str, float],
        num_gangs: int,
        times: Times,
        *,
        max_resident: int = 2,
        window: int | None = None,
        max_running: Mapping[str, int | None] | None = None,
        share_tokens: int = 0,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.records: dict[str, Record] = {}
        self.delivered: list[tuple[float, str, float]] = []
        self._loop = loop
        self._weights = weights
        self._times = times
        self._max_resident = max_resident
        self._window = num_gangs if window is None else window
        self._max_running = max_running or {}
        self._share_tokens = share_tokens
        self._on_end = on_end
        self._gangs = {str(number): _Gang(str(number)) for number in range(num_gangs)}
        self._queued: dict[tuple[str, Priority], deque[_Job]] = {}
        self._claimed: dict[str, _Job] = {}
        self._ahead: dict[str, _Job] = {}
        self._ready: dict[str, _Job] = {}
        self._standings: dict[str, Standing] = {}
        self._on_gangs: dict[tuple[str, bool], float] = {}
        self._clock = 0.0
        self._furthest = 0.0
        """No running job has come further than this."""
        self._idle: dict[str, None] = dict.fromkeys(self._gangs)
        """Gangs without a job."""
        self._open: dict[str, None] = {}
        """Other gangs with a place free."""
        self._changed: dict[str, None] = {}
        """Gangs whose jobs are others since placement last looked."""
        self._fresh: set[str] = set()
        """Jobs that became ready since placement last looked."""
        self._is_polling = self._may_claim = False
        self._place_at = inf

    def ask(self, ask: Ask) -> None:
        """A client creates a job, now."""
        record = self.records[ask.id] = Record(ask, self._loop.now)
        weight = self._weights.get(ask.tenant, 1.0)
        self._standings.setdefault(ask.tenant, Standing(weight=weight, virtual_time=0.0))
        self._queued.setdefault((ask.tenant, ask.priority), deque()).append(_Job(record, weight))
        self._may_claim = True
        if not self._is_polling:
            self._is_polling = True
            self._loop.after(0.0, self._poll)

    def drain(self, gang: str) -> None:
        """A gang, named ``"0"`` and so on, is told to go: its jobs go on elsewhere."""
        self._gangs[gang].is_draining = True
        self._look(self._gangs[gang])
        self._place_soon()

    @property
    def is_wasteful(self) -> bool:
        """Whether a gang is idle although a prepared job waits that is not on its way to one."""
        gangs = self._gangs.values()
        num_idle = sum(not gang.jobs and not gang.is_draining for gang in gangs)
        num_waiting = len(self._ready) + sum(
            name not in gang.stepping and name not in gang.leaving for gang in gangs for name in gang.jobs
        )
        return num_idle > sum(len(gang.leaving) for gang in gangs) and num_waiting > 0

    # The queue: what to prepare next.

    def _poll(self) -> None:
        self._renew_claims()
        self._advance_clock()
        claimable = self._claimable() if self._may_claim else []
        self._may_claim = False
        for job in claimable:
            self._queued[job.ask.tenant, job.ask.priority].remove(job)
            self._claimed[job.ask.id] = self._ahead[job.ask.id] = job
            self._may_claim = True
            self._loop.after(self._times.prepare_s, partial(self._prepared, job))
        if self._claimed or any(self._queued.values()):
            self._loop.after(self._times.poll_s, self._poll)
        else:
            self._is_polling = False

    def _claimable(self) -> list[_Job]:
        now = self._loop.now
        shown = {job.ask.id: job for lane in self._queued.values() for job in islice(lane, _LOOK_AHEAD)}
        if not shown:
            return []
        ahead = (
            InHand(tenant=job.ask.tenant, cost=job.cost, is_urgent=job.is_urgent(now)) for job in self._ahead.values()
        )
        turns = in_order(
            (job.waiting() for job in shown.values()),
            self._standings,
            (*self._in_hand(), *ahead),
            clock=self._clock,
            now=now,
            switch_s=self._times.switch_s,
        )
        queued = (
            Queued(id=turn.job_id, tenant=turn.tenant, is_urgent=shown[turn.job_id].is_urgent(now)) for turn in turns
        )
        held = (
            Held(tenant=job.ask.tenant, is_urgent=job.is_urgent(now), is_ahead=name in self._ahead)
            for name, job in self._claimed.items()
        )
        return [shown[name] for name in claims(queued, held, window=self._window, max_running=self._max_running)]

    def _in_hand(self) -> Iterable[InHand]:
        for (tenant, urgent), cost in self._on_gangs.items():
            yield InHand(tenant=tenant, cost=cost, is_urgent=urgent)

    def _renew_claims(self) -> None:
        """Batch jobs grow old on gangs, too."""
        for gang in self._gangs.values():
            for job in gang.jobs.values():
                if job.resident is None or job.resident.claim.is_urgent or not job.is_urgent(self._loop.now):
                    continue
                for urgent, cost in ((False, -job.cost), (True, job.cost)):
                    key = job.ask.tenant, urgent
                    self._on_gangs[key] = self._on_gangs.get(key, 0.0) + cost
                job.resident = replace(job.resident, claim=replace(job.resident.claim, is_urgent=True))

    def _advance_clock(self) -> None:
        running = [
            gang.jobs[name].resident for gang in self._gangs.values() for name in gang.stepping[:1] if name in gang.jobs
        ]
        at_work = [one for one in running if one is not None]
        if not at_work and not self._ready:
            self._clock = max(self._clock, idle_clock(self._standings.values()))
            return
        self._clock = virtual_clock(
            self._clock,
            (one.claim.virtual_time for one in at_work),
            (one.virtual_time for one in at_work),
            (turn.virtual_time for turn in islice(self._turns(), 1)),
        )

    # Placement.

    def _prepared(self, job: _Job) -> None:
        job.record.ready_at = self._loop.now
        self._wait(job)

    def _wait(self, job: _Job) -> None:
        self._ahead[job.ask.id] = self._ready[job.ask.id] = job
        self._fresh.add(job.ask.id)
        self._place_soon()

    def _place_soon(self, after_s: float = 0.0) -> None:
        when = self._loop.now + after_s
        if when < self._place_at:
            self._place_at = when
            self._loop.at(when, partial(self._place, when))

    def _place(self, when: float) -> None:
        if when != self._place_at:
            return  # an earlier look has taken the place of this one
        self._place_at = inf
        gangs, most = self._to_look_at()
        self._changed.clear()
        self._fresh.clear()
        turns = {turn.job_id: turn for turn in islice(self._turns(), most)}
        now = self._loop.now
        candidates = {name: self._ready[name].candidate(turn.virtual_time, now) for name, turn in turns.items()}
        views = [self._view(gang) for gang in gangs]
        for order in orders(views, list(candidates.values()), switch_s=self._times.switch_s):
            gang = self._gangs[order.gang]
            if isinstance(order, Place):
                job = self._ready.pop(order.job_id)
                del self._ahead[order.job_id]
                self._may_claim = True
                self._lift(job.ask.tenant, turns[order.job_id].lifted_to)
                job.resident = candidates[order.job_id]
                self._enter(job, gang)
            elif order.job_id in gang.stepping:
                gang.leaving.add(order.job_id)
            else:
                self._leave(gang.jobs[order.job_id], gang)

    def _turns(self) -> Iterator[Turn]:
        return in_order(
            (job.waiting() for job in self._ready.values()),
            self._standings,
            self._in_hand(),
            clock=self._clock,
            now=self._loop.now,
            switch_s=self._times.switch_s,
        )

    def _to_look_at(self) -> tuple[Iterable[_Gang], int | None]:
        """Gangs that an order could be about, and how many jobs could get one: with a thousand gangs that matters."""
        gangs = self._gangs.values()
        if len(gangs) <= _FEW_GANGS:
            return gangs, None
        num_ready = len(self._ready)
        if num_ready < len(self._idle) and any(len(gang.jobs) > 1 for gang in gangs):
            return gangs, None  # some may be taken over
        names = {**self._changed, **dict.fromkeys(islice(self._idle, num_ready))}
        if num_ready > len(self._idle):
            open_gangs = (self._gangs[name] for name in self._open)
            names |= {gang.name: None for gang in nsmallest(num_ready, open_gangs, key=lambda gang: gang.left)}
        starts = [
            start
            for job in (self._ready[name] for name in self._fresh)
            if (start := self._start_of(job)) + job.cost / job.weight <= self._furthest
        ]
        if starts:
            first, most = min(starts), 2 * len(starts) + 8
            names |= {gang.name: None for gang in nlargest(most, gangs, key=lambda gang: gang.progress)}
            ending = (gang.name for gang in gangs if gang.is_ending and gang.next_at > first)
            names |= dict.fromkeys(islice(ending, most))
        return [self._gangs[name] for name in names], len(names) + len(self._fresh)

    def _start_of(self, job: _Job) -> float:
        """Where its tenant's virtual time is when it begins."""
        tenant, weight = job.ask.tenant, job.weight
        urgent, batch = (self._on_gangs.get((tenant, is_urgent), 0.0) for is_urgent in (True, False))
        if job.is_urgent(self._loop.now) and batch:
            return -inf
        credit = job.cost + 2 * self._times.switch_s
        return max(self._standings[tenant].virtual_time + (urgent + batch) / weight, self._clock - credit / weight)

    def _view(self, gang: _Gang) -> Gang:
        return Gang(
            name=gang.name,
            residents=tuple(job.resident for job in gang.jobs.values() if job.resident is not None),
            running=gang.running,
            leaving=frozenset(gang.leaving),
            lora=gang.lora,
            max_resident=self._max_resident,
            is_draining=gang.is_draining,
        )

    def _lift(self, tenant: str, to: float) -> None:
        before = self._standings[tenant]
        if to > before.virtual_time:
            self._standings[tenant] = Standing(weight=before.weight, virtual_time=to)

    # Gangs.

    def _enter(self, job: _Job, gang: _Gang) -> None:
        assert job.resident is not None
        gang.jobs[job.ask.id] = job
        key = job.ask.tenant, job.resident.claim.is_urgent
        self._on_gangs[key] = self._on_gangs.get(key, 0.0) + job.cost
        self._look(gang)
        self._go(gang)

    def _leave(self, job: _Job, gang: _Gang) -> None:
        gang.leaving.add(job.ask.id)
        job.record.num_released += 1
        self._loop.after(self._times.release_s if job.step else 0.0, partial(self._left, job, gang))

    def _left(self, job: _Job, gang: _Gang) -> None:
        self._remove(job, gang)
        self._wait(job)
        self._go(gang)

    def _remove(self, job: _Job, gang: _Gang) -> None:
        assert job.resident is not None
        del gang.jobs[job.ask.id]
        gang.leaving.discard(job.ask.id)
        key = job.ask.tenant, job.resident.claim.is_urgent
        left = self._on_gangs[key] - job.cost
        if left > 1e-9:
            self._on_gangs[key] = left
        else:
            del self._on_gangs[key]
        job.resident = None
        self._look(gang)

    def _look(self, gang: _Gang) -> None:
        self._changed[gang.name] = None
        self._idle.pop(gang.name, None)
        self._open.pop(gang.name, None)
        if not gang.jobs:
            gang.progress, gang.left = -inf, 0.0
        waiting = [
            job.resident.virtual_time for name, job in gang.jobs.items() if name != gang.running and job.resident
        ]
        gang.next_at = waiting[0] if len(waiting) == 1 and not gang.leaving else -inf
        if len(gang.jobs) <= self._max_resident and not gang.is_draining:
            (self._open if gang.jobs else self._idle)[gang.name] = None

    def _go(self, gang: _Gang) -> None:
        if gang.stepping:
            return
        # The last to come waits until its ranks have let go of another.
        held = islice(gang.jobs.items(), self._max_resident)
        residents = [job.resident for name, job in held if name not in gang.leaving and job.resident is not None]
        switch_s = self._times.switch_s
        gang.stepping = next_step(
            residents, running=gang.running, lora=gang.lora, switch_s=switch_s, share_tokens=self._share_tokens
        )
        if not gang.stepping:
            gang.running = None
            return
        first = gang.stepping[0]
        if gang.running is not None and gang.running != first and gang.running in gang.jobs:
            gang.jobs[gang.running].record.num_interrupted += 1
        if gang.running != first:
            self._look(gang)
            self._place_soon(self._times.arrange_s)
        gang.running = first
        stepping = [gang.jobs[name] for name in gang.stepping]
        resident = stepping[0].resident
        assert resident is not None
        gang.progress, gang.left = resident.virtual_time, resident.cost
        gang.is_ending = resident.claim.num_steps - resident.step <= 1
        self._furthest = max(self._furthest, gang.progress)
        seconds = max(job.ask.step_s * job.ask.slowness for job in stepping) * len(stepping)
        if stepping[0].ask.lora != gang.lora:
            gang.lora = stepping[0].ask.lora
            seconds += switch_s
        for job in stepping:
            job.record.began_at = min(job.record.began_at, self._loop.now)
        self._loop.after(seconds, partial(self._stepped, gang))

    def _stepped(self, gang: _Gang) -> None:
        stepped, gang.stepping = gang.stepping, ()
        for name in stepped:
            job = gang.jobs[name]
            self._charge(job)
            if job.step == job.ask.num_steps:
                self._denoised(job, gang)
            elif name in gang.leaving or gang.is_draining:
                self._leave(job, gang)
        self._go(gang)
        if gang.name in self._changed:
            self._place_soon(self._times.arrange_s if gang.jobs else 0.0)

    def _charge(self, job: _Job) -> None:
        ask, resident = job.ask, job.resident
        assert resident is not None
        job.step += 1
        job.record.steps_run += 1
        job.resident = Resident(job_id=ask.id, claim=resident.claim, step=job.step, signature=resident.signature)
        self._on_gangs[ask.tenant, resident.claim.is_urgent] -= ask.step_s
        before = self._standings[ask.tenant]
        self._standings[ask.tenant] = Standing(
            weight=before.weight, virtual_time=before.virtual_time + ask.step_s / before.weight
        )
        self.delivered.append((self._loop.now, ask.tenant, ask.step_s))

    def _denoised(self, job: _Job, gang: _Gang) -> None:
        job.record.denoised_at = self._loop.now
        self._remove(job, gang)
        self._loop.after(self._times.decode_s, partial(self._ended, job))

    def _ended(self, job: _Job) -> None:
        job.record.ended_at = self._loop.now
        del self._claimed[job.ask.id]
        self._may_claim = True
        self._on_end(job.record)
