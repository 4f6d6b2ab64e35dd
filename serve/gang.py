"""One rank per Ray actor, all in one placement group: started, watched and killed together.

Ranks answer pings on a thread of their own, whatever they compute; a rank that answers and yet does
not finish what it was asked misses the deadline of that call. A dead rank, a missed deadline or an
unanswered ping ends the whole gang at once.
"""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pusa_dist.config import ModelConfig
from pusa_dist.errors import CheckpointError, GangError, PusaError
from pusa_dist.request import GenerationRequest
from serve import heap
from serve.config import DenoiserConfig
from serve.logs import Logs
from serve.stages import ReplicaLostError
from serve.store.artifacts import ArtifactStore, StorageError

if TYPE_CHECKING:
    from pusa_dist.worker import Worker

logger = logging.getLogger(__name__)

MakeWorker: TypeAlias = "Callable[[], Worker]"

AGREEMENT_S = 5.0
"""When one rank fails, how long the others have to fail in the same way: an error of the job hits all."""


START_SILENCE_S = 60.0
"""A rank that starts and does not answer for this long is dead; loading may keep it busier than steps do."""
CHECKPOINT_TIMEOUT_S = 60.0
"""A checkpoint not written within this counts as failed, and is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A generation on the ranks, between two steps."""

    step: int
    """Steps done."""
    signature: Hashable
    """Equal for those that may share the forward of their next step; None after the last."""


