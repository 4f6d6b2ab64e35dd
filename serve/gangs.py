"""The gangs as a dispatcher sees them: which there are, what each holds, and how a job gets through its steps.

A gang registers again and again, so that a new dispatcher learns of it. The dispatcher renews what it
put on a gang about once a second; a gang that does not answer is given up, and its jobs with it. Which
job goes where, and who makes room, is the policy's choice (``serve.policy.placement``).
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Protocol

from pusa_dist.errors import PusaError
from serve.attempt import Attempt
from serve.config import ANSWER_S, HOLD_S, MAX_MISSED
from serve.ledger import Ledger
from serve.policy import placement
from serve.policy.fairness import InHand, Turn, Waiting
from serve.policy.placement import Place
from serve.policy.priority import is_urgent
from serve.policy.tick import Claim, Resident
from serve.seats import RegisteredGang, Seat
from serve.stages import (
    Assignment,
    Checkpoint,
    Checkpointed,
    Conditions,
    Finished,
    GangHandle,
    GangSilentError,
    GangUnavailableError,
    Previewed,
    Progress,
    Released,
    Renewal,
    ReplicaLostError,
    TensorRef,
)
from serve.store.artifacts import StorageError
from serve.store.jobs import Job

logger = logging.getLogger(__name__)

ARRANGE_S = 0.5
"""Places are looked at again after this long even if nothing seems to have changed: standings have."""


class Metrics(Protocol):
    """Where moves, waits and shares are reported; see ``serve.metrics.JobMetrics``."""

    def stage(self, stage: str, seconds: float) -> None: ...  # noqa: D102
    def released(self) -> None: ...  # noqa: D102
    def repeated(self) -> None: ...  # noqa: D102
    def delivered(self, cost: float, weight: float) -> None: ...  # noqa: D102
    def spread(self, seconds: float) -> None: ...  # noqa: D102
    def gang_lost(self) -> None: ...  # noqa: D102


Publish = Callable[[Attempt, Checkpoint], Awaitable[bool]]
"""Makes a checkpoint the one that the next attempt begins at; False: the attempt is stale."""
Show = Callable[[Attempt, Previewed], None]
"""Makes a preview what the job's owner sees of it; at once, and without failing."""


