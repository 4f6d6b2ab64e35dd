"""The denoiser: one replica is the coordinator of one gang.

It holds a few jobs, lets a pure policy choose who steps next, gives every rank the same calls in the
same order, and tells each job's caller of its steps. No tensor passes through it and it does no
arithmetic, so its loop is always free to answer.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from pusa_dist.errors import GangError, PusaError
from pusa_dist.request import GenerationRequest
from serve.config import DenoiserConfig
from serve.gang import Gang
from serve.policy.step_deadline import StepShape, deadline, observed
from serve.policy.steps import Resident, next_step
from serve.stages import Finished, GangUnavailableError, Progress, TensorRef

logger = logging.getLogger(__name__)

OnStep = Callable[[int, float], None]
"""Told the tokens and the seconds of every step."""


@dataclass(slots=True, eq=False)
class _Resident:
    job_id: str
    request: GenerationRequest
    tensors: tuple[TensorRef | None, ...]
    arrival: int
    messages: "asyncio.Queue[Progress | Finished | PusaError]" = field(default_factory=asyncio.Queue)
    is_admitted: bool = False
    is_gone: bool = False
    """Its caller no longer listens: cancelled."""

    @property
    def name(self) -> str:
        # A job that comes back to the gang that holds its cancelled self is another resident.
        return f"{self.job_id}#{self.arrival}"


class Denoiser:
    """Coordinator of a started gang."""

    def __init__(self, config: DenoiserConfig, gang: Gang, on_step: OnStep | None = None) -> None:
        self._config = config
        self._gang = gang
        self._on_step = on_step
        self._residents: list[_Resident] = []
        self._num_arrivals = 0
        self._step_seconds: dict[StepShape, float] = {}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def generate(
        self,
        job_id: str,
        request: GenerationRequest,
        context: TensorRef,
        negative_context: TensorRef | None,
        given: TensorRef | None,
    ) -> AsyncGenerator[Progress | Finished, None]:
        """Denoise one job; yields when the gang holds it (step 0), after each step, then where the latents are.

        Closing the generator drops the job at its next step boundary.

        Raises:
            GangError: the gang was lost while it held the job.
            GangUnavailableError: the gang had been lost before.
            PusaError: the job's own error, such as NumericsError.
        """
        if self._gang.error is not None:
            raise GangUnavailableError(f"the gang is being replaced: {self._gang.error}")
        self._start()
        resident = _Resident(job_id, request, (context, negative_context, given), self._num_arrivals)
        self._num_arrivals += 1
        self._residents.append(resident)
        self._changed.set()
        try:
            while True:
                message = await resident.messages.get()
                if isinstance(message, PusaError):
                    raise message
                yield message
                if isinstance(message, Finished):
                    return
        finally:
            resident.is_gone = True
            self._changed.set()

    async def check_health(self) -> None:
        """Raise if the gang is lost or the loop has died: Serve then replaces the replica."""
        self._start()
        self._gang.check()
        for task in self._tasks:
            if task.done():
                task.result()

    def _start(self) -> None:
        if not self._tasks:
            self._tasks = [asyncio.ensure_future(self._run()), asyncio.ensure_future(self._watch())]

    async def _watch(self) -> None:
        await self._gang.watch()
        self._fail_all()

    async def _run(self) -> None:
        try:
            while self._gang.error is None:
                await self._drop_gone()
                await self._admit_waiting()
                await self._step()
        except GangError:
            pass  # the gang has logged and kept the reason
        except Exception as error:  # our own fault; nobody may wait for a loop that has ended
            logger.exception("the denoiser's loop failed")
            self._gang.lose(f"the coordinator failed: {error!r}")
        self._fail_all()

    def _fail_all(self) -> None:
        error = str(self._gang.error)
        for resident in self._residents:
            # A job that had not been admitted did not bring the gang down.
            resident.messages.put_nowait(GangError(error) if resident.is_admitted else GangUnavailableError(error))
        self._residents.clear()
        self._changed.set()

    async def _drop_gone(self) -> None:
        for resident in [one for one in self._residents if one.is_gone]:
            self._residents.remove(resident)
            if resident.is_admitted:
                await self._drop(resident)

    async def _admit_waiting(self) -> None:
        for resident in self._residents[: self._config.max_resident]:
            if resident.is_admitted or resident.is_gone:
                continue
            tensors = (None if one is None else one.ref for one in resident.tensors)
            resident.is_admitted = True
            resident.messages.put_nowait(Progress(step=0, num_steps=resident.request.num_inference_steps, seconds=0.0))
            try:
                # The ranks fetch the tensors first, maybe from other nodes.
                patience_s = self._config.step_deadline_floor_s + self._config.first_step_allowance_s
                await self._gang.call("admit", resident.name, resident.request, *tensors, deadline_s=patience_s)
            except GangError:
                raise
            except PusaError as error:
                await self._give_up(resident, error)

    async def _step(self) -> None:
        admitted = {one.name: one for one in self._residents if one.is_admitted and not one.is_gone}
        chosen = next_step(Resident(job_id=name, arrival=one.arrival) for name, one in admitted.items())
        if not chosen:
            self._changed.clear()
            if not any(one.is_gone for one in self._residents):
                await self._changed.wait()
            return
        stepping = [admitted[name] for name in chosen]
        started = time.perf_counter()
        try:
            (steps, *_) = await self._gang.call("step", list(chosen), deadline_s=self._deadline(stepping))
        except GangError:
            raise
        except PusaError as error:
            for resident in stepping:
                await self._give_up(resident, error)
            return
        seconds = time.perf_counter() - started
        self._measured(stepping, seconds)
        for resident in stepping:
            await self._advanced(resident, steps[resident.name], seconds)

    async def _advanced(self, resident: _Resident, step: int, seconds: float) -> None:
        num_steps = resident.request.num_inference_steps
        resident.messages.put_nowait(Progress(step=step, num_steps=num_steps, seconds=seconds))
        if step == num_steps:
            latents = await self._gang.finish(resident.name, self._config.step_deadline_floor_s)
            self._residents.remove(resident)
            resident.messages.put_nowait(Finished(latents=TensorRef(latents)))

    async def _give_up(self, resident: _Resident, error: PusaError) -> None:
        resident.messages.put_nowait(error)
        self._residents.remove(resident)
        await self._drop(resident)

    async def _drop(self, resident: _Resident) -> None:
        await self._gang.call("drop", resident.name, deadline_s=self._config.step_deadline_floor_s)

    def _deadline(self, stepping: list[_Resident]) -> float:
        config = self._config
        return deadline(
            _shape(stepping), self._step_seconds, config.step_deadline_floor_s, config.first_step_allowance_s
        )

    def _measured(self, stepping: list[_Resident], seconds: float) -> None:
        shape = _shape(stepping)
        self._step_seconds[shape] = observed(seconds, self._step_seconds.get(shape))
        if self._on_step is not None:
            self._on_step(shape.num_tokens, seconds)


def _shape(stepping: list[_Resident]) -> StepShape:
    return StepShape(
        num_tokens=sum(one.request.num_tokens for one in stepping),
        uses_guidance=stepping[0].request.uses_guidance,
    )
