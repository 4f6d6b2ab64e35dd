"""One rank per Ray actor, all in one placement group: started, watched and killed together.

A gang is busy or idle. While a call is in flight on its ranks, only the call's deadline says whether
it is alive (a rank may be deep in a collective); while none is, ranks answer pings on a thread of
their own. A dead rank, a missed deadline or an unanswered ping ends the whole gang at once.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pusa_dist.errors import GangError, PusaError
from pusa_dist.request import GenerationRequest
from serve.config import DenoiserConfig
from serve.stages import ReplicaLostError

if TYPE_CHECKING:
    from pusa_dist.worker import Worker

logger = logging.getLogger(__name__)

MakeWorker: TypeAlias = "Callable[[], Worker]"

AGREEMENT_S = 5.0
"""When one rank fails, how long the others have to fail in the same way: an error of the job hits all."""


class Rank:
    """The actor around one worker: the same calls, in the same order, on every rank."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._worker = make_worker()

    def meeting_point(self) -> tuple[str, int]:
        """Address and free port of this rank's node, for the rendezvous."""
        from pusa_dist.parallel.mesh import free_port

        address_of_node: Any = ray.util.get_node_ip_address
        return address_of_node(), free_port()

    def join(self, rank: int, world_size: int, address: str, port: int) -> None:
        """See ``Worker.join``."""
        self._worker.join(rank, world_size, address, port)

    def admit(self, job_id: str, request: GenerationRequest, context: Any, negative: Any, given: Any) -> None:
        """See ``Worker.admit``; Ray has fetched the tensors by the time this runs."""
        self._worker.admit(job_id, request, context, negative, given)

    def step(self, job_ids: Sequence[str]) -> dict[str, int]:
        """See ``Worker.step``."""
        return self._worker.step(job_ids)

    def finish(self, job_id: str) -> tuple[Any, None]:
        """Final latents, and a second result that says they exist without fetching them."""
        return self._worker.finish(job_id), None

    def drop(self, job_id: str) -> None:
        """See ``Worker.drop``."""
        self._worker.drop(job_id)

    def ping(self) -> int:
        """The process id, at once, whatever the worker is doing."""
        return os.getpid()