class Gangs:
    """Every gang that has registered, and every job that is ready for one.

    Args:
        owner: name of this dispatcher.
        ledger: what orders the jobs, and is told of every step.
        metrics: told of what happens to jobs and gangs.
        publish: see ``Publish``.
        show: see ``Show``.
        clock: Unix seconds.
    """

    def __init__(
        self,
        owner: str,
        ledger: Ledger,
        metrics: Metrics,
        publish: Publish,
        show: Show,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._owner = owner
        self._ledger = ledger
        self._metrics = metrics
        self._publish = publish
        self._show = show
        self._clock = clock
        self._gangs: dict[str, RegisteredGang] = {}
        self._seats: dict[str, Seat] = {}
        self._queued_turns: list[Turn] = []
        self._changed = asyncio.Event()
        self._is_closing = False
        self._calls: set[asyncio.Task[None]] = set()

    def register(self, name: str, handle: GangHandle, max_resident: int) -> None:
        """A gang is there; it is used as soon as it has answered."""
        if name not in self._gangs and not self._is_closing:
            logger.info("gang %s registered", name)
            gang = self._gangs[name] = RegisteredGang(name, handle, max_resident)
            gang.holding = asyncio.create_task(self._hold(gang))

    async def denoise(self, attempt: Attempt, source: Conditions | Checkpoint) -> TensorRef:
        """Take a job through its steps, on as many gangs as it takes; see ``serve.attempt.Denoise``.

        Raises:
            GangError: a gang was lost while it held the job.
            GangSilentError: a gang that held the job does not answer any more.
            ReplicaLostError: one never answered, or a tensor of the job is lost.
            PusaError: the job's own error.
        """
        job_id = attempt.job.id
        step = source.step if isinstance(source, Checkpoint) else 0
        seat = self._seats[job_id] = Seat(attempt, source, step)
        try:
            while True:
                self._changed.set()
                began = time.perf_counter()
                try:  # it may be stopped in the moment in which it was given its place
                    await seat.placed.wait()
                    self._metrics.stage("place", time.perf_counter() - began)
                    last = await self._follow(seat)
                finally:
                    seat.leave()
                if isinstance(last, Finished):
                    return last.latents
        finally:
            self._seats.pop(job_id, None)
            self._changed.set()

    async def run(self) -> None:
        """Give places to jobs until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(ARRANGE_S):
                    await self._changed.wait()
            self._changed.clear()
            self.arrange()

    async def close(self, timeout_s: float) -> None:
        """Ask every gang for the jobs of this dispatcher, and wait until they are back, each at its checkpoint."""
        self._is_closing = True
        for seat in self._seats.values():
            self._release(seat)
        deadline = time.monotonic() + timeout_s
        while self.num_placed and time.monotonic() < deadline:  # noqa: ASYNC110 - once in a dispatcher's life
            await asyncio.sleep(0.02)
        for gang in self._gangs.values():
            if gang.holding is not None:
                gang.holding.cancel()
        self._gangs.clear()

    @property
    def num_free(self) -> int:
        """Places for further jobs."""
        return sum(gang.num_free for gang in self._gangs.values())

    @property
    def states(self) -> Counter[str]:
        """How many gangs are in which condition."""
        return Counter(gang.condition for gang in self._gangs.values())

    @property
    def num_placed(self) -> int:
        """Jobs on gangs."""
        return sum(len(gang.seats) for gang in self._gangs.values())

    def is_placed(self, job_id: str) -> bool:
        """Whether a gang has the job."""
        seat = self._seats.get(job_id)
        return seat is not None and seat.gang is not None

    def turns(self, others: Iterable[Waiting]) -> list[Turn]:
        """The order of all waiting jobs: those that are ready, and others that are not here yet."""
        ready = [self._waiting(seat) for seat in self._seats.values() if seat.gang is None]
        return self._ledger.order([*ready, *others], self._in_hand(), self._switch_s)

    def note_queue(self, turns: list[Turn]) -> None:
        """The first turn of every tenant that has jobs elsewhere; the virtual clock must not pass them."""
        self._queued_turns = turns

    def arrange(self) -> None:
        """Give places to ready jobs, and let jobs go that others should take the place of."""
        turns = {turn.job_id: turn for turn in self.turns(())}
        ready = [self._resident(self._seats[job_id], turn) for job_id, turn in turns.items()]
        now = time.monotonic()
        gangs = [gang.seen(gang.state, now) for gang in self._gangs.values() if gang.state is not None]
        running = [one for gang in gangs for one in gang.residents if one.job_id == gang.running]
        self._ledger.advance(running, [*turns.values(), *self._queued_turns])
        self._metrics.spread(_spread([*turns.values(), *self._queued_turns]))
        by_id = {one.job_id: one for one in ready}
        usable = [gang for gang in gangs if gang.is_draining or self._gangs[gang.name].is_open]
        for order in placement.orders(usable, ready, switch_s=self._switch_s):
            seat = self._seats[order.job_id]
            if isinstance(order, Place):
                self._ledger.lift(seat.job.tenant, turns[order.job_id].lifted_to)
                seat.place(self._gangs[order.gang], by_id[order.job_id].claim)
            else:
                logger.info("job %s: asked to make room on gang %s", order.job_id, order.gang)
                self._release(seat)

    def _release(self, seat: Seat) -> None:
        if seat.gang is not None and not seat.is_leaving:
            seat.is_leaving = True
            self._call(seat.gang.handle.release(seat.job.id, seat.job.attempt))

    async def _follow(self, seat: Seat) -> Finished | Released:
        """One stay on a gang."""
        gang, claim = seat.gang, seat.claim
        assert gang is not None
        assert claim is not None
        is_held = False
        assignment = Assignment(
            job_id=seat.job.id,
            attempt=seat.job.attempt,
            owner=self._owner,
            request=seat.job.request,
            source=seat.source,
            claim=claim,
            preview_every=seat.job.preview_every,
        )
        try:
            async with asyncio.timeout(None) as seat.silence, aclosing(gang.handle.generate(assignment)) as messages:
                async for message in messages:
                    is_held = True
                    if isinstance(message, Progress):
                        self._progress(seat, gang, message)
                    elif isinstance(message, Checkpointed):
                        gang.store_failed_at = None
                        await self._published(seat, gang, message.checkpoint)
                    elif isinstance(message, Previewed):
                        self._show(seat.attempt, message)
                    elif isinstance(message, Released):
                        if message.checkpoint is not None:
                            await self._published(seat, gang, message.checkpoint)
                            seat.source, seat.step = message.checkpoint, message.checkpoint.step
                        self._metrics.released()
                        return message
                    else:
                        return message
            raise ReplicaLostError("the denoiser ended its stream without a result")
        except GangUnavailableError:
            gang.state = None  # nothing of the job ran there; it waits for another, or the replacement
            return Released(checkpoint=None)
        except StorageError:
            logger.warning("gang %s could not reach the artifact store: others are preferred for a while", gang.name)
            gang.store_failed_at = time.monotonic()
            raise
        except TimeoutError as error:
            if seat.silence is None or not seat.silence.expired():
                raise
            silent = GangSilentError if is_held else ReplicaLostError
            raise silent(f"gang {gang.name} does not answer") from error

    def _progress(self, seat: Seat, gang: RegisteredGang, message: Progress) -> None:
        attempt = seat.attempt
        seat.step = message.step
        attempt.at("denoise", message.step)
        if message.seconds == 0.0:
            return
        attempt.seconds.setdefault("wait", max(0.0, time.perf_counter() - message.seconds - seat.ready_at))
        if gang.running != seat.job.id and not message.is_guest:
            gang.running = seat.job.id
            self._changed.set()
        alone = self._ledger.shape(seat.job)
        shape = replace(alone, num_tokens=message.num_tokens)
        is_new = message.step > attempt.paid_steps
        if not is_new:
            self._metrics.repeated()
        attempt.paid_steps = max(attempt.paid_steps, message.step)
        tenant = seat.job.tenant
        cost = self._ledger.delivered(tenant, shape, message.seconds, message.num_sharing, is_new=is_new)
        if cost > 0.0:
            self._metrics.delivered(cost, self._ledger.standing(tenant).weight)

    async def _published(self, seat: Seat, gang: RegisteredGang, checkpoint: Checkpoint) -> None:
        known = seat.attempt.checkpoint
        if known is not None and known.step >= checkpoint.step:
            return
        if await self._publish(seat.attempt, checkpoint):
            self._call(gang.handle.published(seat.job.id, seat.job.attempt, checkpoint.step))

    async def _hold(self, gang: RegisteredGang) -> None:
        """Renew what is on the gang, and learn how it is, until it is silent for too long."""
        while gang.num_missed < MAX_MISSED:
            renewals = {seat.job.id: self._renewal(seat) for seat in gang.seats.values()}
            try:
                async with asyncio.timeout(ANSWER_S):
                    state = await gang.handle.hold(self._owner, renewals)
            except Exception as error:  # noqa: BLE001 - whatever it is: a gang that cannot be held is none
                gang.num_missed += 1
                gang.state = None
                logger.warning("gang %s does not answer: %s", gang.name, type(error).__name__)
            else:
                gang.num_missed = 0
                gang.has_said_goodbye = state.is_closed and not state.is_lost
                if state != gang.state:
                    gang.state = state
                    self._changed.set()
            await asyncio.sleep(HOLD_S)
        self._gangs.pop(gang.name, None)
        if not gang.has_said_goodbye:
            self._metrics.gang_lost()
        for seat in gang.seats.values():
            if seat.silence is not None:
                seat.silence.reschedule(asyncio.get_running_loop().time())

    def _renewal(self, seat: Seat) -> Renewal:
        assert seat.claim is not None
        published = seat.attempt.checkpoint
        return Renewal(
            attempt=seat.job.attempt,
            published_step=0 if published is None else published.step,
            claim=replace(seat.claim, is_urgent=self._is_urgent(seat.job)),
        )

    def _call(self, call: Awaitable[None]) -> None:
        """Something that a gang is told; if it cannot be told, its renewals fail, too."""

        async def tell() -> None:
            try:
                async with asyncio.timeout(ANSWER_S):
                    await call
            except (PusaError, TimeoutError) as error:
                logger.warning("a gang could not be told something: %s", type(error).__name__)

        task = asyncio.create_task(tell())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    @property
    def _switch_s(self) -> float:
        return max((gang.state.switch_s for gang in self._gangs.values() if gang.state is not None), default=0.0)

    def _is_urgent(self, job: Job) -> bool:
        return is_urgent(job.priority, job.created_at, self._clock())

    def _waiting(self, seat: Seat) -> Waiting:
        job = seat.job
        return Waiting(
            id=job.id,
            tenant=job.tenant,
            priority=job.priority,
            created_at=job.created_at,
            cost=self._ledger.cost_left(job, seat.step),
            is_started=seat.step > 0,
        )

    def _in_hand(self) -> list[InHand]:
        return [
            InHand(
                tenant=seat.job.tenant,
                cost=self._ledger.cost_left(seat.job, seat.step),
                is_urgent=self._is_urgent(seat.job),
            )
            for gang in self._gangs.values()
            for seat in gang.seats.values()
        ]

    def _resident(self, seat: Seat, turn: Turn) -> Resident:
        job = seat.job
        claim = Claim(
            tenant=job.tenant,
            weight=self._ledger.standing(job.tenant).weight,
            virtual_time=turn.virtual_time,
            step=seat.step,
            num_steps=job.request.num_inference_steps,
            step_cost=self._ledger.step_cost(job),
            is_urgent=self._is_urgent(job),
            created_at=job.created_at,
            num_tokens=job.request.num_tokens,
            lora=tuple(sorted(job.request.lora_alpha.items())),
        )
        return Resident(job_id=job.id, claim=claim, step=seat.step)


def _spread(turns: Iterable[Turn]) -> float:
    """How far the first turns of the tenants are apart, in virtual time."""
    first: dict[str, float] = {}
    for turn in turns:
        first[turn.tenant] = min(turn.virtual_time, first.get(turn.tenant, turn.virtual_time))
    return max(first.values()) - min(first.values()) if first else 0.0
