"""Serve config files, checked more strictly than Ray does, which ignores keys that it does not know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cluster.manifests.application import Deployment, deployments
from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import dig, ray_services, title


def serve_config_has_rays_form(objects: Sequence[Object]) -> list[Finding]:
    """Ray itself can read it."""
    found = []
    for where, text in _texts(objects):
        try:
            ServeDeploySchema.model_validate(yaml.safe_load(text))
        except ValidationError as error:
            found += [Finding(where, f"{_path(one['loc'])}: {one['msg']}") for one in error.errors()]
        except yaml.YAMLError as error:
            found.append(Finding(where, f"no YAML: {' '.join(str(error).split())}"))
    return found


def serve_keys_are_known(objects: Sequence[Object]) -> list[Finding]:
    """A misspelt key is an error and not a setting that is not applied."""
    return [
        Finding(where, f"{path} is no key of a Serve config")
        for where, config in _configs(objects)
        for path in _unknown(ServeDeploySchema, config, "")
    ]


def serve_scaling_is_ordered(objects: Sequence[Object]) -> list[Finding]:
    """Bounds that Ray would only find when it scales."""
    found = []
    for where, deployment in _overrides(objects):
        scaling = deployment.get("autoscaling_config")
        if not isinstance(scaling, dict):
            continue
        try:
            AutoscalingConfig(**{key: value for key, value in scaling.items() if key in AutoscalingConfig.model_fields})
        except ValidationError as error:
            found += [Finding(where, f"autoscaling_config of {deployment['name']}: {error.errors()[0]['msg']}")]
    return found


def serve_args_are_accepted(objects: Sequence[Object]) -> list[Finding]:
    """The builder that ``import_path`` names takes ``args`` and makes an application of them."""
    found = []
    for where, text in _texts(objects):
        try:
            deployments(text)
        except Exception as error:  # noqa: BLE001 - whatever a builder raises is what is wrong with its arguments
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            message = f"{_path(first['loc'])}: {first['msg']}" if first else f"{type(error).__name__}: {error}"
            found.append(Finding(where, f"the application cannot be built: {message}"))
    return found


def serve_routes_are_paths(objects: Sequence[Object]) -> list[Finding]:
    """Applications have routes of their own, which begin with a slash."""
    found = []
    for where, config in _configs(objects):
        routes = [str(one.get("route_prefix", "/")) for one in dig(config, "applications", default=[])]
        found += [
            Finding(where, f"route_prefix {route!r} must begin with / and be used once")
            for route in sorted(set(routes))
            if not route.startswith("/") or routes.count(route) > 1
        ]
    return found


def serve_overrides_name_deployments(objects: Sequence[Object]) -> list[Finding]:
    """What the file sets of a deployment, it sets of one that the application has."""
    names = {one.name for one in every_deployment(objects)}
    return [
        Finding(where, f"deployment {one.get('name')!r} is none of the application's: {', '.join(sorted(names))}")
        for where, one in _overrides(objects)
        if names and one.get("name") not in names
    ]


def every_deployment(objects: Sequence[Object]) -> list[Deployment]:
    """Deployments of all that can be built; what cannot has a rule of its own."""
    found: list[Deployment] = []
    for _, text in _texts(objects):
        try:
            found += deployments(text)
        except Exception:  # noqa: BLE001 - whatever a builder raises
            continue  # said by serve_args_are_accepted
    return found


def serve_configs(objects: Sequence[Object]) -> list[Mapping[str, Any]]:
    """Serve configs that are mappings."""
    return [config for _, config in _configs(objects)]


def as_object(text: str, name: str) -> Object:
    """A Serve config file of its own, for the rules of this file."""
    return {"kind": "RayService", "metadata": {"name": name}, "spec": {"serveConfigV2": text}}


def _texts(objects: Sequence[Object]) -> list[tuple[str, str]]:
    return [(title(one), str(dig(one, "spec", "serveConfigV2", default=""))) for one in ray_services(objects)]


def _configs(objects: Sequence[Object]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, text in _texts(objects):
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError:
            continue  # said by serve_config_has_rays_form
        if isinstance(config, dict):
            yield where, config


def _overrides(objects: Sequence[Object]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (where, one)
        for where, config in _configs(objects)
        for application in dig(config, "applications", default=[])
        for one in application.get("deployments") or []
    ]


def _unknown(model: type[BaseModel], value: Any, path: str) -> Iterator[str]:
    """Paths of keys that the model, or a model below it, has no field for."""
    if not isinstance(value, dict):
        return
    aliases = {field.alias: name for name, field in model.model_fields.items() if field.alias}
    for key, below in value.items():
        name = aliases.get(key, key)
        if name not in model.model_fields:
            yield f"{path}{key}"
            continue
        nested = [AutoscalingConfig] if name == "autoscaling_config" else _models(model.model_fields[name].annotation)
        for one in below if isinstance(below, list) else [below]:
            if nested:
                yield from min((list(_unknown(each, one, f"{path}{key}.")) for each in nested), key=len)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _path(location: Sequence[Any]) -> str:
    return ".".join(str(part) for part in location) or "the file"


RULES = (
    serve_config_has_rays_form,
    serve_keys_are_known,
    serve_scaling_is_ordered,
    serve_args_are_accepted,
    serve_routes_are_paths,
    serve_overrides_name_deployments,
)