class Rank:
    """The actor around one worker: the same calls, in the same order, on every rank.

    Only ``checkpoint``, ``preview``, ``discard``, ``read`` and ``ping`` run beside them, on threads of their own.
    """

    def __init__(self, make_worker: MakeWorker, artifacts_url: str, logs: Logs | None = None) -> None:
        if logs is not None:
            logs.configure()
        self._worker = make_worker()
        self._artifacts = ArtifactStore(artifacts_url)

    def meeting_point(self) -> tuple[str, int]:
        """Address and free port of this rank's node, for the rendezvous."""
        from pusa_dist.parallel.mesh import free_port

        address_of_node: Any = ray.util.get_node_ip_address
        return address_of_node(), free_port()

    def join(self, rank: int, world_size: int, address: str, port: int) -> None:
        """See ``Worker.join``."""
        self._worker.join(rank, world_size, address, port)

    def admit(self, name: str, request: GenerationRequest, context: Any, negative: Any, given: Any) -> Held:
        """See ``Worker.admit``; Ray has fetched the tensors by the time this runs."""
        self._worker.admit(name, request, context, negative, given)
        return Held(step=0, signature=self._worker.signature(name))

    def restore(self, name: str, data: bytes) -> Held:
        """See ``Worker.restore``."""
        step = self._worker.restore(name, data)
        return Held(step=step, signature=self._worker.signature(name))

    def step(self, names: Sequence[str]) -> dict[str, Held]:
        """See ``Worker.step``."""
        done = self._worker.step(names)
        return {name: Held(step=step, signature=self._worker.signature(name)) for name, step in done.items()}

    def finish(self, name: str) -> tuple[Any, None]:
        """Final latents, and a second result that says they exist without fetching them."""
        return self._worker.finish(name), None

    def drop(self, name: str) -> None:
        """See ``Worker.drop``."""
        self._worker.drop(name)

    def checkpoint(self, name: str, prefix: str) -> tuple[int, str]:
        """Write a resident's state beside the running steps; returns its step and key."""
        step, data = self._worker.checkpoint(name)
        key = f"{prefix}-{step}"
        self._artifacts.put(key, data)
        return step, key

    def preview(self, name: str) -> tuple[Any, int | None]:
        """Where a resident is heading, (C, F, H, W) float32 in NumPy, and after how many steps; None: not known."""
        found = self._worker.preview(name)
        return (None, None) if found is None else (found[1].numpy(), found[0])

    def discard(self, key: str) -> None:
        """Remove a checkpoint that nobody will publish."""
        self._artifacts.delete(key)

    def read(self, key: str) -> tuple[bytes, None]:
        """A checkpoint's bytes, and a second result that says they exist without fetching them.

        Raises:
            CheckpointError: it is not there (any more).
        """
        try:
            return self._artifacts.read(key), None
        except FileNotFoundError as error:
            raise CheckpointError("the checkpoint is not in the artifact store any more") from error

    def place(self) -> tuple[int, str]:
        """Process and node id of the rank."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ping(self) -> None:
        """Answers at once, whatever the worker is doing."""


class Gang:
    """The ranks of one denoiser, as its coordinator's event loop sees them.

    Args:
        config: of the denoiser.
        ranks: its actors, which may still be starting; see ``rank_actors``.

    Attributes:
        error: why the gang was given up; None while it lives.
        pids: process ids of the ranks, once started.
        node_ids: the Ray nodes they are on, once started.
    """

    def __init__(self, config: DenoiserConfig, ranks: Sequence[Any]) -> None:
        self._config = config
        self._ranks = ranks
        self.error: GangError | None = None
        self.pids: list[int] = []
        self.node_ids: set[str] = set()

    async def start(self) -> None:
        """Wait until every rank has met the others and loaded its weights.

        Raises:
            GangError: ``start_timeout_s`` passed, or a rank fell silent meanwhile.
            RayError: a rank failed.
        """
        timeout_s = self._config.start_timeout_s
        watching = asyncio.ensure_future(self._watch_start())
        try:
            async with asyncio.timeout(timeout_s):
                address, port = await self._ranks[0].meeting_point.remote()
                count = len(self._ranks)
                await asyncio.gather(*(rank.join.remote(n, count, address, port) for n, rank in enumerate(self._ranks)))
                places = await asyncio.gather(*(rank.place.remote() for rank in self._ranks))
        except TimeoutError as error:
            raise self.lose(f"the ranks were not ready within start_timeout_s={timeout_s:g}") from error
        except RayActorError:
            self.check()  # it may be we who have killed it
            raise
        finally:
            watching.cancel()
        self.pids = [pid for pid, _ in places]
        self.node_ids = {node_id for _, node_id in places}

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

    async def fetch(self, key: str, deadline_s: float) -> Any:
        """Have rank 0 read a checkpoint for all while the gang goes on; returns a reference to its bytes.

        Raises:
            CheckpointError: it is not there (any more).
            StorageError: the artifact store cannot be reached, or did not answer within ``deadline_s``.
            ReplicaLostError: it could not be read for any other reason; the gang goes on.
            GangError: rank 0 died.
        """
        self.check()
        data, is_there = self._ranks[0].read.options(concurrency_group="state", num_returns=2).remote(key)
        try:
            async with asyncio.timeout(deadline_s):
                await is_there
        except (RayError, TimeoutError) as error:
            raise self._unwritten("reading a checkpoint", error) from error
        return data

    async def restore(self, name: str, data: Any, deadline_s: float) -> Held:
        """Make a checkpointed generation resident on every rank, from what ``fetch`` returned.

        Raises:
            CheckpointError: it is damaged, or of another model, revision or precision.
            ReplicaLostError, GangError: as ``call``.
        """
        (held, *_) = await self.call("restore", name, data, deadline_s=deadline_s)
        return held

    async def checkpoint(self, name: str, prefix: str) -> tuple[int, str]:
        """Write a resident's state while the gang goes on; returns its step and key.

        Raises:
            StorageError: it could not be written; the gang goes on.
            GangError: rank 0 died.
        """
        self.check()
        written = self._ranks[0].checkpoint.options(concurrency_group="state").remote(name, prefix)
        try:
            async with asyncio.timeout(CHECKPOINT_TIMEOUT_S):
                step, key = await written
        except (RayError, TimeoutError) as error:
            raise self._unwritten("writing a checkpoint", error) from error
        return step, key

    async def preview(self, name: str) -> tuple[int, Any] | None:
        """Steps done by a resident and a reference to where it is heading; None if that cannot be said now."""
        latents, known = self._ranks[0].preview.options(concurrency_group="state", num_returns=2).remote(name)
        try:
            async with asyncio.timeout(CHECKPOINT_TIMEOUT_S):
                step = await known
        except (RayError, TimeoutError) as error:
            logger.warning("no preview: %s", type(error).__name__)
            return None
        return None if step is None else (step, latents)

    async def discard(self, key: str) -> None:
        """Remove a checkpoint that nobody will publish."""
        try:
            await self._ranks[0].discard.options(concurrency_group="state").remote(key)
        except RayError as error:
            logger.warning("a checkpoint stays behind: %s", type(error).__name__)

    async def watch(self, period_s: float = 1.0) -> GangError:
        """Ping the ranks; returns when the gang is lost, saying why."""
        while self.error is None:
            await asyncio.sleep(period_s)
            if self.error is None:
                await self._ping("ping_timeout_s", self._config.ping_timeout_s)
        return self.error

    async def _watch_start(self, period_s: float = 1.0) -> None:
        # An actor answers nothing before it is made, however long its process and its libraries take.
        made = _tasks([rank.ping.options(concurrency_group="ping").remote() for rank in self._ranks])
        try:
            await asyncio.wait(made)
        finally:
            _abandon(set(made))
        while self.error is None:
            await self._ping("START_SILENCE_S", START_SILENCE_S)
            await asyncio.sleep(period_s)

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

    async def _ping(self, limit: str, timeout_s: float) -> None:
        pings = [rank.ping.options(concurrency_group="ping").remote() for rank in self._ranks]
        done, late = await asyncio.wait(_tasks(pings), timeout=timeout_s)
        _abandon(late)
        if (error := _first_error(done)) is not None:
            self.lose(f"a rank died: {type(error).__name__}")
        elif late:
            self.lose(f"{len(late)} of {len(pings)} ranks did not answer within {limit}={timeout_s:g}")

    def _unwritten(self, what: str, error: Exception) -> PusaError:
        """What went wrong with a checkpoint: the end of the gang only if it was the end of rank 0."""
        cause = _cause(error)
        if isinstance(cause, RayActorError):
            return self.lose(f"a rank died while {what}")
        if isinstance(cause, TimeoutError):  # pings would have told of a rank that hangs
            return StorageError(errno.ETIMEDOUT, f"{what}: no answer")
        return cause if isinstance(cause, PusaError) else ReplicaLostError(f"{what}: {type(cause).__name__}")

    async def _settle(self, what: str, refs: Sequence[Any], deadline_s: float) -> list[Any]:
        began, tasks = time.monotonic(), _tasks(refs)
        done, late = await asyncio.wait(tasks, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        if late and (first := _first_error(done)) is not None:
            if self._died(done):
                _abandon(late)
                raise self.lose(f"a rank died in {what}")
            # That a tensor is lost, every node finds out by itself, after tries of its own: not together.
            left_s = began + deadline_s - time.monotonic() if isinstance(_cause(first), ObjectLostError) else 0.0
            _, late = await asyncio.wait(late, timeout=max(AGREEMENT_S, left_s))
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
        causes = [None if error is None else _cause(error) for error in errors]
        if any(isinstance(cause, RayActorError) for cause in causes):
            return self.lose(f"a rank died in {what}")
        first = next(cause for cause in causes if cause is not None)
        if isinstance(first, ObjectLostError):  # only while tensors are fetched: nothing has run
            return ReplicaLostError(f"{what}: a tensor of the job is lost: {first}")
        # All ranks compute the same values, so an error of the job is raised by each of them.
        if isinstance(first, PusaError) and all(type(cause) is type(first) for cause in causes):
            return first
        return self.lose(f"{what}: {first!r}")


def new_worker(model: ModelConfig, config: DenoiserConfig) -> "Worker":
    """A rank's worker, made in the rank's process."""
    with heap.importing():
        from pusa_dist.worker import Worker, WorkerOptions  # torch stays out of the other roles

    options = WorkerOptions(
        device=config.device,
        threads=config.threads_per_rank,
        timeout_s=config.start_timeout_s,
        attention=config.attention,
    )
    return Worker(model, config.parallel, options)


def rank_actors(
    config: DenoiserConfig,
    make_worker: MakeWorker,
    artifacts_url: str,
    placement: PlacementGroup | None,
    logs: Logs | None = None,
) -> list[Any]:
    """Have Ray start the ranks of a gang; they end with their maker.

    Args:
        config: of the denoiser.
        make_worker: called in each rank's process.
        artifacts_url: where checkpoints are.
        placement: the gang's placement group; None: anywhere.
        logs: how they log; None: as Ray would have it.
    """
    return [
        _rank_class(config, placement, index).remote(
            make_worker, artifacts_url, None if logs is None else logs.of(rank=index)
        )
        for index in range(config.parallel.world_size)
    ]


def _rank_class(config: DenoiserConfig, placement: PlacementGroup | None, index: int) -> Any:
    strategy = (
        "DEFAULT"
        if placement is None
        else PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=config.bundle_of(index))
    )
    remote: Any = ray.remote
    make_actor = remote(
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        resources=config.resources,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={"ping": 1, "state": 2},
        enable_task_events=False,  # a record of every step would be all that the memory of Ray's head is full of
        scheduling_strategy=strategy,
    )
    return make_actor(Rank)


def _cause(error: BaseException) -> BaseException:
    """What was raised where the call ran."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error
    return cause


def _tasks(refs: Sequence[Any]) -> "list[asyncio.Task[Any]]":
    return [asyncio.ensure_future(_fetch(ref)) for ref in refs]


async def _fetch(ref: Any) -> Any:
    return await ref


def _abandon(late: "set[asyncio.Task[Any]]") -> None:
    for task in late:
        task.cancel()


def _first_error(done: "set[asyncio.Task[Any]]") -> BaseException | None:
    return next((task.exception() for task in done if task.exception() is not None), None)
