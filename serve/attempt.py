"""One attempt at a job: what the dispatcher holds of it, and the stages it goes through."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve.patience import patiently
from serve.stages import Checkpoint, Conditions, Stages, TensorRef
from serve.store.jobs import Artifact, Job, Stage
from serve.traces import NO_TRACES, Traces


@dataclass(slots=True, eq=False)
class Attempt:
    """One job in the dispatcher's hands."""

    job: Job
    stage: Stage = "text"
    step: int = 0
    paid_steps: int = 0
    """Steps that its tenant has been charged for; a step that is made again is not charged again."""
    checkpoint: Checkpoint | None = None
    """Newest one that is published."""
    preview_key: str | None = None
    """Newest preview that is published."""
    is_drawing: bool = False
    """Another preview is being made."""
    is_reported: bool = False
    """Whether the store knows this stage and step."""
    seconds: dict[str, float] = field(default_factory=dict)
    stop: Literal["cancelled", "stale"] | None = None
    """Why it is being stopped: its owner asked, or another attempt has taken over."""
    is_over: bool = False
    """Its stages have ended; what is left is to write how, and no request to stop may interrupt that."""
    task: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        job = self.job
        if job.checkpoint_key is not None:
            self.checkpoint = Checkpoint(key=job.checkpoint_key, step=job.checkpoint_step or 0)
            self.stage, self.step = "denoise", self.checkpoint.step
        self.preview_key = job.preview_key
        # What ran and is not in the checkpoint was charged in a former attempt.
        self.paid_steps = max(job.furthest_step, self.step)

    def at(self, stage: Stage, step: int) -> None:
        """Note where it is, for the next report."""
        self.stage, self.step, self.is_reported = stage, step, False

    def interrupt(self, why: Literal["cancelled", "stale"]) -> None:
        """End its stages where they are; too late if they have ended."""
        if self.stop is None and not self.is_over and self.task is not None:
            self.stop = why
            self.task.cancel()

    def start_afresh(self) -> None:
        """Go on without a checkpoint."""
        self.checkpoint = None
        self.at("text", 0)


class Denoise(Protocol):
    """How an attempt gets through its steps; see ``serve.gangs``."""

    async def __call__(self, attempt: Attempt, source: Conditions | Checkpoint) -> TensorRef:
        """Final latents (C, F, H, W).

        Raises:
            CheckpointError: the checkpoint cannot be used (any more).
        """
        ...


DecodeTurn = Callable[[Job], AbstractAsyncContextManager[None]]
"""Waits until it is a job's turn at the VAE, which it has for as long as the block lasts."""


async def run_stages(
    attempt: Attempt,
    stages: Stages,
    denoise: Denoise,
    decode_turn: DecodeTurn,
    on_stage: Callable[[str, float], None],
    traces: Traces = NO_TRACES,
) -> dict[str, Artifact]:
    """Take a job from where it stands to its files; a stage that finds the stores away is made again.

    Args:
        attempt: of the job.
        stages: text encoder and VAE.
        denoise: the gangs.
        decode_turn: see ``DecodeTurn``.
        on_stage: told the name and seconds of every stage.
        traces: given a span of each.

    Raises:
        CheckpointError: the checkpoint it stood at cannot be used; the job must start afresh.
    """
    source = attempt.checkpoint or await _conditions(attempt, stages, on_stage, traces)
    with _stage(attempt, "denoise", on_stage, traces):
        latents = await patiently(lambda: denoise(attempt, attempt.checkpoint or source))
    with _stage(attempt, "decode", on_stage, traces):
        return await patiently(lambda: _decode(attempt.job, latents, stages, decode_turn))


async def _conditions(
    attempt: Attempt, stages: Stages, on_stage: Callable[[str, float], None], traces: Traces
) -> Conditions:
    job, given = attempt.job, None
    with _stage(attempt, "text", on_stage, traces):
        context, negative = await _embed(job, stages)
    if job.request.conditioning:
        with _stage(attempt, "encode", on_stage, traces):
            given = await patiently(lambda: stages.encode(job))
    return Conditions(context=context, negative=negative, given=given)


async def _decode(job: Job, latents: TensorRef, stages: Stages, turn: DecodeTurn) -> dict[str, Artifact]:
    async with turn(job):
        return await stages.decode(job, latents)


async def _embed(job: Job, stages: Stages) -> tuple[TensorRef, TensorRef | None]:
    if not job.request.uses_guidance:
        return await stages.embed(job.request.prompt), None
    context, negative = await asyncio.gather(
        stages.embed(job.request.prompt), stages.embed(job.request.negative_prompt)
    )
    return context, negative


@contextmanager
def _stage(attempt: Attempt, stage: Stage, on_stage: Callable[[str, float], None], traces: Traces) -> Iterator[None]:
    attempt.at(stage, attempt.step)
    started = time.perf_counter()
    try:
        with traces.span(stage, step=attempt.step):
            yield
    finally:
        attempt.seconds[stage] = time.perf_counter() - started
        on_stage(stage, attempt.seconds[stage])
