"""The service under virtual time: a dispatcher and gangs that know no tensors, driven by ``serve.policy``.

What the policy decides is decided here by the same functions; what takes time (a step, a text embedding,
a change of strength) takes it by the clock of an ``EventLoop``. The text encoder
has no queue, and the VAE only where that is asked for.
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
from serve.policy.demand import Demand
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
    prepare_s: float | None = None
    decode_s: float | None = None
    """None: as long as everybody's."""


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
    crowded: float = 1.0
    """What everything takes longer that begins while another job is in hand: stages that share processors."""
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
    began_at: float = 0.0
    """When the step under way began."""
    step_s: float = 0.0
    """What a step of those under way takes."""
    uncharged: int = 0
    """Steps under way: more than one if nothing that the gang holds can come between them."""
    turn: int = 0
    """Of the steps under way; the end of former ones means nothing any more."""
    progress: float = -inf
    """Virtual time of the running job at ``began_at``."""
    pace: float = 0.0
    """By which it grows in a step."""
    ends_at: float = 0.0
    """When the running job will have made its last step, as predicted."""


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
        is_coarse: take all steps as one event that nothing can come between; the times of deliveries are coarse then.
        checkpoint_every: steps of which a job loses those after the last checkpoint when its gang fails.
        num_decoders: jobs that are decoded at once, in the order in which they come; None: as many as there are.
        on_end: told of every job that has ended.

    Attributes:
        records: by job id.
        delivered: (virtual seconds, tenant, gang-seconds) of every step.
        busy_s: seconds that gangs spent on steps.
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
        is_coarse: bool = False,
        checkpoint_every: int = 10,
        num_decoders: int | None = None,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.records: dict[str, Record] = {}
        self.delivered: list[tuple[float, str, float]] = []
        self._loop = loop
        self._weights = weights
        self._times = times
        self._max_resident = max_resident
        self._window = window
        self._max_running = max_running or {}
        self._share_tokens = share_tokens
        self._is_coarse = is_coarse and not share_tokens
        self._checkpoint_every = checkpoint_every
        self._num_decoders = num_decoders
        self._on_end = on_end
        self._gangs = {str(number): _Gang(str(number)) for number in range(num_gangs)}
        self._num_made = num_gangs
        self._num_shared = 0
        """Gangs with more than one job."""
        self._num_unfinished = 0
        self._asked_s = self._delivered_s = self._whole_s = self.busy_s = 0.0
        self._has_batch = False
        # Seldom polls have to take many at once, or a few tenants could not keep a thousand gangs busy.
        self._look_ahead = max(_LOOK_AHEAD, window or num_gangs) if is_coarse else _LOOK_AHEAD
        self._queued: dict[tuple[str, Priority], deque[_Job]] = {}
        self._claimed: dict[str, _Job] = {}
        self._ahead: dict[str, _Job] = {}
        self._ready: dict[str, _Job] = {}
        self._standings: dict[str, Standing] = {}
        self._on_gangs: dict[tuple[str, bool], float] = {}
        self._to_decode: deque[_Job] = deque()
        self._num_decoding = 0
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
        self._has_batch |= ask.priority == "batch"
        cost = ask.num_steps * ask.step_s
        self._num_unfinished += 1
        self._asked_s += cost
        self._whole_s += cost
        if not self._is_polling:
            self._is_polling = True
            self._loop.after(0.0, self._poll)

    @property
    def demand(self) -> Demand:
        """As a dispatcher tells it; steps of a stretch count when somebody has looked at their gang."""
        num_jobs = self._num_unfinished
        return Demand(
            num_jobs=num_jobs,
            backlog_s=max(0.0, self._asked_s - self._delivered_s) if num_jobs else 0.0,
            job_s=self._whole_s / num_jobs if num_jobs else 0.0,
            asked_s=self._asked_s,
        )

    @property
    def gangs(self) -> list[str]:
        """Names of the gangs that are not told to go, the oldest first."""
        return [gang.name for gang in self._gangs.values() if not gang.is_draining]

    @property
    def num_gangs(self) -> int:
        """All of them, those that are on their way out, too."""
        return len(self._gangs)

    def add(self) -> str:
        """A gang is ready; returns its name."""
        name = str(self._num_made)
        self._num_made += 1
        gang = self._gangs[name] = _Gang(name)
        self._look(gang)
        self._place_soon()
        return name

    def drain(self, gang: str) -> None:
        """A gang, named ``"0"`` and so on, is told to go: its jobs go on elsewhere."""
        going = self._gangs[gang]
        going.is_draining = True
        self._cut(going)
        self._look(going)
        self._place_soon()

    def fail(self, gang: str) -> None:
        """A gang is gone, and its jobs go on elsewhere from their last checkpoints."""
        lost = self._gangs[gang]
        self._sync(lost)
        lost.turn += 1
        lost.stepping = ()
        lost.is_draining = True
        for job in list(lost.jobs.values()):
            self._remove(job, lost)
            kept = job.step - job.step % self._checkpoint_every
            self._delivered_s -= (job.step - kept) * job.ask.step_s
            job.step = kept
            self._wait(job)
        self._forget(lost)

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
            seconds = self._times.prepare_s if job.ask.prepare_s is None else job.ask.prepare_s
            self._loop.after(seconds * self._pace, partial(self._prepared, job))
        if self._claimed or any(self._queued.values()):
            self._loop.after(self._times.poll_s, self._poll)
        else:
            self._is_polling = False

    def _claimable(self) -> list[_Job]:
        now = self._loop.now
        shown = {job.ask.id: job for lane in self._queued.values() for job in islice(lane, self._look_ahead)}
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
        window = self._window or max(1, len(self._gangs))
        return [shown[name] for name in claims(queued, held, window=window, max_running=self._max_running)]

    def _in_hand(self) -> Iterable[InHand]:
        for (tenant, urgent), cost in self._on_gangs.items():
            yield InHand(tenant=tenant, cost=cost, is_urgent=urgent)

    def _renew_claims(self) -> None:
        """Batch jobs grow old on gangs, too."""
        if not self._has_batch:
            return
        for gang in self._gangs.values():
            for job in gang.jobs.values():
                if job.resident is None or job.resident.claim.is_urgent or not job.is_urgent(self._loop.now):
                    continue
                for urgent, cost in ((False, -job.cost), (True, job.cost)):
                    key = job.ask.tenant, urgent
                    self._on_gangs[key] = self._on_gangs.get(key, 0.0) + cost
                job.resident = replace(job.resident, claim=replace(job.resident.claim, is_urgent=True))
                self._look_again(gang)

    def _advance_clock(self) -> None:
        for gang in self._gangs.values():
            self._sync(gang)
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
        for gang in gangs:
            self._sync(gang)
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
                self._cut(gang)
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
        if num_ready < len(self._idle) and self._num_shared:
            return gangs, None  # some may be taken over
        names = {**self._changed, **dict.fromkeys(islice(self._idle, num_ready))}
        if num_ready > len(self._idle):
            open_gangs = (self._gangs[name] for name in self._open)
            names |= {gang.name: None for gang in nsmallest(num_ready, open_gangs, key=lambda gang: gang.ends_at)}
        starts = [
            start
            for job in (self._ready[name] for name in self._fresh)
            if (start := self._start_of(job)) + job.cost / job.weight <= self._furthest
        ]
        if starts:
            most = 2 * len(starts) + 8
            names |= {gang.name: None for gang in nlargest(most, gangs, key=self._progress)}
            ending = (gang.name for gang in gangs if len(gang.jobs) == 2 and self._is_ending(gang))
            names |= dict.fromkeys(islice(ending, most))
        return [self._gangs[name] for name in names], len(names) + len(self._fresh)

    def _progress(self, gang: _Gang) -> float:
        if gang.uncharged <= 1:
            return gang.progress
        return gang.progress + (self._loop.now - gang.began_at) / gang.step_s * gang.pace

    def _is_ending(self, gang: _Gang) -> bool:
        """Whether it makes the last step of its running job."""
        job = gang.jobs.get(gang.running or "")
        if job is None or not gang.stepping:
            return False
        done = int((self._loop.now - gang.began_at) / gang.step_s) if gang.uncharged > 1 else 0
        return job.ask.num_steps - job.step - done <= 1

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
        self._num_shared += len(gang.jobs) == 2
        key = job.ask.tenant, job.resident.claim.is_urgent
        self._on_gangs[key] = self._on_gangs.get(key, 0.0) + job.cost
        self._look(gang)
        self._look_again(gang)
        self._go(gang)

    def _leave(self, job: _Job, gang: _Gang) -> None:
        gang.leaving.add(job.ask.id)
        job.record.num_released += 1
        self._loop.after(self._times.release_s if job.step else 0.0, partial(self._left, job, gang))

    def _left(self, job: _Job, gang: _Gang) -> None:
        if gang.jobs.get(job.ask.id) is not job:
            return  # the gang has failed meanwhile
        self._remove(job, gang)
        self._wait(job)
        self._go(gang)

    def _remove(self, job: _Job, gang: _Gang) -> None:
        assert job.resident is not None
        del gang.jobs[job.ask.id]
        self._num_shared -= len(gang.jobs) == 1
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
            gang.progress, gang.ends_at = -inf, 0.0
            if gang.is_draining:
                self._forget(gang)
                return
        if len(gang.jobs) <= self._max_resident and not gang.is_draining:
            (self._open if gang.jobs else self._idle)[gang.name] = None

    def _forget(self, gang: _Gang) -> None:
        for known in (self._gangs, self._idle, self._open, self._changed):
            known.pop(gang.name, None)

    def _go(self, gang: _Gang) -> None:
        if gang.stepping or gang.name not in self._gangs:
            return
        # The last to come waits until its ranks have let go of another.
        gang.stepping = self._next_step(gang, self._held(gang))
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
        gang.progress, gang.ends_at = resident.virtual_time, self._loop.now + resident.cost
        gang.pace = resident.claim.step_cost / resident.claim.weight
        gang.step_s = max(job.ask.step_s * job.ask.slowness for job in stepping) * len(stepping) * self._pace
        gang.began_at = self._loop.now
        if stepping[0].ask.lora != gang.lora:
            gang.lora = stepping[0].ask.lora
            gang.began_at += self._times.switch_s
        gang.uncharged = 1
        if self._is_coarse and not gang.is_draining and self._is_undisturbed(gang):
            gang.uncharged = resident.claim.num_steps - resident.step
        self._furthest = max(self._furthest, gang.progress + (gang.uncharged - 1) * gang.pace)
        for job in stepping:
            job.record.began_at = min(job.record.began_at, self._loop.now)
        self._end_after(gang)

    def _held(self, gang: _Gang) -> list[Resident]:
        held = islice(gang.jobs.items(), self._max_resident)
        return [job.resident for name, job in held if name not in gang.leaving and job.resident is not None]

    def _next_step(self, gang: _Gang, residents: Iterable[Resident]) -> tuple[str, ...]:
        return next_step(
            residents,
            running=gang.running,
            lora=gang.lora,
            switch_s=self._times.switch_s,
            share_tokens=self._share_tokens,
        )

    # Stretches: steps of one job that nothing which the gang holds comes between.

    def _is_undisturbed(self, gang: _Gang) -> bool:
        """Whether the job under way still is chosen for its last step, when it has come furthest."""
        held = self._held(gang)
        if len(held) == 1:
            return True
        (name,) = gang.stepping
        last = [replace(one, step=one.claim.num_steps - 1) if one.job_id == name else one for one in held]
        return self._next_step(gang, last) == (name,)

    def _end_after(self, gang: _Gang) -> None:
        gang.turn += 1
        self._loop.at(gang.began_at + gang.uncharged * gang.step_s, partial(self._stepped, gang, gang.turn))

    def _sync(self, gang: _Gang) -> None:
        """Charge the steps of a stretch that are done."""
        if gang.uncharged <= 1 or self._loop.now < gang.began_at + gang.step_s:
            return
        done = min(gang.uncharged - 1, int((self._loop.now - gang.began_at) / gang.step_s + 1e-9))
        (name,) = gang.stepping
        self._charge(gang.jobs[name], done)
        gang.uncharged -= done
        gang.began_at += done * gang.step_s
        gang.progress += done * gang.pace

    def _cut(self, gang: _Gang) -> None:
        """End a stretch with the step that is under way."""
        self._sync(gang)
        if gang.uncharged > 1:
            gang.uncharged = 1
            self._end_after(gang)

    def _look_again(self, gang: _Gang) -> None:
        """What a gang holds is not what it was when the stretch began."""
        if gang.uncharged > 1 and not self._is_undisturbed(gang):
            self._cut(gang)

    def _stepped(self, gang: _Gang, turn: int) -> None:
        if turn != gang.turn:
            return
        stepped, gang.stepping = gang.stepping, ()
        num_steps, gang.uncharged = gang.uncharged, 0
        for name in stepped:
            job = gang.jobs[name]
            self._charge(job, num_steps)
            if job.step == job.ask.num_steps:
                self._denoised(job, gang)
            elif name in gang.leaving or gang.is_draining:
                self._leave(job, gang)
        self._go(gang)
        if gang.name in self._changed:
            self._place_soon(self._times.arrange_s if gang.jobs else 0.0)

    def _charge(self, job: _Job, num_steps: int) -> None:
        ask, resident = job.ask, job.resident
        assert resident is not None
        cost = num_steps * ask.step_s
        self._delivered_s += cost
        self.busy_s += cost * ask.slowness
        job.step += num_steps
        job.record.steps_run += num_steps
        job.resident = Resident(job_id=ask.id, claim=resident.claim, step=job.step, signature=resident.signature)
        self._on_gangs[ask.tenant, resident.claim.is_urgent] -= cost
        before = self._standings[ask.tenant]
        self._standings[ask.tenant] = Standing(
            weight=before.weight, virtual_time=before.virtual_time + cost / before.weight
        )
        self.delivered.append((self._loop.now, ask.tenant, cost))

    def _denoised(self, job: _Job, gang: _Gang) -> None:
        job.record.denoised_at = self._loop.now
        self._num_unfinished -= 1
        self._whole_s -= job.ask.num_steps * job.ask.step_s
        self._remove(job, gang)
        self._to_decode.append(job)
        self._decode()

    # The VAE.

    def _decode(self) -> None:
        while self._to_decode and (self._num_decoders is None or self._num_decoding < self._num_decoders):
            job = self._to_decode.popleft()
            self._num_decoding += 1
            seconds = self._times.decode_s if job.ask.decode_s is None else job.ask.decode_s
            self._loop.after(seconds * self._pace, partial(self._ended, job))

    @property
    def _pace(self) -> float:
        """By which what begins now takes longer than measured alone."""
        return self._times.crowded if len(self._claimed) > 1 else 1.0

    def _ended(self, job: _Job) -> None:
        self._num_decoding -= 1
        self._decode()
        job.record.ended_at = self._loop.now
        del self._claimed[job.ask.id]
        self._may_claim = True
        self._on_end(job.record)
