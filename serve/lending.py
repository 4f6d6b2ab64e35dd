"""Tensors that are lent to others by reference, and kept by whoever made them until they have surely been used.

Ray loses count, now and then, of references inside what a stream yields (ray-project/ray#58080), and the
answer of every Ray Serve call is a stream. A tensor whose maker forgets it is then gone while its job waits.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

from serve.stages import TensorRef

KEPT_S = 300.0
"""A job that waits longer for a gang is safe unless Ray lost count, too; then its text and inputs are encoded again."""


class Lent:
    """Tensors in the object store.

    Args:
        put: makes a reference to a value.
        clock: seconds.
    """

    def __init__(self, put: Callable[[Any], Any] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._put = ray.put if put is None else put
        self._clock = clock
        self._refs: deque[tuple[float, Any]] = deque()

    def lend(self, value: Any) -> TensorRef:
        """Put a tensor into the object store, and keep it there for a while whoever forgets it."""
        now = self._clock()
        while self._refs and self._refs[0][0] < now - KEPT_S:
            self._refs.popleft()
        ref = self._put(value)
        self._refs.append((now, ref))
        return TensorRef(ref)
