"""What a pod of ours must have to run, to stop and to be moved."""

import re
from collections.abc import Sequence

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import (
    Pods,
    all_containers,
    all_pods,
    cluster_of,
    dig,
    environment,
    quantity,
    ray_pods,
    ray_services,
)

GPU = "nvidia.com/gpu"
_TAG = re.compile(r".+:[\w.-]*\d[\w.-]*|.+@sha256:[0-9a-f]{64}")
_VARIABLES = ("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS")
_FOUND_SOON = {
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
}
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_STAYS = ("cluster-autoscaler.kubernetes.io/safe-to-evict", "karpenter.sh/do-not-disrupt")
_AFTER_NOTICE_S = 30.0
_SMALL_DISK = 20 * 2**30


def ray_container_is_first(objects: Sequence[Object]) -> list[Finding]:
    """The operator starts Ray in the first container, whatever it is called; sidecars come after it."""
    return [
        Finding(pods.where, f"the first container is {pods.ray.get('name')}; it must be Ray's: ray-head or ray-worker")
        for pods in ray_pods(objects)
        if pods.ray.get("name") != ("ray-head" if pods.is_head else "ray-worker")
    ]


def names_are_used_once(objects: Sequence[Object]) -> list[Finding]:
    """Patches that were added instead of merged: the API server takes the last of two variables, silently."""
    found = []
    for pods in all_pods(objects):
        lists = [(pods.where, "volumes", "name"), (pods.where, "containers", "name")]
        values = [(where, dig(pods.spec, key, default=[]), field) for where, key, field in lists]
        for container in pods.all_containers:
            where = f"{pods.where} {container.get('name')}"
            keys = (("env", "name"), ("volumeMounts", "mountPath"), ("ports", "containerPort"))
            values += [(where, container.get(key) or [], field) for key, field in keys]
        for where, each, field in values:
            names = [one.get(field) for one in each]
            found += [
                Finding(where, f"{field} {name} is there twice")
                for name in dict.fromkeys(names)
                if names.count(name) > 1
            ]
    return found


def images_are_pinned(objects: Sequence[Object]) -> list[Finding]:
    """A tag with a version in it, or a digest."""
    return [
        Finding(f"{pods.where} {container.get('name')}", f"image {image} has no version")
        for pods in all_pods(objects)
        for container in pods.all_containers
        for image in [str(container.get("image"))]
        if not _TAG.fullmatch(image)
    ]


def resources_are_declared(objects: Sequence[Object]) -> list[Finding]:
    """Kubernetes places a pod by what it asks for, and Ray sizes a node by it."""
    return [
        Finding(where, f"resources.{kind}.{name} is missing")
        for where, container in all_containers(objects)
        for kind in ("requests", "limits")
        for name in ("cpu", "memory")
        if dig(container, "resources", kind, name) is None
    ]


def ray_memory_is_its_own(objects: Sequence[Object]) -> list[Finding]:
    """A Ray container that asks for less memory than its limit is killed when others want theirs."""
    found = []
    for pods in ray_pods(objects):
        asked, limit = (dig(pods.ray, "resources", kind, "memory", default=0) for kind in ("requests", "limits"))
        if asked and limit and quantity(asked) != quantity(limit):
            found.append(Finding(pods.where, f"memory: requests {asked} and limits {limit} must be equal"))
    return found


def gpus_are_whole(objects: Sequence[Object]) -> list[Finding]:
    """Kubernetes gives whole GPUs, as many as asked for."""
    found = []
    for pods in ray_pods(objects):
        asked, limit = (dig(pods.ray, "resources", kind, GPU, default=0) for kind in ("requests", "limits"))
        if quantity(asked) != quantity(limit) or quantity(limit) % 1:
            found.append(Finding(pods.where, f"{GPU}: requests {asked} and limits {limit} must be equal and whole"))
    return found


def shared_memory_is_sized(objects: Sequence[Object]) -> list[Finding]:
    """The object store and NCCL live in /dev/shm, which counts against the memory limit."""
    found = []
    for pods in ray_pods(objects):
        names = {one["name"] for one in pods.ray.get("volumeMounts") or [] if one.get("mountPath") == "/dev/shm"}
        sizes = [
            quantity(dig(volume, "emptyDir", "sizeLimit", default=0))
            for volume in pods.spec.get("volumes") or []
            if volume.get("name") in names and dig(volume, "emptyDir", "medium") == "Memory"
        ]
        if not sizes or not sizes[0]:
            found.append(Finding(pods.where, "/dev/shm must be an emptyDir in memory with a sizeLimit"))
        elif sizes[0] > 0.5 * pods.limit("memory"):
            found.append(Finding(pods.where, "/dev/shm may take more than half of the memory limit"))
    return found


