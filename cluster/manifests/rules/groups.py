"""What the operator checks of the head and the worker groups."""

import re
from collections.abc import Sequence

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import Pods, cluster_of, dig, ray_pods, ray_services, title

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SIZES = ("num-cpus", "num-gpus", "memory", "resources")


def start_params_are_strings(objects: Sequence[Object]) -> list[Finding]:
    """``num-cpus: 0`` is refused, ``num-cpus: "0"`` is meant."""
    return [
        Finding(pods.where, f"rayStartParams.{name} must be a string, got {value!r}")
        for pods in ray_pods(objects)
        for name, value in dig(pods.group, "rayStartParams", default={}).items()
        if not isinstance(value, str)
    ]


def group_names_are_unique(objects: Sequence[Object]) -> list[Finding]:
    """A group is known by its name, which is a label of its pods."""
    found = []
    for one in ray_services(objects):
        names = [str(group.get("groupName")) for group in cluster_of(one).get("workerGroupSpecs") or []]
        found += [
            Finding(title(one), f"group name {name!r} must be used once, be a DNS-1123 label, and not be headgroup")
            for name in sorted(set(names))
            if names.count(name) > 1 or name == "headgroup" or not _NAME.fullmatch(name)
        ]
    return found


def group_bounds_are_ordered(objects: Sequence[Object]) -> list[Finding]:
    """``0 <= minReplicas <= replicas <= maxReplicas``, all of them said: by default there is no maximum."""
    found = []
    for pods in _workers(objects):
        bounds = [dig(pods.group, name) for name in ("minReplicas", "replicas", "maxReplicas")]
        if not all(isinstance(bound, int) for bound in bounds) or [0, *bounds] != sorted([0, *bounds]):
            given = ", ".join(str(bound) for bound in bounds)
            found.append(Finding(pods.where, f"0 <= minReplicas <= replicas <= maxReplicas must hold, got {given}"))
    return found


def multi_host_groups_are_static(objects: Sequence[Object]) -> list[Finding]:
    """Ray's autoscaler does not know that the hosts of a replica belong together."""
    return [
        Finding(pods.where, f"numOfHosts is {pods.num_hosts}: minReplicas and maxReplicas must be equal")
        for pods in _workers(objects)
        if pods.num_hosts > 1 and pods.min_pods != pods.max_pods
    ]


def restart_policy_is_never(objects: Sequence[Object]) -> list[Finding]:
    """Autoscaler v2 makes new pods; one that restarts in place is a node that it does not know."""
    return [
        Finding(pods.where, f"restartPolicy is {pods.spec['restartPolicy']}; leave it out, or Never")
        for pods in ray_pods(objects)
        if pods.spec.get("restartPolicy", "Never") != "Never"
    ]


def idle_timeouts_need_the_autoscaler(objects: Sequence[Object]) -> list[Finding]:
    """``idleTimeoutSeconds`` and ``priority`` of a group are refused without it."""
    return [
        Finding(title(one), f"{name} of group {group.get('groupName')} needs enableInTreeAutoscaling: true")
        for one in ray_services(objects)
        for group in cluster_of(one).get("workerGroupSpecs") or []
        for name in ("idleTimeoutSeconds", "priority")
        if name in group and not cluster_of(one).get("enableInTreeAutoscaling")
    ]


def sizes_are_said_once(objects: Sequence[Object]) -> list[Finding]:
    """A group's ``resources`` and the same in its start parameters exclude each other."""
    return [
        Finding(pods.where, "resources are set both in rayStartParams and in the group's resources; use one")
        for pods in ray_pods(objects)
        if dig(pods.group, "resources") and any(dig(pods.group, "rayStartParams", name) for name in _SIZES)
    ]


def ray_labels_are_fields(objects: Sequence[Object]) -> list[Finding]:
    """Labels of Ray nodes belong in the group's ``labels`` and follow Kubernetes' syntax."""
    found = [
        Finding(pods.where, "rayStartParams.labels is refused; use the group's labels")
        for pods in ray_pods(objects)
        if "labels" in dig(pods.group, "rayStartParams", default={})
    ]
    return found + [
        Finding(pods.where, f"label {key}: {value} is not of Kubernetes' syntax")
        for pods in ray_pods(objects)
        for key, value in dig(pods.group, "labels", default={}).items()
        if not _LABEL_KEY.fullmatch(str(key)) or not _LABEL.fullmatch(str(value))
    ]


def head_runs_no_replicas(objects: Sequence[Object]) -> list[Finding]:
    """Beside workers the head is the control plane: what runs out of memory on it takes the cluster with it."""
    found = []
    for one in ray_services(objects):
        if not cluster_of(one).get("workerGroupSpecs"):
            continue
        head = ray_pods([one])[0]
        if str(dig(head.group, "rayStartParams", "num-cpus")) != "0":
            found.append(Finding(head.where, 'rayStartParams.num-cpus must be "0" beside worker groups'))
        if head.limit("nvidia.com/gpu"):
            found.append(Finding(head.where, "the head has GPUs that only workers should have"))
        if not dig(one, "spec", "excludeHeadPodFromServeSvc"):
            found.append(Finding(head.where, "excludeHeadPodFromServeSvc must be true beside worker groups"))
    return found


def lone_head_serves(objects: Sequence[Object]) -> list[Finding]:
    """A head that is the whole cluster must take replicas and requests."""
    found = []
    for one in ray_services(objects):
        if cluster_of(one).get("workerGroupSpecs"):
            continue
        head = ray_pods([one])[0]
        if dig(head.group, "rayStartParams", "num-cpus") == "0":
            found.append(Finding(head.where, "num-cpus is 0, but there is no other node"))
        if dig(one, "spec", "excludeHeadPodFromServeSvc"):
            found.append(Finding(head.where, "excludeHeadPodFromServeSvc leaves the service without a pod"))
    return found


def _workers(objects: Sequence[Object]) -> list[Pods]:
    return [pods for pods in ray_pods(objects) if not pods.is_head]


RULES = (
    start_params_are_strings,
    group_names_are_unique,
    group_bounds_are_ordered,
    multi_host_groups_are_static,
    restart_policy_is_never,
    idle_timeouts_need_the_autoscaler,
    sizes_are_said_once,
    ray_labels_are_fields,
    head_runs_no_replicas,
    lone_head_serves,
)
