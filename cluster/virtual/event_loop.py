"""Events in virtual time: nothing waits, nothing runs at once, the same inputs give the same run."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import inf

MAX_AT_ONCE = 100_000


class EventLoop:
    """Calls actions in the order of their times; those of the same time in the order they were asked for.

    Attributes:
        now: virtual seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._number = count()

    @property
    def next_at(self) -> float:
        """When the next event is due; infinity without one."""
        return self._events[0][0] if self._events else inf

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Call ``action`` at ``when``, or next if that is past."""
        heappush(self._events, (max(when, self.now), next(self._number), action))

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Call ``action`` this much later."""
        self.at(self.now + seconds, action)

    def run(self, until: float = inf) -> None:
        """Go on until no event is left, or the next lies after ``until``.

        Raises:
            RuntimeError: time stands still, because events cause each other without end.
        """
        num_at_once = 0
        while self._events and self._events[0][0] <= until:
            when, _, action = heappop(self._events)
            num_at_once = num_at_once + 1 if when == self.now else 0
            if num_at_once > MAX_AT_ONCE:
                raise RuntimeError(f"more than {MAX_AT_ONCE} events at {when} s, the last of them {action}")
            self.now = when
            action()
