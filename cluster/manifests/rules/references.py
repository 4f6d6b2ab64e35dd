"""What one object says of another: names, keys, volumes, ports and selectors that must exist."""

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import Pods, all_pods, cluster_of, dig, of_kind, ray_services, title
from cluster.manifests.selectors import selects


def config_maps_exist(objects: Sequence[Object]) -> list[Finding]:
    """Every ConfigMap that is mounted or read, with its keys."""
    return _missing(objects, "ConfigMap", "configMap", "name", "configMapKeyRef", "configMapRef")


def secrets_exist(objects: Sequence[Object]) -> list[Finding]:
    """Every Secret that is mounted or read, with its keys: here, or in the overlay's secrets.example.yaml."""
    found = _missing(objects, "Secret", "secret", "secretName", "secretKeyRef", "secretRef")
    keys = _keys(objects, "Secret")
    for one in ray_services(objects):
        path = ("gcsFaultToleranceOptions", "redisPassword", "valueFrom", "secretKeyRef")
        reference = dig(cluster_of(one), *path)
        if reference is not None and reference.get("key") not in keys.get(reference.get("name"), ()):
            found.append(Finding(title(one), f"Secret {reference.get('name')} has no key {reference.get('key')}"))
    return found


def volumes_exist(objects: Sequence[Object]) -> list[Finding]:
    """What is mounted is a volume of the pod, and what is a volume is mounted and can be had."""
    claims = {dig(one, "metadata", "name") for one in of_kind(objects, "PersistentVolumeClaim")}
    own = {
        title(one): {dig(claim, "metadata", "name") for claim in dig(one, "spec", "volumeClaimTemplates", default=[])}
        for one in of_kind(objects, "StatefulSet")
    }
    found = []
    for pods in all_pods(objects):
        volumes = {one["name"] for one in pods.spec.get("volumes") or []} | own.get(pods.where, set())
        mounted = {mount["name"] for one in pods.all_containers for mount in one.get("volumeMounts") or []}
        found += [Finding(pods.where, f"volume {name} is mounted and is none") for name in sorted(mounted - volumes)]
        found += [Finding(pods.where, f"volume {name} is mounted nowhere") for name in sorted(volumes - mounted)]
        found += [
            Finding(pods.where, f"PersistentVolumeClaim {name} does not exist")
            for one in pods.spec.get("volumes") or []
            for name in [dig(one, "persistentVolumeClaim", "claimName")]
            if name is not None and name not in claims
        ]
    return found


def mounted_files_are_there(objects: Sequence[Object]) -> list[Finding]:
    """A variable or argument that names a file below a mounted ConfigMap or Secret names one of its keys."""
    keys = {"configMap": _keys(objects, "ConfigMap"), "secret": _keys(objects, "Secret")}
    found = []
    for pods in all_pods(objects):
        volumes = {one["name"]: one for one in pods.spec.get("volumes") or []}
        for container in pods.all_containers:
            paths = [str(one.get("value")) for one in container.get("env") or []]
            paths += [str(one) for one in container.get("command") or []]
            for mount in container.get("volumeMounts") or []:
                volume = volumes.get(mount["name"], {})
                for kind, name_key in (("configMap", "name"), ("secret", "secretName")):
                    if kind not in volume:
                        continue
                    name = volume[kind].get(name_key)
                    below = [path for path in paths if path.startswith(f"{mount['mountPath']}/")]
                    found += [
                        Finding(f"{pods.where} {container.get('name')}", f"{path}: {name} has no such key")
                        for path in below
                        if name in keys[kind] and path.removeprefix(f"{mount['mountPath']}/") not in keys[kind][name]
                    ]
            mounts = [str(one["mountPath"]) for one in container.get("volumeMounts") or []]
            found += [
                Finding(f"{pods.where} {container.get('name')}", f"{path}: nothing is mounted there")
                for path in paths
                if path.startswith("/etc/pusa/") and not any(f"{path}/".startswith(f"{one}/") for one in mounts)
            ]
    return found


def accounts_exist(objects: Sequence[Object]) -> list[Finding]:
    """Every service account; the operator does not make the one that is named."""
    names = {dig(one, "metadata", "name") for one in of_kind(objects, "ServiceAccount")}
    return [
        Finding(pods.where, f"ServiceAccount {name} does not exist")
        for pods in all_pods(objects)
        for name in [pods.spec.get("serviceAccountName")]
        if name is not None and name not in names
    ]


def priority_classes_exist(objects: Sequence[Object]) -> list[Finding]:
    """Every priority class; the system has its own."""
    names = {dig(one, "metadata", "name") for one in of_kind(objects, "PriorityClass")}
    return [
        Finding(pods.where, f"PriorityClass {name} does not exist")
        for pods in all_pods(objects)
        for name in [pods.spec.get("priorityClassName")]
        if name is not None and name not in names and not name.startswith("system-")
    ]


