"""What is done again until it works: whatever fails because the database or the artifact store is away.

Such an outage says nothing of the job, so it costs the job no attempt, and no step that is done. It is the
caller's deadline that ends the waiting.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serve.store.artifacts import StorageError
from serve.store.database import DATABASE_AWAY

logger = logging.getLogger(__name__)

T = TypeVar("T")

AWAY = (StorageError, *DATABASE_AWAY)
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 60.0


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """What ``work`` returns as soon as the stores let it; called again after pauses that double up to a minute."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await work()
        except AWAY as error:
            # Not the error's own words: they may name hosts and files.
            name = type(error).__name__
            logger.warning("the database or the artifact store is away (%s), tried again in %g s", name, pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
