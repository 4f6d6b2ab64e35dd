"""Reading Kubernetes objects: the few questions that every rule asks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.manifests.finding import Object

CLUSTER_SCOPED = ("Namespace", "PriorityClass")
_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """The objects of these kinds."""
    return [one for one in objects if one.get("kind") in kinds]


def title(one: Object) -> str:
    """``Kind/name``."""
    return f"{one.get('kind')}/{(one.get('metadata') or {}).get('name')}"


def dig(value: Any, *path: str | int, default: Any = None) -> Any:
    """What lies under a path of keys and indices, or the default where the path ends early."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return default
    return default if value is None else value


def quantity(text: Any) -> float:
    """Number of a Kubernetes quantity: ``500m`` is 0.5, ``1Gi`` is 2**30."""
    text = str(text)
    for length in (2, 1):
        if text[-length:] in _SUFFIXES:
            return float(text[:-length]) * _SUFFIXES[text[-length:]]
    return float(text)


@dataclass(frozen=True, slots=True)
class Pods:
    """Pods of one template: a group of a Ray cluster, or a workload beside it."""

    where: str
    template: Object
    labels: Mapping[str, str]
    """Those of the template, and those that the operator adds."""
    group: Object | None = None
    """The Ray group they are of."""
    is_head: bool = False

    @property
    def spec(self) -> Object:
        """The pod's."""
        return dict(dig(self.template, "spec", default={}))

    @property
    def containers(self) -> list[Object]:
        """Those that run, not those that only prepare."""
        return list(dig(self.template, "spec", "containers", default=[]))

    @property
    def all_containers(self) -> list[Object]:
        """Those that prepare, then those that run."""
        return [*dig(self.template, "spec", "initContainers", default=[]), *self.containers]

    @property
    def ray(self) -> Object:
        """The first container, in which the operator starts Ray."""
        return dict(dig(self.containers, 0, default={}))

    @property
    def num_hosts(self) -> int:
        """Pods of one replica of the group."""
        return int(dig(self.group, "numOfHosts", default=1))

    @property
    def min_pods(self) -> int:
        """Pods there are at least."""
        return 1 if self.is_head or self.group is None else self.num_hosts * int(self.group.get("minReplicas", 0))

    @property
    def max_pods(self) -> int:
        """Pods there are at most."""
        return 1 if self.is_head or self.group is None else self.num_hosts * int(self.group.get("maxReplicas", 2**31))

    def limit(self, resource: str) -> float:
        """What the Ray container may use."""
        return quantity(dig(self.ray, "resources", "limits", resource, default=0))


def ray_services(objects: Sequence[Object]) -> list[Object]:
    """The RayServices."""
    return of_kind(objects, "RayService")


def ray_pods(objects: Sequence[Object]) -> list[Pods]:
    """The head and the worker groups of every RayService, in this order."""
    return [pods for service in ray_services(objects) for pods in _groups(service)]


def all_pods(objects: Sequence[Object]) -> list[Pods]:
    """Ray's pods and those of Deployments, StatefulSets, DaemonSets and Jobs."""
    others = of_kind(objects, "Deployment", "StatefulSet", "DaemonSet", "Job")
    return ray_pods(objects) + [
        Pods(title(one), template, dict(dig(template, "metadata", "labels", default={})))
        for one in others
        for template in [dig(one, "spec", "template", default={})]
    ]


def all_containers(objects: Sequence[Object]) -> list[tuple[str, Object]]:
    """The containers of all pods, and the one that the operator adds beside a head that scales its own cluster."""
    of_pods = [
        (f"{pods.where} {container.get('name')}", container)
        for pods in all_pods(objects)
        for container in pods.all_containers
    ]
    return of_pods + [
        (f"{title(one)} autoscaler", dict(dig(cluster_of(one), "autoscalerOptions", default={})))
        for one in ray_services(objects)
        if cluster_of(one).get("enableInTreeAutoscaling")
    ]


def cluster_of(service: Object) -> Object:
    """The Ray cluster of a RayService."""
    return dict(dig(service, "spec", "rayClusterConfig", default={}))


def environment(container: Object) -> dict[str, Object]:
    """The variables of a container by name."""
    return {one["name"]: one for one in container.get("env") or []}


def _groups(service: Object) -> Iterator[Pods]:
    cluster = cluster_of(service)
    head = cluster.get("headGroupSpec") or {}
    yield _pods(f"{title(service)} head", head, "headgroup", is_head=True)
    for group in cluster.get("workerGroupSpecs") or []:
        name = str(group.get("groupName"))
        yield _pods(f"{title(service)} group {name}", group, name, is_head=False)


def _pods(where: str, group: Object, name: str, *, is_head: bool) -> Pods:
    template = group.get("template") or {}
    added = {
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head" if is_head else "worker",
        "ray.io/group": name,
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return Pods(where, template, {**dig(template, "metadata", "labels", default={}), **added}, group, is_head)