def selectors_match(objects: Sequence[Object]) -> list[Finding]:
    """Every selector takes some pod, and none names a cluster, whose name is made anew by every upgrade."""
    labels = [*(pods.labels for pods in all_pods(objects)), *_made_by_controllers(objects)]
    return [
        Finding(where, "the selector takes no pod of ours" if selector else "the selector is empty")
        for where, selector in _selectors(objects)
        if not selector or not any(selects(selector, one) for one in labels)
    ] + [
        Finding(where, "ray.io/cluster is made anew by every upgrade; select by ray.io/group")
        for where, selector in _selectors(objects)
        if "ray.io/cluster" in dig(selector, "matchLabels", default={})
    ]


def named_ports_exist(objects: Sequence[Object]) -> list[Finding]:
    """A port that is named in a Service, a NetworkPolicy or a probe is named so by a pod that is meant."""
    found = []
    for one in of_kind(objects, "Service"):
        meant = _meant(objects, {"matchLabels": dig(one, "spec", "selector", default={})})
        for port in dig(one, "spec", "ports", default=[]):
            found += _unnamed(title(one), port.get("targetPort"), meant)
    for one in of_kind(objects, "NetworkPolicy"):
        meant = _meant(objects, dig(one, "spec", "podSelector"))
        for rule in dig(one, "spec", "ingress", default=[]):
            for port in rule.get("ports") or []:
                found += _unnamed(title(one), port.get("port"), meant)
    for pods in all_pods(objects):
        for container in pods.containers:
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                found += _unnamed(pods.where, dig(container, probe, "httpGet", "port"), [pods])
    return found


def _made_by_controllers(objects: Sequence[Object]) -> Iterator[dict[str, str]]:
    """Labels of pods that are in no manifest: an upgrade's Gateway, and the job that empties Redis."""
    for one in ray_services(objects):
        if dig(one, "spec", "upgradeStrategy", "clusterUpgradeOptions"):
            yield {"gateway.networking.k8s.io/gateway-name": f"{dig(one, 'metadata', 'name')}-gateway"}
        if "gcsFaultToleranceOptions" in cluster_of(one):
            yield {"ray.io/node-type": "redis-cleanup"}


def _meant(objects: Sequence[Object], selector: Any) -> list[Pods]:
    return [pods for pods in all_pods(objects) if selects(selector, pods.labels)]


def _unnamed(where: str, port: Any, meant: list[Pods]) -> list[Finding]:
    names = {one.get("name") for pods in meant for container in pods.containers for one in container.get("ports") or []}
    return (
        [Finding(where, f"no container has a port named {port}")] if isinstance(port, str) and port not in names else []
    )


def _selectors(objects: Sequence[Object]) -> Iterator[tuple[str, Any]]:
    for one in of_kind(objects, "Service"):
        yield title(one), {"matchLabels": dig(one, "spec", "selector", default={})}
    for one in of_kind(objects, "PodDisruptionBudget"):
        yield title(one), dig(one, "spec", "selector", default={})
    for one in of_kind(objects, "NetworkPolicy"):
        if dig(one, "spec", "podSelector"):
            yield title(one), one["spec"]["podSelector"]
    for pods in all_pods(objects):
        for spread in pods.spec.get("topologySpreadConstraints") or []:
            yield f"{pods.where} topologySpreadConstraints", spread.get("labelSelector")


def _keys(objects: Sequence[Object], kind: str) -> dict[str, set[str]]:
    return {
        dig(one, "metadata", "name"): {key for part in ("data", "stringData") for key in one.get(part) or {}}
        for one in of_kind(objects, kind)
    }


def _missing(
    objects: Sequence[Object], kind: str, volume: str, name_key: str, key_reference: str, reference: str
) -> list[Finding]:
    keys = _keys(objects, kind)
    found = []
    for pods in all_pods(objects):
        for one in pods.spec.get("volumes") or []:
            if volume in one and not one[volume].get("optional"):
                name = one[volume].get(name_key)
                wanted = [item["key"] for item in one[volume].get("items") or []]
                found += _absent(pods.where, kind, name, wanted, keys)
        for container in pods.all_containers:
            for one in container.get("env") or []:
                given = dig(one, "valueFrom", key_reference)
                if given is not None:
                    found += _absent(pods.where, kind, given.get("name"), [given.get("key")], keys)
            for one in container.get("envFrom") or []:
                if reference in one:
                    found += _absent(pods.where, kind, one[reference].get("name"), [], keys)
    return found


def _absent(where: str, kind: str, name: Any, wanted: list[Any], keys: dict[str, set[str]]) -> list[Finding]:
    if name not in keys:
        return [Finding(where, f"{kind} {name} does not exist")]
    return [Finding(where, f"{kind} {name} has no key {key}") for key in wanted if key not in keys[name]]


RULES = (
    config_maps_exist,
    secrets_exist,
    volumes_exist,
    mounted_files_are_there,
    accounts_exist,
    priority_classes_exist,
    selectors_match,
    named_ports_exist,
)
