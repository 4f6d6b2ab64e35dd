"""Whether what the application asks for is there: labels, sizes and numbers of pods."""

import math
from collections.abc import Callable, Mapping, Sequence

from cluster.manifests.application import Deployment
from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import Pods, cluster_of, dig, of_kind, quantity, ray_pods, ray_services, title
from cluster.manifests.rules.pods import GPU
from cluster.manifests.rules.serve_config import every_deployment, serve_configs

_HTTP_PORT = 8000
"""The operator's probe and its service know no other."""


def labels_select_a_group(objects: Sequence[Object]) -> list[Finding]:
    """Every deployment has a group whose Ray labels it may run on."""
    return [
        Finding(f"deployment {one.name}", f"no group carries the labels {dict(one.selector)}")
        for one in every_deployment(objects)
        if not _candidates(objects, one)
    ]


def bundles_fit_a_pod(objects: Sequence[Object]) -> list[Finding]:
    """No replica, nor a gang that must be on one node, asks for more than one pod has."""
    found = []
    for one in every_deployment(objects):
        groups = _candidates(objects, one)
        if groups and not any(_fits_once(one, pods) for pods in groups):
            asked = one.bundles[0] if one.spread else _total(one.bundles)
            sizes = ", ".join(f"{pods.where}: {_size(pods)}" for pods in groups)
            found.append(Finding(f"deployment {one.name}", f"a replica asks for {asked} of a pod; {sizes}"))
    return found


def groups_hold_every_replica(objects: Sequence[Object]) -> list[Finding]:
    """All deployments of the same labels, at their most, fit into the groups that carry them, at theirs."""
    found = []
    wanted = every_deployment(objects)
    for selector in {tuple(sorted(one.selector.items())) for one in wanted}:
        together = [one for one in wanted if tuple(sorted(one.selector.items())) == selector]
        groups = [pods for pods in _candidates(objects, together[0]) if pods.max_pods < 2**31]
        if not groups or any(not any(_fits_once(one, pods) for pods in groups) for one in together):
            continue  # rules of their own
        names = ", ".join(one.name for one in together)
        gangs = [one for one in together if len(one.bundles) > 1]
        for one in gangs:
            room = sum(_gangs(one, pods) for pods in groups)
            if room < one.max_replicas:
                found.append(Finding(f"deployment {one.name}", f"{one.max_replicas} replicas, room for {room}"))
        for resource in {name for one in together for name in _total(one.bundles)}:
            asked = sum(one.max_replicas * _total(one.bundles).get(resource, 0) for one in together)
            there = sum(pods.max_pods * _size(pods).get(resource, 0) for pods in groups)
            if asked > there and len(gangs) < len(together):  # of gangs alone it has been said
                found.append(
                    Finding(f"deployments {names}", f"{asked:g} {resource} at most, the groups have {there:g}")
                )
    return found


def groups_are_used(objects: Sequence[Object]) -> list[Finding]:
    """A worker group that no deployment may run on only costs."""
    wanted = every_deployment(objects)
    if not wanted or not all(_candidates(objects, one) for one in wanted):
        return []  # rules of their own
    return [
        Finding(pods.where, "no deployment of the application may run on it")
        for pods in ray_pods(objects)
        if not pods.is_head and not any(pods in _candidates(objects, one) for one in wanted)
    ]


def stores_are_shared(objects: Sequence[Object]) -> list[Finding]:
    """More than one Ray node needs a database and a bucket that all of them reach."""
    if sum(pods.max_pods for pods in ray_pods(objects)) <= 1:
        return []
    return [
        Finding("serveConfigV2", f"{name} is {url!r}, but there is more than one node; use a server")
        for args in _arguments(objects)
        for name in ("database_url", "artifacts_url")
        for url in [args.get(name)]
        if url is None or str(url).startswith(("sqlite", "file:"))
    ]


def http_is_reachable(objects: Sequence[Object]) -> list[Finding]:
    """The operator's service and probe expect port 8000 of every interface."""
    options = [dig(config, "http_options", default={}) for config in serve_configs(objects)]
    return [
        Finding("serveConfigV2", f"http_options: host 0.0.0.0 and port {_HTTP_PORT}, got {one}")
        for one in options
        if one.get("host") != "0.0.0.0" or one.get("port", _HTTP_PORT) != _HTTP_PORT
    ]


