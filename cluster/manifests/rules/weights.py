"""Weights are fetched to the node's disk, and checked, before the container that reads them starts."""

import fnmatch
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import dig, of_kind, ray_pods
from cluster.manifests.rules.serve_config import serve_configs

_FETCH = ["python", "-m", "cluster.weights"]


def weights_are_checked(objects: Sequence[Object]) -> list[Finding]:
    """Who mounts the weights has an init container that fetches them there and compares every digest."""
    roots = {args.get("weights_root") for args in _arguments(objects)} - {None}
    found = []
    for pods in ray_pods(objects):
        volumes = {one["name"] for one in pods.ray.get("volumeMounts") or [] if one.get("mountPath") in roots}
        fetched = {
            mount["name"]
            for one in pods.spec.get("initContainers") or []
            if dig(one, "command", default=[])[:3] == _FETCH
            for mount in one.get("volumeMounts") or []
        }
        if volumes - fetched:
            found.append(Finding(pods.where, "an init container must run python -m cluster.weights on the weights"))
    return found


def weights_are_listed(objects: Sequence[Object]) -> list[Finding]:
    """SHA256SUMS names a file for every pattern of the model."""
    sums = [
        one["data"]["SHA256SUMS"] for one in of_kind(objects, "ConfigMap") if "SHA256SUMS" in (one.get("data") or {})
    ]
    names = [line.split("  ", 1)[1] for text in sums for line in text.splitlines() if "  " in line]
    return [
        Finding("ConfigMap/weights", f"SHA256SUMS has no file for {pattern}, which model {args['model']} reads")
        for args in _arguments(objects)
        if args.get("weights_root")
        for pattern in _patterns(str(args["model"]))
        if not fnmatch.filter(names, pattern)
    ]


def _arguments(objects: Sequence[Object]) -> list[dict[str, Any]]:
    return [one.get("args") or {} for config in serve_configs(objects) for one in config.get("applications") or []]


def _patterns(model: str) -> list[str]:
    """Files that a shipped model reads, by its YAML."""
    path = files("configs") / "model" / f"{model}.yaml"
    values = yaml.safe_load(path.read_text()) if path.is_file() else {}
    weights = {name: value for name, value in dig(values, "weights", default={}).items() if name != "root"}
    found = [*weights.values(), dig(values, "lora", "files", default={})]
    return [
        text for one in found for text in (one.values() if isinstance(one, dict) else [one]) if isinstance(text, str)
    ]


RULES = (weights_are_checked, weights_are_listed)
