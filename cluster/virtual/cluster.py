"""The service under virtual time: a dispatcher and gangs that know no tensors, driven by ``serve.policy``.

What the policy decides is decided here by the same functions; what takes time (a step, a text embedding,
a change of strength) takes it by the clock of an ``EventLoop``. The text encoder
has no queue, and the VAE only where that is asked for.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from math import inf

from cluster.virtual.decoders import Decoders
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.gang import Gang
from cluster.virtual.job import Ask, Job, Record, Times
from cluster.virtual.shares import Shares
from cluster.virtual.sight import Sight
from serve.policy.admission import Held, Queued, claims
from serve.policy.demand import Demand
from serve.policy.fairness import InHand
from serve.policy.placement import Place, orders
from serve.policy.priority import Priority

_LOOK_AHEAD = 8
"""Queued jobs of every tenant and class that one look at the queue shows."""


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
        share_tokens: see ``serve.policy.tick.next_step``.
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
        max_running: Mapping[str, int] | None = None,
        share_tokens: int = 0,
        is_coarse: bool = False,
        checkpoint_every: int = 10,
        num_decoders: int | None = None,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.records: dict[str, Record] = {}
        self.delivered: list[tuple[float, str, float]] = []
        self.busy_s = 0.0
        self._loop = loop
        self._weights = weights
        self._times = times
        self._window = window
        self._max_running = max_running or {}
        self._is_coarse = is_coarse and not share_tokens
        self._checkpoint_every = checkpoint_every
        self._on_end = on_end
        self._new_gang = partial(Gang, max_resident=max_resident, switch_s=times.switch_s, share_tokens=share_tokens)
        self._shares = Shares(times.switch_s)
        self._sight = Sight()
        self._decoders = Decoders(loop, num_decoders, self._decode_s, self._ended)
        # Seldom polls have to take many at once, or a few tenants could not keep a thousand gangs busy.
        self._look_ahead = max(_LOOK_AHEAD, window or num_gangs) if is_coarse else _LOOK_AHEAD
        self._queued: dict[tuple[str, Priority], deque[Job]] = {}
        self._claimed: dict[str, Job] = {}
        self._ahead: dict[str, Job] = {}
        """Claimed, and not yet on a gang."""
        self._ready: dict[str, Job] = {}
        """Of those, the prepared ones."""
        self._gangs: dict[str, Gang] = {}
        self._num_made = self._num_unfinished = 0
        self._asked_s = self._delivered_s = self._whole_s = 0.0
        self._has_batch = self._is_polling = self._may_claim = False
        self._place_at = inf
        for _ in range(num_gangs):
            self._make_gang()

    def ask(self, ask: Ask) -> None:
        """A client creates a job, now."""
        record = self.records[ask.id] = Record(ask, self._loop.now)
        weight = self._weights.get(ask.tenant, 1.0)
        self._shares.add(ask.tenant, weight)
        self._queued.setdefault((ask.tenant, ask.priority), deque()).append(Job(record, weight))
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
            started_at=0.0,
            age_s=self._loop.now,
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
        gang = self._make_gang()
        self._place_soon()
        return gang.name

    def drain(self, gang: str) -> None:
        """A gang, named ``"0"`` and so on, is told to go: its jobs go on elsewhere."""
        going = self._gangs[gang]
        going.is_draining = True
        self._cut(going)
        self._note(going)
        self._place_soon()

    def fail(self, gang: str) -> None:
        """A gang is gone, and its jobs go on elsewhere from their last checkpoints."""
        lost = self._gangs[gang]
        self._charge_done(lost)
        lost.turn += 1
        lost.stepping = ()
        lost.is_draining = True
        for job in list(lost.jobs.values()):
            self._drop(job, lost)
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
            self._loop.after(seconds * self._crowded, partial(self._prepared, job))
        if self._claimed or any(self._queued.values()):
            self._loop.after(self._times.poll_s, self._poll)
        else:
            self._is_polling = False

    def _claimable(self) -> list[Job]:
        now = self._loop.now
        shown = {job.ask.id: job for lane in self._queued.values() for job in islice(lane, self._look_ahead)}
        if not shown:
            return []
        ahead = (
            InHand(tenant=job.ask.tenant, cost=job.cost, is_urgent=job.is_urgent(now)) for job in self._ahead.values()
        )
        queued = (
            Queued(id=turn.job_id, tenant=turn.tenant, is_urgent=shown[turn.job_id].is_urgent(now))
            for turn in self._shares.turns(shown.values(), now, ahead)
        )
        held = (
            Held(tenant=job.ask.tenant, is_urgent=job.is_urgent(now), is_ahead=name in self._ahead)
            for name, job in self._claimed.items()
        )
        window = self._window or max(1, len(self._gangs))
        return [shown[name] for name in claims(queued, held, window=window, room=self._room())]

    def _room(self) -> dict[str, int]:
        num_running = Counter(job.ask.tenant for job in self._claimed.values()) if self._max_running else Counter()
        return {tenant: max(0, limit - num_running[tenant]) for tenant, limit in self._max_running.items()}

    def _renew_claims(self) -> None:
        """Batch jobs grow old on gangs, too."""
        if not self._has_batch:
            return
        for gang in self._gangs.values():
            for job in gang.jobs.values():
                if job.resident is None or job.resident.claim.is_urgent or not job.is_urgent(self._loop.now):
                    continue
                self._shares.become_urgent(job)
                job.resident = replace(job.resident, claim=replace(job.resident.claim, is_urgent=True))
                self._cut_if_disturbed(gang)

    def _advance_clock(self) -> None:
        for gang in self._gangs.values():
            self._charge_done(gang)
        running = [
            gang.jobs[name].resident for gang in self._gangs.values() for name in gang.stepping[:1] if name in gang.jobs
        ]
        at_work = [one for one in running if one is not None]
        self._shares.advance(at_work, self._ready.values(), self._loop.now)

    # Placement.

    def _prepared(self, job: Job) -> None:
        job.record.ready_at = self._loop.now
        self._wait(job)

    def _wait(self, job: Job) -> None:
        self._ahead[job.ask.id] = self._ready[job.ask.id] = job
        self._sight.note_ready(job)
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
        now = self._loop.now
        gangs, most = self._sight.look(self._ready, self._shares, now)
        turns = {turn.job_id: turn for turn in islice(self._shares.turns(self._ready.values(), now), most)}
        candidates = {name: self._ready[name].candidate(turn.virtual_time, now) for name, turn in turns.items()}
        for gang in gangs:
            self._charge_done(gang)
        views = [gang.view() for gang in gangs]
        for order in orders(views, list(candidates.values()), switch_s=self._times.switch_s):
            gang = self._gangs[order.gang]
            if isinstance(order, Place):
                job = self._ready.pop(order.job_id)
                del self._ahead[order.job_id]
                self._may_claim = True
                self._shares.lift(job.ask.tenant, turns[order.job_id].lifted_to)
                job.resident = candidates[order.job_id]
                self._enter(job, gang)
            elif order.job_id in gang.stepping:
                gang.leaving.add(order.job_id)
                self._cut(gang)
            else:
                self._leave(gang.jobs[order.job_id], gang)

    # Gangs come and go, and so do their jobs.

    def _make_gang(self) -> Gang:
        name = str(self._num_made)
        self._num_made += 1
        gang = self._gangs[name] = self._new_gang(name=name)
        self._note(gang)
        return gang

    def _note(self, gang: Gang) -> None:
        if gang.is_draining and not gang.jobs:
            self._forget(gang)
        else:
            self._sight.note(gang)

    def _forget(self, gang: Gang) -> None:
        self._gangs.pop(gang.name, None)
        self._sight.forget(gang)

    def _enter(self, job: Job, gang: Gang) -> None:
        gang.take(job)
        self._shares.enter(job)
        self._note(gang)
        self._cut_if_disturbed(gang)
        self._go(gang)

    def _leave(self, job: Job, gang: Gang) -> None:
        gang.leaving.add(job.ask.id)
        job.record.num_released += 1
        self._loop.after(self._times.release_s if job.step else 0.0, partial(self._left, job, gang))

    def _left(self, job: Job, gang: Gang) -> None:
        if gang.jobs.get(job.ask.id) is not job:
            return  # the gang has failed meanwhile
        self._drop(job, gang)
        self._wait(job)
        self._go(gang)

    def _drop(self, job: Job, gang: Gang) -> None:
        self._shares.leave(job)
        gang.drop(job)
        self._note(gang)

    # Steps.

    def _go(self, gang: Gang) -> None:
        if gang.stepping or gang.name not in self._gangs:
            return
        stepping = gang.next_step()
        if not stepping:
            gang.running = None
            return
        if gang.running != stepping[0]:
            if gang.running in gang.jobs:
                gang.jobs[gang.running].record.num_interrupted += 1
            self._note(gang)
            self._place_soon(self._times.arrange_s)
        gang.begin(stepping, self._loop.now, self._crowded, self._is_coarse)
        self._sight.note_progress(gang)
        for name in stepping:
            record = gang.jobs[name].record
            record.began_at = min(record.began_at, self._loop.now)
        self._end_later(gang)

    def _end_later(self, gang: Gang) -> None:
        gang.turn += 1
        self._loop.at(gang.began_at + gang.uncharged * gang.step_s, partial(self._stepped, gang, gang.turn))

    def _stepped(self, gang: Gang, turn: int) -> None:
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
        if self._sight.has_changed(gang):
            self._place_soon(self._times.arrange_s if gang.jobs else 0.0)

    def _charge_done(self, gang: Gang) -> None:
        """Charge the steps of a stretch that are done."""
        num_steps = gang.done(self._loop.now)
        if num_steps:
            (name,) = gang.stepping
            self._charge(gang.jobs[name], num_steps)
            gang.charged(num_steps)

    def _cut(self, gang: Gang) -> None:
        """End a stretch with the step that is under way."""
        self._charge_done(gang)
        if gang.uncharged > 1:
            gang.uncharged = 1
            self._end_later(gang)

    def _cut_if_disturbed(self, gang: Gang) -> None:
        """What a gang holds is not what it was when the stretch began."""
        if gang.uncharged > 1 and not gang.is_undisturbed():
            self._cut(gang)

    def _charge(self, job: Job, num_steps: int) -> None:
        ask = job.ask
        cost = num_steps * ask.step_s
        self._delivered_s += cost
        self.busy_s += cost * ask.slowness
        job.advance(num_steps)
        self._shares.charge(job, cost)
        self.delivered.append((self._loop.now, ask.tenant, cost))

    # The end.

    def _denoised(self, job: Job, gang: Gang) -> None:
        job.record.denoised_at = self._loop.now
        self._num_unfinished -= 1
        self._whole_s -= job.ask.num_steps * job.ask.step_s
        self._drop(job, gang)
        self._decoders.add(job)

    def _decode_s(self, job: Job) -> float:
        return (self._times.decode_s if job.ask.decode_s is None else job.ask.decode_s) * self._crowded

    def _ended(self, job: Job) -> None:
        job.record.ended_at = self._loop.now
        del self._claimed[job.ask.id]
        self._may_claim = True
        self._on_end(job.record)

    @property
    def _crowded(self) -> float:
        """By which what begins now takes longer than measured alone."""
        return self._times.crowded if len(self._claimed) > 1 else 1.0