def keys_are_asked_for(objects: Sequence[Object]) -> list[Finding]:
    """What the network reaches asks for keys; the application refuses to start otherwise."""
    return [
        Finding("serveConfigV2", "args.require_keys must be true: the service is reachable from the network")
        for args in _arguments(objects)
        if args.get("require_keys") is not True
    ]


def proxies_are_on_workers(objects: Sequence[Object]) -> list[Finding]:
    """A head that the service leaves out must not be the only one with a proxy."""
    return [
        Finding(title(one), "proxy_location must be EveryNode: the head is not in the service")
        for one in ray_services(objects)
        if dig(one, "spec", "excludeHeadPodFromServeSvc") and cluster_of(one).get("workerGroupSpecs")
        for config in serve_configs([one])
        if config.get("proxy_location", "EveryNode") != "EveryNode"
    ]


def quota_covers_an_upgrade(objects: Sequence[Object]) -> list[Finding]:
    """Groups at their most, and a second cluster beside them."""
    sizes: dict[str, Callable[[Pods], float]] = {f"requests.{GPU}": lambda pods: pods.limit(GPU), "pods": lambda _: 1}
    needed = {
        name: sum(_during_upgrade(service, size) for service in ray_services(objects)) for name, size in sizes.items()
    }
    return [
        Finding(title(one), f"{name}: {hard[name]} is below {most}, the most during an upgrade")
        for one in of_kind(objects, "ResourceQuota")
        for hard in [dig(one, "spec", "hard", default={})]
        for name, most in needed.items()
        if name in hard and quantity(hard[name]) < most
    ]


def _during_upgrade(service: Object, size: Callable[[Pods], float]) -> int:
    """What both clusters ask for: the second begins with the least of every group, whatever the surge."""
    most = sum(pods.max_pods * size(pods) for pods in ray_pods([service]))
    least = sum(pods.min_pods * size(pods) for pods in ray_pods([service]))
    strategy = dig(service, "spec", "upgradeStrategy", default={})
    if strategy.get("type") == "None":
        return math.ceil(most)
    surge = float(dig(strategy, "clusterUpgradeOptions", "maxSurgePercent", default=100)) / 100
    return math.ceil(most + max(surge * most, least))


def _arguments(objects: Sequence[Object]) -> list[Mapping[str, object]]:
    return [
        one.get("args") or {} for config in serve_configs(objects) for one in dig(config, "applications", default=[])
    ]


def _candidates(objects: Sequence[Object], one: Deployment) -> list[Pods]:
    """Groups that a deployment may run on; a head without CPUs only while nothing is asked for."""
    return [
        pods
        for pods in ray_pods(objects)
        if all(dig(pods.group, "labels", name) == value for name, value in one.selector.items())
        and (not pods.is_head or _size(pods)["CPU"])
    ]


def _size(pods: Pods) -> dict[str, float]:
    """What a Ray node in such a pod offers."""
    cpus = dig(pods.group, "rayStartParams", "num-cpus")
    try:
        num_cpus = pods.limit("cpu") if cpus is None else float(cpus)
    except ValueError:
        num_cpus = 0.0
    return {"CPU": num_cpus, "GPU": pods.limit(GPU)}


def _total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for bundle in bundles for name in bundle}
    return {name: round(sum(bundle.get(name, 0) for bundle in bundles), 6) for name in sorted(names)}


def _fits_once(one: Deployment, pods: Pods) -> bool:
    if one.spread and len(one.bundles) > 1:
        return all(_within(bundle, _size(pods)) for bundle in one.bundles) and pods.max_pods >= len(one.bundles)
    return _within(_total(one.bundles), _size(pods))


def _gangs(one: Deployment, pods: Pods) -> int:
    """Gangs that a group holds at most."""
    if not _fits_once(one, pods):
        return 0
    if one.spread:
        return pods.max_pods // len(one.bundles)
    size, asked = _size(pods), _total(one.bundles)
    return pods.max_pods * int(min(size.get(name, 0) // amount for name, amount in asked.items()))


def _within(asked: Mapping[str, float], size: Mapping[str, float]) -> bool:
    return all(amount <= size.get(name, 0) for name, amount in asked.items())


RULES = (
    labels_select_a_group,
    bundles_fit_a_pod,
    groups_hold_every_replica,
    groups_are_used,
    stores_are_shared,
    http_is_reachable,
    keys_are_asked_for,
    proxies_are_on_workers,
    quota_covers_an_upgrade,
)
