"""The application: every role's plain class made a Ray Serve deployment, placed as the configuration says.

The only file that knows Ray Serve's options. What each role is given is what it may touch: only the
gateway and the dispatcher get the database's URL.
"""

import asyncio
import functools
import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from pusa_dist.config import ModelConfig
from pusa_dist.errors import ConfigError
from serve.config import (
    MAX_STREAMS,
    RoleConfig,
    ServeConfig,
    WorkConfig,
    require_loopback,
    require_shared_stores,
)
from serve.dispatcher import Dispatcher
from serve.gang import MakeWorker, new_worker
from serve.gang_replica import DenoiserReplica
from serve.logs import Logs
from serve.metrics import GatewayMetrics, JobMetrics, VaeMetrics
from serve.moderation import Moderation
from serve.serve_stages import ActorGang, ServeStages
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import JobStore
from serve.sweeper import keep_sweeping
from serve.text_encoder import TextEncoder
from serve.traces import Traces
from serve.vae import NUM_DECODES, NUM_OTHERS, Vae
from serve.webhooks import Webhooks, keep_delivering

logger = logging.getLogger(__name__)

GATEWAY, DISPATCHER, TEXT_ENCODER, VAE, DENOISER = "Gateway", "Dispatcher", "TextEncoder", "Vae", "Denoiser"
ROLES = (GATEWAY, DISPATCHER, TEXT_ENCODER, VAE, DENOISER)

# A lost process is found within seconds; a busy one answers in time because no role computes on its loop.
_HEALTH: dict[str, Any] = {"health_check_period_s": 1.0, "health_check_timeout_s": 10.0}
# How long Serve waits before it does what a policy asks for. Ours for gangs has delays of its own.
_AT_ONCE: dict[str, Any] = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0}
_UNHURRIED: dict[str, Any] = {"upscale_delay_s": 2.0, "downscale_delay_s": 60.0}
# Before a replica ends, Serve waits two seconds for calls that may be on their way. These are given no work by any.
_UNCALLED: dict[str, Any] = {"graceful_shutdown_wait_loop_s": 0.1}
_LOOK_S = 2.0
Handle = DeploymentHandle[Any]


class GatewayReplica:
    """The HTTP ingress; see ``serve.http.gateway``."""

    def __init__(self, config: ServeConfig, dispatcher: Handle, denoiser: Handle) -> None:
        from serve.http.gateway import Gateway  # FastAPI and all it needs stay out of the other roles

        Logs(config.logs, {"role": GATEWAY}).configure()
        check_cluster(config)
        self._behind = dispatcher, denoiser  # binds them, and all behind them, into the application
        app_name = ray_serve.get_replica_context().app_name
        traces = Traces.to(traces_endpoint(config), GATEWAY)
        self._gateway = Gateway(
            config, functools.partial(readiness, app_name), measures=GatewayMetrics(), traces=traces
        )

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve asks for after construction."""
        from serve.http.api import create_api

        return create_api(self._gateway)


class DispatcherReplica:
    """The dispatcher over the handles of the other roles; see ``serve.dispatcher``."""

    def __init__(self, config: ServeConfig, model: str, precision: str, text_encoder: Handle, vae: Handle) -> None:
        Logs(config.logs, {"role": DISPATCHER}).configure()
        check_cluster(config)
        metrics = JobMetrics()
        self._traces = Traces.to(traces_endpoint(config), DISPATCHER)
        self._store = JobStore(config.resolved_database_url)
        self._store.create_tables()
        artifacts = ArtifactStore(config.resolved_artifacts_url)
        self._dispatcher = Dispatcher(
            self._store,
            artifacts,
            ServeStages(text_encoder, vae),
            metrics,
            model=model,
            precision=precision,
            job_deadline_s=config.job_deadline_s,
            moderation=Moderation.load(config.moderation, metrics.moderated, config.moderation_timeout_s),
            num_decoders=NUM_DECODES,
            max_decoding=8 * NUM_DECODES * _most(config.vae),
            handover_s=config.denoiser.handover_timeout_s,
            traces=self._traces,
        )
        self._running = asyncio.get_running_loop().create_task(self._dispatcher.run())
        self._following = asyncio.get_running_loop().create_task(self._follow_vaes())
        sweeping = keep_sweeping(self._store, artifacts, leftovers_age_s=config.leftovers_age_s)
        self._sweeping = asyncio.get_running_loop().create_task(sweeping)
        webhooks = Webhooks(self._store, on_try=metrics.webhook)
        self._delivering = asyncio.get_running_loop().create_task(keep_delivering(webhooks))

    async def register(self, name: str, coordinator: Any, max_resident: int) -> dict[str, float]:
        """A gang is there; returns what ``record_autoscaling_stats`` does. See ``serve.gang_replica``."""
        self._dispatcher.register(name, ActorGang(coordinator), max_resident)
        return self._dispatcher.demand.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve hands to the autoscaling policy."""
        return self._dispatcher.demand.stats()

    async def check_health(self) -> None:
        """Raise if the loop has ended, or stands still."""
        if self._running.done():
            self._running.result()
        self._dispatcher.check()

    async def __del__(self) -> None:
        """Drain: Ray Serve awaits this before it ends the replica."""
        self._following.cancel()
        self._sweeping.cancel()
        self._delivering.cancel()
        await self._dispatcher.close()
        await self._running
        self._store.close()
        await asyncio.to_thread(self._traces.close)

    async def _follow_vaes(self) -> None:
        """Keep what waits for a VAE here, in fair order, until there is one; with a replica it has its place."""
        app_name = ray_serve.get_replica_context().app_name
        while True:
            try:
                # Without any, one is given all the same: Serve has to see that somebody waits.
                self._dispatcher.resize_decoders(NUM_DECODES * max(1, await num_running(app_name, VAE)))
            except Exception as error:  # noqa: BLE001 - whatever keeps the controller: it will be back
                logger.warning("the number of VAEs is not known: %s", type(error).__name__)
            await asyncio.sleep(_LOOK_S)


