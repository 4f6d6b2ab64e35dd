"""The VAE under virtual time: decodes jobs in the order in which they come, so many at once."""

from collections import deque
from collections.abc import Callable
from functools import partial

from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Job


class Decoders:
    """Decode jobs.

    Args:
        loop: whose time it takes.
        number: of jobs decoded at once; None: as many as there are.
        seconds: that a job takes which begins now.
        on_end: told of every job that is decoded.
    """

    def __init__(
        self, loop: EventLoop, number: int | None, seconds: Callable[[Job], float], on_end: Callable[[Job], None]
    ) -> None:
        self._loop, self._number, self._seconds, self._on_end = loop, number, seconds, on_end
        self._waiting: deque[Job] = deque()
        self._num_busy = 0

    def add(self, job: Job) -> None:
        """Decode it as soon as there is a decoder."""
        self._waiting.append(job)
        self._go()

    def _go(self) -> None:
        while self._waiting and (self._number is None or self._num_busy < self._number):
            job = self._waiting.popleft()
            self._num_busy += 1
            self._loop.after(self._seconds(job), partial(self._ended, job))

    def _ended(self, job: Job) -> None:
        self._num_busy -= 1
        self._go()
        self._on_end(job)
