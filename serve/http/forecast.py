"""What a tenant may expect: how long its job will still take, and when its turn comes.

Both are estimates from what is in the database, read again at most once in ``MEMORY_S`` seconds
however many ask.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from pusa_dist.request import GenerationRequest
from serve.policy.cost import StepShape, job_cost
from serve.policy.fairness import in_order
from serve.store.job import Job, Status
from serve.store.jobs import JobStore

T = TypeVar("T")

MEMORY_S = 1.0
PLACES_PER_TENANT = 50
"""A tenant's jobs of a class beyond these have no position yet."""


class Forecast:
    """Estimates over one store.

    Args:
        store: of the jobs.
        model: whose queue and step durations count.
        clock: Unix seconds.
    """

    def __init__(self, store: JobStore, model: str, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._model = model
        self._clock = clock
        self._measured = _Remembered(self._read_measured)
        self._positions = _Remembered(self._read_positions)

    def seconds_left(self, request: GenerationRequest, status: Status, step: int) -> float | None:
        """Of denoising, once it is the job's turn; 0 when it has ended, None while nothing was ever measured."""
        if status not in ("queued", "in_progress"):
            return 0.0
        measured = self._measured.value()
        if not measured:
            return None
        return round(job_cost(shape_of(request), request.num_inference_steps - step, measured), 1)

    def cost(self, request: GenerationRequest) -> float:
        """Gang-seconds it is predicted to take."""
        return job_cost(shape_of(request), request.num_inference_steps, self._measured.value())

    def queue_position(self, job: Job) -> int | None:
        """Place in the fair order, 1 for the next; None: not queued, or not counted yet.

        The dispatcher alone knows what runs at this moment, so this is the order as of a moment ago. Jobs
        far back in a tenant's own queue, and ones queued within the last second, have no place yet.
        """
        return self._positions.value().get(job.id) if job.status == "queued" else None

    def _read_measured(self) -> Mapping[StepShape, float]:
        return self._store.step_seconds(self._model)

    def _read_positions(self) -> Mapping[str, int]:
        waiting = self._store.waiting(self._model, PLACES_PER_TENANT)
        standings = self._store.standings()
        # A job may be claimed or made between the two readings; then its tenant may be missing.
        waiting = [job for job in waiting if job.tenant in standings]
        level = min((standings[job.tenant].virtual_time for job in waiting), default=0.0)
        turns = in_order(waiting, standings, clock=level, now=self._clock())
        return {turn.job_id: place for place, turn in enumerate(turns, start=1)}


def shape_of(request: GenerationRequest) -> StepShape:
    """What a step of the request costs depends on."""
    return StepShape(num_tokens=request.num_tokens, uses_guidance=request.uses_guidance)


class _Remembered(Generic[T]):
    """A value that is read again when it is older than ``MEMORY_S``, by one thread at a time."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._value: T | None = None
        self._until = 0.0

    def value(self) -> T:
        with self._lock:
            if self._value is None or time.monotonic() >= self._until:
                self._value = self._read()
                self._until = time.monotonic() + MEMORY_S
            return self._value