class TextEncoderReplica(TextEncoder):
    """See ``serve.text_encoder``."""

    def __init__(self, logs: Logs, model: ModelConfig, config: WorkConfig) -> None:
        logs.configure()
        super().__init__(model, config.device, config.stuck_after_s)


class VaeReplica(Vae):
    """See ``serve.vae``."""

    def __init__(self, logs: Logs, model: ModelConfig, config: WorkConfig, artifacts_url: str) -> None:
        logs.configure()
        super().__init__(model, config.device, artifacts_url, VaeMetrics().decoder_failed, config.stuck_after_s)


def build_app(args: ServeConfig) -> ray_serve.Application:
    """The application of a configuration: ``import_path: serve.app:build_app`` of a Serve config file.

    Raises:
        ConfigError: settings that cannot work, or stores that not every node of the cluster can reach.
    """
    model = args.load_model()
    return application(args, functools.partial(new_worker, model, args.denoiser))


def application(config: ServeConfig, make_worker: MakeWorker) -> ray_serve.Application:
    """The application with a given worker in its ranks; see ``build_app``."""
    model = config.load_model()
    # A relative folder means the builder's, whatever folder the replicas run in.
    config = config.model_copy(update={"state_dir": str(Path(config.state_dir).absolute())})
    if ray.is_initialized():
        require_shared_stores(config, num_alive_nodes())
    text_encoder = _deployment(
        TextEncoderReplica,
        TEXT_ENCODER,
        config.text_encoder,
        max_ongoing_requests=16,
        **_scale(config.text_encoder, **_UNHURRIED, target_ongoing_requests=8.0),
    ).bind(Logs(config.logs, {"role": TEXT_ENCODER}), model, config.text_encoder)
    vae = _deployment(
        VaeReplica,
        VAE,
        config.vae,
        # However badly decodes are spread, there is room for what need not wait for them.
        max_ongoing_requests=NUM_DECODES * _most(config.vae) + NUM_OTHERS,
        # As many decodes are given as there are replicas: more of these are wanted when they are busy most of the time.
        **_scale(config.vae, **_UNHURRIED, target_ongoing_requests=0.85 * NUM_DECODES),
    ).bind(Logs(config.logs, {"role": VAE}), model, config.vae, config.resolved_artifacts_url)
    denoiser = _gang_deployment(config).bind(
        Logs(config.logs, {"role": DENOISER}), config.denoiser, make_worker, config.resolved_artifacts_url, DISPATCHER
    )
    handover_s = config.denoiser.handover_timeout_s + 30.0
    dispatcher = _deployment(
        DispatcherReplica,
        DISPATCHER,
        config.dispatcher,
        max_ongoing_requests=200,
        graceful_shutdown_timeout_s=handover_s,
        **_UNCALLED,
        # One, but Serve asks only what autoscales for what the policy needs to know.
        autoscaling_config=AutoscalingConfig(min_replicas=1, max_replicas=1),
    ).bind(config, model.name, model.precision_on(config.denoiser.device), text_encoder, vae)
    ingress: Any = ray_serve.ingress()(GatewayReplica)
    most_requests = MAX_STREAMS + 200
    return _deployment(
        ingress,
        GATEWAY,
        config.gateway,
        max_ongoing_requests=most_requests,
        **_scale(config.gateway, **_UNHURRIED, target_ongoing_requests=0.5 * most_requests),
    ).bind(config, dispatcher, denoiser)


