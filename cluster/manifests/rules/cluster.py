"""What the operator checks of a Ray cluster."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import cluster_of, dig, environment, ray_pods, ray_services, title

_ALPHA = ("tlsOptions", "networkPolicy", "historyServerOptions")
_REDIS_VARIABLES = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")


def ray_version_is_ours(objects: Sequence[Object]) -> list[Finding]:
    """The operator decides by it what Ray can do; the images have the version that is pinned here."""
    ours = version("ray")
    return [
        Finding(where, f"rayVersion is {cluster.get('rayVersion')}; the project is pinned to {ours}")
        for where, cluster in _clusters(objects)
        if cluster.get("rayVersion") != ours
    ]


def cluster_has_no_upgrade_strategy(objects: Sequence[Object]) -> list[Finding]:
    """``rayClusterConfig.upgradeStrategy`` is another thing than the RayService's, and is refused below one."""
    return [
        Finding(where, "rayClusterConfig.upgradeStrategy must not be set below a RayService; use spec.upgradeStrategy")
        for where, cluster in _clusters(objects)
        if "upgradeStrategy" in cluster
    ]


def head_service_is_unnamed(objects: Sequence[Object]) -> list[Finding]:
    """Two clusters are up during an upgrade; the operator names each one's head service itself."""
    return [
        Finding(where, "headGroupSpec.headService.metadata.name must not be set below a RayService")
        for where, cluster in _clusters(objects)
        if dig(cluster, "headGroupSpec", "headService", "metadata", "name")
    ]


def nothing_is_suspended(objects: Sequence[Object]) -> list[Finding]:
    """``suspend`` of a cluster belongs to the RayService, and of a group to nobody: the autoscaler owns it."""
    found = [
        Finding(where, "rayClusterConfig.suspend is the RayService's to set; use spec.suspend")
        for where, cluster in _clusters(objects)
        if cluster.get("suspend")
    ]
    return found + [
        Finding(pods.where, "suspend of a worker group is refused; set its replicas to 0")
        for pods in ray_pods(objects)
        if dig(pods.group, "suspend")
    ]


def manager_is_known(objects: Sequence[Object]) -> list[Finding]:
    """``managedBy`` is one of two names."""
    given = [(title(one), dig(one, "spec", "managedBy")) for one in ray_services(objects)]
    given += [(where, cluster.get("managedBy")) for where, cluster in _clusters(objects)]
    return [
        Finding(where, f"managedBy is {name!r}; leave it out, or use one of {', '.join(_MANAGERS)}")
        for where, name in given
        if name is not None and name not in _MANAGERS
    ]


def only_default_gates_are_used(objects: Sequence[Object]) -> list[Finding]:
    """The operator refuses fields whose gate is off, and alpha gates are off."""
    found = [
        Finding(where, f"{field} needs an alpha feature gate, which is off by default")
        for where, cluster in _clusters(objects)
        for field in _ALPHA
        if field in cluster
    ]
    return found + [
        Finding(where, "GCS fault tolerance on a backend other than redis needs an alpha feature gate")
        for where, cluster in _clusters(objects)
        if dig(cluster, "gcsFaultToleranceOptions", "backend", default="redis") != "redis"
    ]


def auth_is_by_token(objects: Sequence[Object]) -> list[Finding]:
    """Whoever reaches the dashboard or the client port of a cluster without a token runs code on it."""
    found = [
        Finding(where, "authOptions.mode must be token; no mode lets everybody in who reaches a port")
        for where, cluster in _clusters(objects)
        if dig(cluster, "authOptions", "mode") != "token"
    ]
    return found + [
        Finding(where, "authOptions.enableK8sTokenAuth is not supported for a RayService")
        for where, cluster in _clusters(objects)
        if dig(cluster, "authOptions", "enableK8sTokenAuth")
    ]


def autoscaler_is_v2(objects: Sequence[Object]) -> list[Finding]:
    """Ray uses v2 anyway, but the operator only knows it when it is said."""
    return [
        Finding(where, "enableInTreeAutoscaling needs autoscalerOptions.version: v2")
        for where, cluster in _clusters(objects)
        if cluster.get("enableInTreeAutoscaling") and dig(cluster, "autoscalerOptions", "version") != "v2"
    ]


def autoscaler_is_set_by_fields(objects: Sequence[Object]) -> list[Finding]:
    """The variable that turns v2 on contradicts the field."""
    return [
        Finding(pods.where, "set autoscalerOptions.version, not RAY_enable_autoscaler_v2")
        for pods in ray_pods(objects)
        if "RAY_enable_autoscaler_v2" in environment(pods.ray)
    ]


def autoscaler_shares_the_logs(objects: Sequence[Object]) -> list[Finding]:
    """The autoscaler beside the head works in /tmp/ray; the operator shares a volume with it by this name only."""
    return [
        Finding(pods.where, f"/tmp/ray must be the volume ray-logs, not {mount['name']}")
        for one in ray_services(objects)
        if cluster_of(one).get("enableInTreeAutoscaling")
        for pods in ray_pods([one])[:1]
        for mount in pods.ray.get("volumeMounts") or []
        if mount.get("mountPath") == "/tmp/ray" and mount["name"] != "ray-logs"
    ]


def redis_is_set_by_options(objects: Sequence[Object]) -> list[Finding]:
    """The operator makes the variables and start parameters of Redis itself and refuses them from others."""
    found = [
        Finding(pods.where, f"{name} is refused; use gcsFaultToleranceOptions")
        for pods in ray_pods(objects)
        for name in _REDIS_VARIABLES
        if name in environment(pods.ray)
    ]
    found += [
        Finding(pods.where, f"rayStartParams.{name} is refused; use gcsFaultToleranceOptions")
        for pods in ray_pods(objects)
        for name in ("redis-password", "redis-username")
        if dig(pods.group, "rayStartParams", name)
    ]
    return found + [
        Finding(title(one), f"annotation {name} is refused beside gcsFaultToleranceOptions")
        for one in ray_services(objects)
        for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
        if dig(one, "metadata", "annotations", name) and "gcsFaultToleranceOptions" in cluster_of(one)
    ]


def redis_password_is_a_secret(objects: Sequence[Object]) -> list[Finding]:
    """It is by reference, never by value."""
    return [
        Finding(where, "gcsFaultToleranceOptions.redisPassword must come valueFrom.secretKeyRef")
        for where, cluster in _clusters(objects)
        for options in [cluster.get("gcsFaultToleranceOptions")]
        if options is not None and not dig(options, "redisPassword", "valueFrom", "secretKeyRef", "name")
    ]


def _clusters(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    return ((title(one), cluster_of(one)) for one in ray_services(objects))


RULES = (
    ray_version_is_ours,
    cluster_has_no_upgrade_strategy,
    head_service_is_unnamed,
    nothing_is_suspended,
    manager_is_known,
    only_default_gates_are_used,
    auth_is_by_token,
    autoscaler_is_v2,
    autoscaler_is_set_by_fields,
    autoscaler_shares_the_logs,
    redis_is_set_by_options,
    redis_password_is_a_secret,
)
