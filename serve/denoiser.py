"""The denoiser: coordinator of one gang.

It holds a few jobs, lets a pure policy choose who steps next, gives every rank the same calls in the
same order, and tells each job's stream of its steps and checkpoints. No tensor passes through it and
it does no arithmetic, so its loop is always free to answer.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from typing import Protocol

from pusa_dist.errors import DeviceMemoryError, GangError, NumericsError, PusaError
from serve.config import DenoiserConfig
from serve.gang import Gang, Held
from serve.logs import about
from serve.policy import tick
from serve.policy.cost import StepShape, observed
from serve.policy.step_deadline import deadline
from serve.resident import Resident
from serve.stages import (
    Assignment,
    Checkpoint,
    Checkpointed,
    Conditions,
    Finished,
    GangState,
    GangUnavailableError,
    Message,
    Previewed,
    Progress,
    Released,
    Renewal,
    ReplicaLostError,
    TensorRef,
)

logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """Where steps are reported; see ``serve.metrics.GangMetrics``."""

    def step(self, num_tokens: int, seconds: float) -> None: ...  # noqa: D102
    def checkpoint_failed(self) -> None: ...  # noqa: D102


_TICK_S = 0.5
_RETRY_S = 2.0
"""After a checkpoint that could not be written."""
_STUCK_S = 30.0
"""A job that waits for a checkpoint, and none could be written for this long, goes on elsewhere from the published one:
it may be this node alone that cannot reach the store."""
_LINGER_S = 0.5
"""After the last message of a gang that leaves: its end must not overtake it on the way."""
_GRACE_S = 2.0
"""A renewal may have been on its way when a job came: it does not end one younger than this."""


class Denoiser:
    """Coordinator of a started gang."""

    def __init__(
        self,
        config: DenoiserConfig,
        gang: Gang,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._gang = gang
        self._metrics = metrics
        self._clock = clock
        self._residents: list[Resident] = []
        self._to_drop: list[str] = []
        """Names that the ranks still hold though their jobs have left."""
        self._num_arrivals = 0
        self._running: str | None = None
        """Name of the resident that the last step ran for."""
        self._lora: Hashable = None
        """Strengths that the ranks have merged."""
        self._switch_s = 0.0
        """Seconds that a change of strength was seen to take."""
        self._step_seconds: dict[StepShape, float] = {}
        self._share_tokens = config.shared_forward_max_tokens
        """Of a shared forward, at most; fewer where the ranks had not the memory for so many."""
        self._changed = asyncio.Event()
        self._is_leaving = False
        self._handing_over: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def generate(self, assignment: Assignment) -> AsyncGenerator[Message, None]:
        """See ``GangHandle.generate``; closing the generator drops the job at its next step boundary."""
        if self._gang.error is not None:
            raise GangUnavailableError(f"the gang is being replaced: {self._gang.error}")
        if self._is_leaving:
            raise GangUnavailableError("the gang is leaving")
        self._start()
        for former in self._residents:
            if former.job_id == assignment.job_id and former.attempt <= assignment.attempt:
                self._drop(former, "another attempt at its job came")
        resident = Resident(
            assignment=assignment,
            arrival=self._num_arrivals,
            renewed_at=self._clock(),
            claim=assignment.claim,
            step=assignment.step,
            published=assignment.step,
        )
        if isinstance(assignment.source, Checkpoint):
            resident.fetching = asyncio.ensure_future(self._fetch(resident, assignment.source.key))
        self._num_arrivals += 1
        self._residents.append(resident)
        self._changed.set()
        try:
            while True:
                message = await resident.messages.get()
                if isinstance(message, PusaError):
                    raise message
                yield message
                if isinstance(message, Finished | Released):
                    return
        finally:
            resident.is_gone = True
            self._end(resident, ReplicaLostError("nobody listens any more"))

    async def release(self, job_id: str, attempt: int) -> None:
        """See ``GangHandle.release``."""
        if (resident := self._find(job_id, attempt)) is not None:
            self._hand_over(resident)

    async def drop(self, job_id: str, attempt: int) -> None:
        """Forget the job at its next step.

        Its stream ends, too: Ray keeps a generator whose caller has gone running until it ends by itself.
        """
        if (resident := self._find(job_id, attempt)) is not None:
            self._end(resident, ReplicaLostError("its owner does not want it any more"))

    async def published(self, job_id: str, attempt: int, step: int) -> None:
        """See ``GangHandle.published``."""
        if (resident := self._find(job_id, attempt)) is not None:
            resident.published = max(resident.published, step)
            self._changed.set()

    async def hold(self, owner: str, renewals: Mapping[str, Renewal]) -> GangState:
        """See ``GangHandle.hold``."""
        now = self._clock()
        for resident in [one for one in self._residents if one.assignment.owner == owner]:
            renewal = renewals.get(resident.job_id)
            if renewal is not None and renewal.attempt == resident.attempt:
                resident.renewed_at, resident.claim = now, renewal.claim
                resident.published = max(resident.published, renewal.published_step)
            elif now - resident.renewed_at >= _GRACE_S:
                self._drop(resident, "its owner does not hold it any more")
        self._changed.set()
        return self.state(owner)

    async def leave(self, node_id: str | None = None) -> int:
        """Take no more jobs and hand over those that are here, each within one step; returns how many.

        Args:
            node_id: only if a rank is on this Ray node; None: in any case.
        """
        if node_id is not None and node_id not in self._gang.node_ids:
            return 0
        self._is_leaving = True
        leaving = list(self._residents)
        for resident in leaving:
            self._hand_over(resident)
        await _until(lambda: not self._residents or self._gang.error is not None)
        await _until(lambda: all(one.is_gone for one in leaving))  # every last message has been taken
        await asyncio.sleep(_LINGER_S)
        return len(leaving)

    async def check_health(self) -> None:
        """Raise if the gang is lost or the loop has died: the denoiser is then replaced."""
        self._start()
        self._gang.check()
        for task in self._tasks:
            if task.done():
                task.result()

    def state(self, owner: str) -> GangState:
        """What this owner should know."""
        return GangState(
            num_others=sum(one.assignment.owner != owner for one in self._residents),
            is_closed=self._is_leaving or self._gang.error is not None,
            lora=self._lora,
            switch_s=self._switch_s,
            is_lost=self._gang.error is not None,
        )

    def _find(self, job_id: str, attempt: int) -> Resident | None:
        return next((one for one in self._residents if (one.job_id, one.attempt) == (job_id, attempt)), None)

    def _drop(self, resident: Resident, why: str) -> None:
        with about(job=resident.job_id, tenant=resident.claim.tenant):
            logger.warning("job %s: attempt %d dropped: %s", resident.job_id, resident.attempt, why)
        self._end(resident, ReplicaLostError(f"the gang dropped the job: {why}"))

    def _end(self, resident: Resident, last: Finished | Released | PusaError) -> None:
        """However a job leaves: its stream ends with this message, the ranks forget it before their next step."""
        if resident not in self._residents:  # it has left already
            return
        self._residents.remove(resident)
        if resident.is_admitted and not isinstance(last, Finished):
            self._to_drop.append(resident.name)
        resident.messages.put_nowait(last)
        self._changed.set()

    def _start(self) -> None:
        if not self._tasks:
            run = (self._run(), self._watch_ranks(), self._watch_owners())
            self._tasks = [asyncio.ensure_future(one) for one in run]

    async def _watch_ranks(self) -> None:
        await self._gang.watch()
        self._fail_all()

    async def _watch_owners(self) -> None:
        while self._gang.error is None:
            await asyncio.sleep(_TICK_S)
            now = self._clock()
            for resident in list(self._residents):
                if now - resident.renewed_at > self._config.resident_lease_s:
                    self._drop(resident, f"its owner was silent for {self._config.resident_lease_s:g} s")

    async def _run(self) -> None:
        try:
            while self._gang.error is None:
                self._changed.clear()  # before anything is looked at: what changes meanwhile is looked at again
                await self._drop_from_ranks()
                await self._admit_waiting()
                if not await self._step():
                    await self._changed.wait()
        except GangError:
            pass  # the gang has logged and kept the reason
        except Exception as error:  # our own fault; nobody may wait for a loop that has ended
            logger.exception("the denoiser's loop failed")
            self._gang.lose(f"the coordinator failed: {error!r}")
        self._fail_all()

    def _fail_all(self) -> None:
        error = str(self._gang.error)
        for resident in list(self._residents):
            # A job that had not been admitted did not bring the gang down.
            self._end(resident, GangError(error) if resident.is_admitted else GangUnavailableError(error))
        self._changed.set()  # the loop ends, though it may have had no job

    async def _drop_from_ranks(self) -> None:
        while self._to_drop:
            deadline_s = self._config.step_deadline_floor_s
            await self._gang.call("drop", self._to_drop.pop(), deadline_s=deadline_s)

    async def _fetch(self, resident: Resident, key: str) -> None:
        """Bring a checkpoint to the gang beside its steps: a store that is slow keeps nobody else waiting."""
        try:
            resident.fetched = await self._gang.fetch(key, self._admission_s)
        except GangError:
            return  # the gang has logged and kept the reason
        except PusaError as error:
            self._end(resident, error)
        finally:
            resident.fetching = None
            self._changed.set()

    async def _admit_waiting(self) -> None:
        # One whose checkpoint is on its way keeps its place: those after it came later, and the ranks hold no more.
        for resident in self._residents[: self._config.max_resident]:
            if not resident.is_expected or resident not in self._residents:
                continue
            resident.is_admitted = resident.is_busy = True
            self._tell_progress(resident, 0.0)
            try:
                self._now(resident, await self._admit(resident))
                await self._finish_if_done(resident)  # a checkpoint may have been written after the last step
            except GangError:
                raise
            except PusaError as error:
                self._end(resident, error)
            finally:
                resident.is_busy = False

    async def _admit(self, resident: Resident) -> Held:
        source, request = resident.assignment.source, resident.assignment.request
        if isinstance(source, Conditions):
            tensors = (None if one is None else one.ref for one in (source.context, source.negative, source.given))
            (held, *_) = await self._gang.call("admit", resident.name, request, *tensors, deadline_s=self._admission_s)
            return held
        data, resident.fetched = resident.fetched, None  # it need not be kept once the ranks have it
        return await self._gang.restore(resident.name, data, self._admission_s)

    async def _step(self) -> bool:
        """Let those whose turn it is make a step; False: it is nobody's."""
        stepping = self._choose()
        if not stepping:
            return False
        for resident in stepping:
            resident.is_busy = True
        try:
            await self._advance(stepping)
        finally:
            for resident in stepping:
                resident.is_busy = False
        return True

    async def _advance(self, stepping: list[Resident]) -> None:
        try:
            await self._forward(stepping)
        except GangError:
            raise
        except PusaError as error:
            if isinstance(error, NumericsError | DeviceMemoryError) and len(stepping) > 1:
                # The ranks have advanced none of them: alone, each makes the same step, and only the guilty one fails.
                if isinstance(error, DeviceMemoryError):
                    self._share_tokens = sum(one.claim.num_tokens for one in stepping) - 1
                for resident in stepping:
                    await self._advance([resident])
                return
            for resident in stepping:
                self._end(resident, error)

    async def _forward(self, stepping: list[Resident]) -> None:
        names = [one.name for one in stepping]
        shape = _shape(stepping)
        started = time.perf_counter()
        (held, *_) = await self._gang.call("step", names, deadline_s=self._deadline(shape))
        seconds = time.perf_counter() - started
        self._measured(shape, seconds, stepping[0].claim.lora)
        self._running = names[0]
        for resident in stepping:
            self._now(resident, held[resident.name])
            self._tell_progress(
                resident, seconds, shape.num_tokens, len(stepping), is_guest=resident is not stepping[0]
            )
            if resident.wants_preview():
                resident.previewing = asyncio.ensure_future(self._preview(resident))
            await self._finish_if_done(resident)

    def _choose(self) -> list[Resident]:
        """Who makes the next step; nobody while the one whose turn it is waits for its checkpoint."""
        every = self._config.checkpoint_every
        steady = {one.name: one for one in self._residents if one.is_steady}
        for resident in steady.values():
            if resident.is_due(every):
                with about(job=resident.job_id, tenant=resident.claim.tenant):
                    resident.saving = asyncio.ensure_future(self._save(resident))
        names = tick.next_step(
            (one.seen(name) for name, one in steady.items()),
            running=self._running,
            lora=self._lora,
            switch_s=self._switch_s,
            share_tokens=self._share_tokens,
        )
        chosen = [steady[name] for name in names]
        return chosen if all(one.may_step(every) for one in chosen) else []

    def _now(self, resident: Resident, held: Held) -> None:
        resident.step, resident.signature = held.step, held.signature

    def _tell_progress(
        self, resident: Resident, seconds: float, num_tokens: int = 0, num_sharing: int = 1, *, is_guest: bool = False
    ) -> None:
        progress = Progress(
            step=resident.step,
            num_steps=resident.num_steps,
            seconds=seconds,
            num_tokens=num_tokens,
            num_sharing=num_sharing,
            is_guest=is_guest,
        )
        resident.messages.put_nowait(progress)

    async def _finish_if_done(self, resident: Resident) -> None:
        if resident.step == resident.num_steps:
            latents = await self._gang.finish(resident.name, self._config.step_deadline_floor_s)
            self._end(resident, Finished(latents=TensorRef(latents)))

    async def _save(self, resident: Resident) -> None:
        """Write a checkpoint; until it is published the job may run on for a while, then it waits."""
        prefix = f"jobs/{resident.job_id}/checkpoints/{resident.attempt}"
        began = self._clock()
        try:
            step, key = await self._gang.checkpoint(resident.name, prefix)
        except GangError:
            return  # the gang has logged and kept the reason
        except Exception as error:  # noqa: BLE001 - whatever the store raised: it is tried again
            if resident in self._residents:
                logger.warning("job %s: no checkpoint at step %d: %s", resident.job_id, resident.step, error)
                if self._metrics is not None:
                    self._metrics.checkpoint_failed()
                if resident.failing_since is None:
                    resident.failing_since = began
                if isinstance(error, PusaError) and self._is_stuck(resident):
                    self._end(resident, error)
                else:
                    await asyncio.sleep(_RETRY_S)
        else:
            resident.failing_since = None
            if resident not in self._residents:
                await self._gang.discard(key)
                return
            resident.saved = Checkpoint(key=key, step=step)
            resident.messages.put_nowait(Checkpointed(checkpoint=resident.saved))
        finally:
            resident.saving = None
            self._changed.set()

    def _is_stuck(self, resident: Resident) -> bool:
        since = resident.failing_since
        if since is None or not resident.is_steady or resident.is_busy:  # one that is busy may be about to end
            return False
        return not resident.may_step(self._config.checkpoint_every) and self._clock() - since >= _STUCK_S

    async def _preview(self, resident: Resident) -> None:
        found = await self._gang.preview(resident.name)
        resident.previewing = None
        if found is not None:
            step, latents = found
            resident.messages.put_nowait(Previewed(step=step, latents=TensorRef(latents)))

    def _hand_over(self, resident: Resident) -> None:
        if not resident.is_leaving:
            resident.is_leaving = True
            task = asyncio.ensure_future(self._release(resident))
            self._handing_over.add(task)
            task.add_done_callback(self._handing_over.discard)

    async def _release(self, resident: Resident) -> None:
        await _until(lambda: not resident.is_busy)
        if resident.saving is not None:
            await asyncio.wait({resident.saving})
        newest = max(resident.assignment.step, resident.saved.step if resident.saved else 0)
        if resident in self._residents and resident.is_admitted and newest < resident.step:
            await self._save(resident)
        self._end(resident, resident.released())

    @property
    def _admission_s(self) -> float:
        """Seconds that a job may take to come: what it starts from is brought first, maybe from another node."""
        return self._config.step_deadline_floor_s + self._config.first_step_allowance_s

    def _deadline(self, shape: StepShape) -> float:
        config = self._config
        return deadline(shape, self._step_seconds, config.step_deadline_floor_s, config.first_step_allowance_s)

    def _measured(self, shape: StepShape, seconds: float, lora: Hashable) -> None:
        usual = self._step_seconds.get(shape)
        if lora == self._lora or usual is None:
            self._step_seconds[shape] = observed(seconds, usual)
        else:
            self._switch_s = max(0.0, seconds - usual)
        self._lora = lora
        if self._metrics is not None:
            self._metrics.step(shape.num_tokens, seconds)


def _shape(stepping: list[Resident]) -> StepShape:
    requests = [one.assignment.request for one in stepping]
    return StepShape(num_tokens=sum(one.num_tokens for one in requests), uses_guidance=requests[0].uses_guidance)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a few times a day, and many things make it true
        await asyncio.sleep(0.005)
