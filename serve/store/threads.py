"""Calls of the store beside the event loop: they block, and the loop goes on."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NUM_THREADS = 4


class StoreThreads:
    """A few threads of their own: whatever else fills the loop's threads keeps no lease from being renewed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, "database")

    async def __call__(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """What the function returns, or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        """Wait for what is running; nothing may follow."""
        self._pool.shutdown()
