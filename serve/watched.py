"""A thread that works, and whether its work moves on: what a role tells Serve of its health.

A replica whose GPU hangs still answers on its loop, so Serve would leave it in place and send it more.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pusa_dist.errors import PusaError

P = ParamSpec("P")
T = TypeVar("T")

STUCK_AFTER_S = 600.0
"""Long: on a slow processor, four frames of a large video take minutes."""
FIRST_TIMES = 3.0
"""How much longer the first piece of work of a process may take: libraries load, kernels are chosen."""


class StuckError(PusaError):
    """Work does not move on; the process has to be replaced."""


class WatchedThread(ThreadPoolExecutor):
    """One thread, which does one piece of work after the other.

    Args:
        name: of the thread.
        stuck_after_s: work that does not end, or say that it ``moves_on``, for this long is stuck.
        clock: seconds.
    """

    def __init__(self, name: str, stuck_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(1, name)
        self._name = name
        self._stuck_after_s = FIRST_TIMES * stuck_after_s
        self._later_stuck_after_s = stuck_after_s
        self._clock = clock
        self._moved_at: float | None = None
        """None: it has nothing to do."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """See ``Executor.submit``; the time begins when the work does."""

        def watched() -> T:
            self.moves_on()
            try:
                return work(*args, **kwargs)
            finally:
                self._moved_at = None
                self._stuck_after_s = self._later_stuck_after_s

        return super().submit(watched)

    def moves_on(self) -> None:
        """Said by the work, on whichever thread: there is progress."""
        self._moved_at = self._clock()

    def check(self) -> None:
        """Raise if the work is stuck; for any thread to ask.

        Raises:
            StuckError: it is.
        """
        moved_at = self._moved_at
        if moved_at is not None and self._clock() - moved_at > self._stuck_after_s:
            raise StuckError(f"{self._name}: the work has not moved on for more than {self._stuck_after_s:g} s")
