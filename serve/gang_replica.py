"""A denoiser as Ray sees it: a Serve replica, the coordinator's actor in its placement group, and the ranks.

Serve places, watches and replaces the replica; with it go the coordinator and the ranks. Jobs do not
pass through Serve: the dispatcher talks to the coordinator's actor, which the replica tells it of.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pusa_dist.errors import GangError
from serve.config import DenoiserConfig
from serve.denoiser import Denoiser
from serve.gang import Gang, MakeWorker, rank_actors
from serve.logs import Logs
from serve.metrics import GangMetrics
from serve.stages import Assignment, Finished, Kept, ReplicaLostError, TensorRef

logger = logging.getLogger(__name__)

NAMESPACE = "pusa-gangs"
"""Ray namespace of the coordinators, where ``serve.node`` finds them."""
REGISTER_S = 2.0
_ANSWER_S = 5.0
_KEPT_S = 30.0
"""A dispatcher that has not asked for a job's latents by then has died, and another attempt makes them again."""


class Coordinator(Denoiser):
    """The coordinator of ranks that are starting; an actor without resources, beside rank 0."""

    def __init__(self, config: DenoiserConfig, ranks: Sequence[Any], logs: Logs) -> None:
        logs.configure()
        super().__init__(config, Gang(config, ranks), GangMetrics())
        self._kept: dict[tuple[str, int], TensorRef] = {}
        self._taken = asyncio.Event()

    async def generate(self, assignment: Assignment) -> AsyncGenerator[Any, None]:
        """See ``GangHandle.generate``, but that it ends with ``Kept``.

        Ray loses count, now and then, of references inside what a stream yields (ray-project/ray#58080): the
        latents would be gone while they wait for a VAE. It does not in the answer of a call.
        """
        job = assignment.job_id, assignment.attempt
        async with aclosing(super().generate(assignment)) as messages:
            async for message in messages:
                if isinstance(message, Finished):
                    self._kept[job] = message.latents
                    yield Kept()
                else:
                    yield message
        try:
            async with asyncio.timeout(_KEPT_S):
                while job in self._kept:
                    self._taken.clear()
                    await self._taken.wait()
        except TimeoutError:
            logger.warning("job %s: nobody asked for the latents of attempt %d", *job)
        finally:
            self._kept.pop(job, None)

    async def take(self, job_id: str, attempt: int) -> TensorRef:
        """Final latents of a job whose stream has ended with ``Kept``; once.

        Raises:
            ReplicaLostError: they are not kept any more.
        """
        latents = self._kept.pop((job_id, attempt), None)
        if latents is None:
            raise ReplicaLostError("the gang does not keep the latents any more")
        self._taken.set()
        return latents

    async def start(self) -> list[int]:
        """Wait until the ranks are ready; returns their process ids."""
        await self._gang.start()
        await self.check_health()
        return self._gang.pids


class DenoiserReplica:
    """Owner of a coordinator: tells the dispatcher of it, and Serve how it is."""

    def __init__(
        self, logs: Logs, config: DenoiserConfig, make_worker: MakeWorker, artifacts_url: str, dispatcher: str
    ) -> None:
        context = ray_serve.get_replica_context()
        self._config = config
        self._app_name = context.app_name
        self._dispatcher = dispatcher
        self._name = f"gang-{secrets.token_hex(6)}"
        logs = logs.of(gang=self._name)
        logs.configure()
        placement = ray.util.get_current_placement_group()
        assert placement is not None, "the deployment of the denoiser has placement group bundles"
        # Their processes start while the coordinator's does.
        self._ranks = rank_actors(config, make_worker, artifacts_url, placement, logs)
        remote: Any = ray.remote
        strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=0)
        self._coordinator = (
            remote(Coordinator)
            .options(
                name=self._name,
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=strategy,
                enable_task_events=False,  # as of the ranks: it is asked for its health every second
            )
            .remote(config, self._ranks, logs)
        )
        self.pids = list(ray.get(self._coordinator.start.remote()))
        self._demand: dict[str, float] = {}
        self._registering = asyncio.get_running_loop().create_task(self._register())

    async def check_health(self) -> None:
        """Raise if the gang is lost, or its coordinator dead or silent.

        What is lost stays lost, and holds nothing to hand over: the replica ends, where Serve would ask twice more.
        """
        if self._registering.done():
            self._registering.result()
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._coordinator.check_health.remote()
        except (GangError, RayActorError) as error:
            logger.error("gang %s ends, to be replaced: %s", self._name, type(error).__name__)
            ray.kill(ray.get_runtime_context().current_actor)
            raise

    async def rank_pids(self) -> list[int]:
        """Process ids of the ranks, for operators and tests."""
        return self.pids

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve hands to the autoscaling policy: any replica tells what the dispatcher told it."""
        return self._demand

    async def _register(self) -> None:
        while True:
            try:
                dispatcher = ray_serve.get_deployment_handle(self._dispatcher, self._app_name)
                async with asyncio.timeout(_ANSWER_S):
                    registered: Awaitable[dict[str, float]] = dispatcher.register.remote(
                        self._name, self._coordinator, self._config.max_resident
                    )
                    self._demand = await registered
            except Exception as error:  # noqa: BLE001 - whatever keeps the dispatcher: it will be back
                logger.warning("gang %s could not register: %s", self._name, type(error).__name__)
            await asyncio.sleep(REGISTER_S)

    async def __del__(self) -> None:
        """Hand over what is here: Ray Serve awaits this before it ends the replica."""
        self._registering.cancel()
        try:
            async with asyncio.timeout(self._config.handover_timeout_s):
                await self._coordinator.leave.remote()
        except Exception as error:  # noqa: BLE001 - it is being replaced because it does not work
            logger.warning("gang %s handed nothing over: %s", self._name, type(error).__name__)
