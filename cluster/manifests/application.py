"""The application of a Serve config, built as Ray builds it, and what its replicas need.

Nothing of the product is imported here by name: the config's own ``import_path`` is, as Ray does.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Deployment:
    """What one deployment needs of the cluster."""

    name: str
    min_replicas: int
    max_replicas: int
    bundles: tuple[Mapping[str, float], ...]
    """What a replica asks for; one bundle, or those of its placement group."""
    selector: Mapping[str, str]
    """Labels of the nodes that it may run on."""
    spread: bool
    """Every bundle on a node of its own, instead of all on one."""


@functools.cache  # of a pure function: every rule asks it of the same text
def deployments(serve_config: str) -> tuple[Deployment, ...]:
    """Deployments of every application in a Serve config file.

    Raises:
        Exception: whatever the file, the builder or its arguments raise; a rule of its own tells.
    """
    return tuple(
        _deployment(built, dict(one) if one else {})
        for application in yaml.safe_load(serve_config)["applications"]
        for built in _built(application)
        for one in [{each["name"]: each for each in application.get("deployments") or []}.get(built.name)]
    )


def _built(application: Mapping[str, Any]) -> list[Any]:
    from ray.serve._private.build_app import build_app  # what `serve build` uses; there is no public way

    module, _, name = str(application["import_path"]).partition(":")
    builder = getattr(importlib.import_module(module), name)
    (parameter,) = inspect.signature(builder).parameters.values()
    bound = builder(parameter.annotation.model_validate(application.get("args") or {}))
    return list(build_app(bound, name=application["name"], default_runtime_env={}).deployments)


def _deployment(built: Any, given: dict[str, Any]) -> Deployment:
    """One deployment, with what the config file says instead of the code."""
    replica, config = built._replica_config, built._deployment_config
    options = {**replica.ray_actor_options, **(given.get("ray_actor_options") or {})}
    scaling: Any = given.get("autoscaling_config") or config.autoscaling_config
    if hasattr(scaling, "model_dump"):
        scaling = scaling.model_dump()
    if "num_replicas" in given and given["num_replicas"] not in (None, "auto"):
        scaling = None
    fixed = given.get("num_replicas") or config.num_replicas
    bundles = given.get("placement_group_bundles") or replica.placement_group_bundles
    selectors = replica.placement_group_bundle_label_selector
    alone = {
        "CPU": options.get("num_cpus") or 0,
        "GPU": options.get("num_gpus") or 0,
        **(options.get("resources") or {}),
    }
    return Deployment(
        built.name,
        scaling["min_replicas"] if scaling else fixed,
        scaling["max_replicas"] if scaling else fixed,
        tuple({name: float(amount) for name, amount in one.items() if amount} for one in bundles or [alone]),
        (selectors[0] if selectors else None) or options.get("label_selector") or {},
        str(given.get("placement_group_strategy") or replica.placement_group_strategy) in ("STRICT_SPREAD", "SPREAD"),
    )