def check_cluster(config: ServeConfig) -> None:
    """Refuse, from inside the cluster, what would expose or lose something.

    Raises:
        ConfigError: stores that not every node can reach, or an open service without keys.
    """
    require_shared_stores(config, num_alive_nodes())
    client: Any = ray_serve.context._get_global_client()
    require_loopback(config, client.http_config.host)


def traces_endpoint(config: ServeConfig) -> str | None:
    """Who collects traces; None: nobody."""
    return config.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None


def num_alive_nodes() -> int:
    """Nodes of the Ray cluster that are up."""
    list_nodes: Any = ray.nodes
    return sum(bool(node["Alive"]) for node in list_nodes())


async def readiness(app_name: str) -> dict[str, bool]:
    """Whether each role has all its replicas up."""
    status = await asyncio.to_thread(ray_serve.status)
    deployments = status.applications[app_name].deployments
    return {role: role in deployments and deployments[role].status == "HEALTHY" for role in ROLES}


async def num_running(app_name: str, role: str) -> int:
    """Replicas of a role that are up."""
    status = await asyncio.to_thread(ray_serve.status)
    states = status.applications[app_name].deployments[role].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


def _deployment(cls: Any, name: str, role: RoleConfig, **options: Any) -> Any:
    options = {**_HEALTH, "graceful_shutdown_timeout_s": 600.0, **options}
    return ray_serve.deployment(name=name, ray_actor_options=_actor_options(role), **options)(cls)


def _gang_deployment(config: ServeConfig) -> Any:
    role = config.denoiser
    rank = {
        **{name: amount for name, amount in (("CPU", role.num_cpus), ("GPU", role.num_gpus)) if amount},
        **role.resources,
    }
    bundle = {name: amount * role.ranks_per_node for name, amount in rank.items()}
    if not bundle:
        raise ConfigError("denoiser: num_cpus, num_gpus and resources are all empty; a rank must ask for something")
    num_bundles = role.parallel.world_size // role.ranks_per_node
    options: dict[str, Any] = {}
    if role.label_selector:
        options["placement_group_bundle_label_selector"] = [role.label_selector] * num_bundles
    return ray_serve.deployment(
        name=DENOISER,
        ray_actor_options={"num_cpus": 0},  # it only waits, as its coordinator does; both sit beside rank 0
        placement_group_bundles=[bundle] * num_bundles,
        placement_group_strategy="STRICT_SPREAD" if role.spread else "STRICT_PACK",
        graceful_shutdown_timeout_s=role.handover_timeout_s + 10.0,
        **_UNCALLED,
        **_HEALTH,
        **_scale(role, **_AT_ONCE, policy={"policy_function": "cluster.ray_scaling:Denoiser"}),
        **options,
    )(DenoiserReplica)


def _most(role: RoleConfig) -> int:
    """Replicas there may be."""
    return role.max_replicas or role.num_replicas


def _scale(role: RoleConfig, **how: Any) -> dict[str, Any]:
    if role.max_replicas is None:
        return {"num_replicas": role.num_replicas}
    bounds = {"min_replicas": role.num_replicas, "max_replicas": role.max_replicas}
    return {"autoscaling_config": AutoscalingConfig(**bounds, **how)}


def _actor_options(role: RoleConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": role.num_cpus, "num_gpus": role.num_gpus, "resources": role.resources}
    if role.label_selector:
        options["label_selector"] = role.label_selector
    return options
