"""One loop per gateway that looks at every job somebody is watching.

A stream of events is idle nearly all the time, and there may be thousands: each is a coroutine that
waits to be told, and holds neither a thread nor a database connection. One query every ``poll_s`` reads
all watched jobs at once, and none runs while nobody watches.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.http.errors import ServeError, too_many_streams

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Watcher(Generic[T]):
    """What one stream sees: the newest state of its job, never an older one again."""

    tenant: str
    job_id: str
    _latest: T | None = None
    _is_gone: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self) -> T | None:
        """The job's state when it next differs from the last one given; None: the job is deleted."""
        await self._changed.wait()
        self._changed.clear()
        return None if self._is_gone else self._latest

    def tell(self, state: T | None) -> None:
        """The loop's: what the job is now; None: it is deleted."""
        if state is None:
            self._is_gone = True
        elif state == self._latest:
            return
        self._latest = state
        self._changed.set()


class Watch(Generic[T]):
    """The watchers of one gateway.

    Args:
        read: the present states of jobs, by id; those that are deleted are left out. Blocks.
        poll_s: seconds between two readings.
        max_watchers: at once, on this gateway.
        max_per_tenant: of them, of one tenant.
    """

    def __init__(
        self, read: Callable[[Collection[str]], Mapping[str, T]], poll_s: float, max_watchers: int, max_per_tenant: int
    ) -> None:
        self._read = read
        self._poll_s = poll_s
        self._max_watchers = max_watchers
        self._max_per_tenant = max_per_tenant
        self._watchers: set[Watcher[T]] = set()
        self._num_of: Counter[str] = Counter()
        self._loop: asyncio.Task[None] | None = None

    @property
    def num_watchers(self) -> int:
        """Streams that are open."""
        return len(self._watchers)

    @contextmanager
    def watch(self, tenant: str, job_id: str) -> Iterator[Watcher[T]]:
        """Watch a job while the block lasts; must be entered on the event loop.

        Raises:
            ServeError: 429 or 503, too many watch already.
        """
        if self._num_of[tenant] >= self._max_per_tenant:
            raise too_many_streams(self._max_per_tenant)
        if len(self._watchers) >= self._max_watchers:
            raise ServeError(
                503,
                "too_many_streams",
                "this gateway has no room for more event streams; poll the video instead",
                retry_after_s=30,
            )
        watcher: Watcher[T] = Watcher(tenant, job_id)
        self._watchers.add(watcher)
        self._num_of[tenant] += 1
        if self._loop is None or self._loop.done():
            self._loop = asyncio.get_running_loop().create_task(self._run())
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            self._num_of -= Counter([tenant])  # drops the tenant when none is left

    async def _run(self) -> None:
        while self._watchers:
            # Who comes while this is read was not asked about: its job is not gone for being absent.
            asked = list(self._watchers)
            try:
                states = await asyncio.to_thread(self._read, {one.job_id for one in asked})
            except Exception as error:  # noqa: BLE001 - the outermost loop: the database may be back the next time
                logger.error("watched jobs could not be read: %s", type(error).__name__)
            else:
                for watcher in asked:
                    watcher.tell(states.get(watcher.job_id))
            await asyncio.sleep(self._poll_s)