class Gang:
    """The ranks of one denoiser replica, as the replica's event loop sees them.

    Attributes:
        error: why the gang was given up; None while it lives.
    """

    def __init__(self, config: DenoiserConfig, make_worker: MakeWorker, placement: PlacementGroup | None) -> None:
        self._config = config
        self._num_in_flight = 0
        self._num_calls = 0
        self.error: GangError | None = None
        self._ranks = [
            _rank_actor(config, placement, index).remote(make_worker) for index in range(config.parallel.world_size)
        ]

    def start(self) -> list[int]:
        """Wait until every rank has met the others and loaded its weights; returns their process ids.

        Blocking; for the replica's constructor only.

        Raises:
            GangError: a rank failed, or ``start_timeout_s`` passed.
        """
        timeout_s = self._config.start_timeout_s
        try:
            address, port = ray.get(self._ranks[0].meeting_point.remote(), timeout=timeout_s)
            joins = [rank.join.remote(n, len(self._ranks), address, port) for n, rank in enumerate(self._ranks)]
            ray.get(joins, timeout=timeout_s)
            return list(ray.get([rank.ping.remote() for rank in self._ranks], timeout=timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            raise self.lose(f"the ranks were not ready within start_timeout_s={timeout_s:g}") from error

    async def call(self, method: str, *arguments: Any, deadline_s: float) -> list[Any]:
        """Make the same call on every rank and wait for all.

        Raises:
            PusaError: what the call raised, on every rank alike; the gang goes on.
            ReplicaLostError: a tensor among the arguments is gone.
            GangError: anything else, or ``deadline_s`` passed; the gang is lost.
        """
        self.check()
        refs = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        return await self._settle(method, refs, deadline_s)

    async def finish(self, job_id: str, deadline_s: float) -> Any:
        """Take a finished job off every rank; returns a reference to rank 0's latents.

        Raises:
            GangError: as ``call``.
        """
        self.check()
        latents, written = self._ranks[0].finish.options(num_returns=2).remote(job_id)
        await self._settle("finish", [written, *(rank.drop.remote(job_id) for rank in self._ranks[1:])], deadline_s)
        return latents

    async def watch(self, period_s: float = 1.0) -> GangError:
        """Ping the ranks while they are idle; returns when the gang is lost, saying why."""
        while self.error is None:
            await asyncio.sleep(period_s)
            if not self._num_in_flight and self.error is None:
                await self._ping()
        return self.error

    def check(self) -> None:
        """Raise the error that ended the gang, if one has."""
        if self.error is not None:
            raise GangError(str(self.error))

    def kill(self) -> None:
        """End every rank; their placement is freed with the replica."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)

    def lose(self, reason: str) -> GangError:
        """Give the gang up: every rank is killed, every later call raises. Returns the first reason given."""
        if self.error is None:
            logger.error("gang lost: %s", reason)
            self.error = GangError(reason)
            self.kill()
        return self.error

    async def _ping(self) -> None:
        calls_before = self._num_calls
        timeout_s = self._config.ping_timeout_s
        pings = [rank.ping.options(concurrency_group="ping").remote() for rank in self._ranks]
        done, late = await asyncio.wait(_tasks(pings), timeout=timeout_s)
        _abandon(late)
        if (error := _first_error(done)) is not None:
            self.lose(f"a rank died while idle: {type(error).__name__}")
        elif late and calls_before == self._num_calls:
            self.lose(f"{len(late)} of {len(pings)} idle ranks did not answer within ping_timeout_s={timeout_s:g}")

    async def _settle(self, what: str, refs: Sequence[Any], deadline_s: float) -> list[Any]:
        self._num_in_flight += 1
        self._num_calls += 1
        try:
            tasks = _tasks(refs)
            done, late = await asyncio.wait(tasks, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
            if late and _first_error(done) is not None:
                if self._died(done):
                    _abandon(late)
                    raise self.lose(f"a rank died in {what}")
                _, late = await asyncio.wait(late, timeout=AGREEMENT_S)
        finally:
            self._num_in_flight -= 1
        if late:
            _abandon(late)
            reason = _first_error(done) or f"not finished within its deadline of {deadline_s:.1f} s"
            ranks = [str(n) for n, task in enumerate(tasks) if task in late]
            raise self.lose(f"{what} on rank {', '.join(ranks)}: {reason}")
        errors = [task.exception() for task in tasks]
        if not any(errors):
            return [task.result() for task in tasks]
        raise self._shared_error(what, errors)

    def _died(self, done: "set[asyncio.Task[Any]]") -> bool:
        return any(isinstance(task.exception(), RayActorError) for task in done)

    def _shared_error(self, what: str, errors: Sequence[BaseException | None]) -> PusaError:
        causes = [error.cause if isinstance(error, RayTaskError) else error for error in errors]
        first = next(cause for cause in causes if cause is not None)
        if isinstance(first, ObjectLostError):  # only while tensors are fetched: nothing has run
            return ReplicaLostError(f"{what}: a tensor of the job is lost: {first}")
        # All ranks compute the same values, so an error of the job is raised by each of them.
        if isinstance(first, PusaError) and all(type(cause) is type(first) for cause in causes):
            return first
        return self.lose(f"a rank died in {what}" if isinstance(first, RayActorError) else f"{what}: {first!r}")


def _rank_actor(config: DenoiserConfig, placement: PlacementGroup | None, index: int) -> Any:
    strategy = (
        "DEFAULT"
        if placement is None
        else PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index)
    )
    remote: Any = ray.remote
    make_actor = remote(
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        resources=config.resources,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={"ping": 1},
        scheduling_strategy=strategy,
    )
    return make_actor(Rank)


def _tasks(refs: Sequence[Any]) -> "list[asyncio.Task[Any]]":
    return [asyncio.ensure_future(_fetch(ref)) for ref in refs]


async def _fetch(ref: Any) -> Any:
    return await ref


def _abandon(late: "set[asyncio.Task[Any]]") -> None:
    for task in late:
        task.cancel()


def _first_error(done: "set[asyncio.Task[Any]]") -> BaseException | None:
    return next((task.exception() for task in done if task.exception() is not None), None)