def disk_is_asked_for(objects: Sequence[Object]) -> list[Finding]:
    """A pod that fills a machine's disk with weights is evicted, unless the machine was chosen for its disk."""
    found = []
    for pods in ray_pods(objects):
        folders = [dig(one, "emptyDir", default={}) for one in pods.spec.get("volumes") or []]
        most = sum(quantity(one.get("sizeLimit", 0)) for one in folders if one.get("medium") != "Memory")
        asked = quantity(dig(pods.ray, "resources", "requests", "ephemeral-storage", default=0))
        if most > _SMALL_DISK and asked < most:
            found.append(Finding(pods.where, f"requests.ephemeral-storage must cover its folders: {most / 2**30:g}Gi"))
    return found


def probes_are_the_operators(objects: Sequence[Object]) -> list[Finding]:
    """The operator asks the raylet and /-/healthz; a probe of ours replaces that, and /health wants a key."""
    return [
        Finding(pods.where, f"{probe} replaces the operator's; leave it out")
        for pods in ray_pods(objects)
        for probe in _PROBES
        if probe in pods.ray
    ]


def other_workloads_have_readiness(objects: Sequence[Object]) -> list[Finding]:
    """What the operator does not probe says itself when it is ready."""
    return [
        Finding(f"{pods.where} {container.get('name')}", "readinessProbe is missing")
        for pods in all_pods(objects)
        if pods.group is None and not pods.where.startswith("Job/")
        for container in pods.containers
        if "readinessProbe" not in container
    ]


def ray_environment_is_set(objects: Sequence[Object]) -> list[Finding]:
    """What ``python -m serve`` sets itself has to be set on every node."""
    return [
        Finding(pods.where, f"{name} must be 1")
        for pods in ray_pods(objects)
        for name in _VARIABLES
        if dig(environment(pods.ray), name, "value") != "1"
    ]


def losses_are_found_soon(objects: Sequence[Object]) -> list[Finding]:
    """The head gives up a node that is cut off after half a minute, and an HTTP proxy that has died after seconds."""
    return [
        Finding(pods.where, f"{name} must be {value}")
        for pods in ray_pods(objects)
        if pods.is_head
        for name, value in _FOUND_SOON.items()
        if dig(environment(pods.ray), name, "value") != value
    ]


def gangs_hand_over(objects: Sequence[Object]) -> list[Finding]:
    """A pod that may hold ranks has ``python -m serve leave`` as its preStop hook."""
    return [
        Finding(pods.where, "lifecycle.preStop must run python -m serve leave")
        for pods in _with_replicas(objects)
        if dig(pods.ray, "lifecycle", "preStop", "exec", "command", default=[])[:4]
        != ["python", "-m", "serve", "leave"]
    ]


def grace_covers_the_hand_over(objects: Sequence[Object]) -> list[Finding]:
    """The hook and Ray's own stop both happen within the grace period."""
    found = []
    for pods in _with_replicas(objects):
        command = dig(pods.ray, "lifecycle", "preStop", "exec", "command", default=[])
        notice = float(command[command.index("--notice") + 1]) if "--notice" in command else 25.0
        grace = float(pods.spec.get("terminationGracePeriodSeconds", 30))
        if grace < notice + _AFTER_NOTICE_S:
            least = notice + _AFTER_NOTICE_S
            found.append(Finding(pods.where, f"terminationGracePeriodSeconds={grace:g} is below {least:g}"))
    return found


def gpu_pods_stay(objects: Sequence[Object]) -> list[Finding]:
    """Ray's pods have no owner that a node autoscaler knows; nobody should end a gang to save a machine."""
    return [
        Finding(pods.where, f"annotation {name} is missing on a pod with GPUs")
        for pods in ray_pods(objects)
        if pods.limit(GPU) and not pods.is_head
        for name in _STAYS
        if dig(pods.template, "metadata", "annotations", name) is None
    ]


def gpu_pods_tolerate(objects: Sequence[Object]) -> list[Finding]:
    """Machines with GPUs keep off whoever does not say so."""
    return [
        Finding(pods.where, f"a toleration of {GPU} is missing")
        for pods in ray_pods(objects)
        if pods.limit(GPU) and GPU not in [one.get("key") for one in pods.spec.get("tolerations") or []]
    ]


def _with_replicas(objects: Sequence[Object]) -> list[Pods]:
    """Worker groups, and a head that is the whole cluster."""
    return [
        pods
        for one in ray_services(objects)
        for pods in ray_pods([one])
        if not pods.is_head or not cluster_of(one).get("workerGroupSpecs")
    ]


RULES = (
    ray_container_is_first,
    names_are_used_once,
    images_are_pinned,
    resources_are_declared,
    ray_memory_is_its_own,
    gpus_are_whole,
    shared_memory_is_sized,
    disk_is_asked_for,
    probes_are_the_operators,
    other_workloads_have_readiness,
    ray_environment_is_set,
    losses_are_found_soon,
    gangs_hand_over,
    grace_covers_the_hand_over,
    gpu_pods_stay,
    gpu_pods_tolerate,
)
