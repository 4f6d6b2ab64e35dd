"""What the operator checks of a RayService itself, and what its users find out later."""

import re
from collections.abc import Sequence

import yaml

from cluster.manifests.finding import Finding, Object
from cluster.manifests.objects import cluster_of, dig, of_kind, ray_services, title

UPGRADE_TYPES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
INCREMENTAL = "NewClusterWithIncrementalUpgrade"
TIMEOUT = "ray.io/initializing-timeout"
_MAX_NAME = 47
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(h|m|s|ms))+|[0-9]+")


def api_version_is_v1(objects: Sequence[Object]) -> list[Finding]:
    """``ray.io/v1alpha1`` is still served, and ends."""
    return [
        Finding(title(one), f"apiVersion is {one.get('apiVersion')}; use ray.io/v1")
        for one in ray_services(objects)
        if one.get("apiVersion") != "ray.io/v1"
    ]


def service_name_fits(objects: Sequence[Object]) -> list[Finding]:
    """The operator makes other names out of it, so it has to be short, and a DNS-1035 label."""
    names = [(title(one), str(dig(one, "metadata", "name", default=""))) for one in ray_services(objects)]
    return [
        Finding(where, f"the name must be a DNS-1035 label of at most {_MAX_NAME} characters, it has {len(name)}")
        for where, name in names
        if len(name) > _MAX_NAME or not _DNS_1035.fullmatch(name)
    ]


def upgrade_type_is_known(objects: Sequence[Object]) -> list[Finding]:
    """The CRD has no enum for it: the API server takes a misspelt one, and the operator then refuses it."""
    return [
        Finding(title(one), f"spec.upgradeStrategy.type is {given!r}; use one of {', '.join(UPGRADE_TYPES)}")
        for one in ray_services(objects)
        for given in [dig(one, "spec", "upgradeStrategy", "type")]
        if given not in UPGRADE_TYPES
    ]


def incremental_upgrade_is_complete(objects: Sequence[Object]) -> list[Finding]:
    """Its options come with its type, and steps must fit into the surge."""
    found = []
    for one in ray_services(objects):
        options = dig(one, "spec", "upgradeStrategy", "clusterUpgradeOptions")
        if (dig(one, "spec", "upgradeStrategy", "type") == INCREMENTAL) != (options is not None):
            found.append(Finding(title(one), f"clusterUpgradeOptions belong to {INCREMENTAL}, and it to them"))
        if not isinstance(options, dict):
            continue
        surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", 0)
        if not 0 < step <= surge <= 100:
            found.append(Finding(title(one), f"0 < stepSizePercent={step} <= maxSurgePercent={surge} <= 100 must hold"))
        if options.get("intervalSeconds", 0) <= 0:
            found.append(Finding(title(one), "intervalSeconds must be positive"))
        if not options.get("gatewayClassName"):
            found.append(Finding(title(one), "gatewayClassName says whose gateways there are; set it"))
    return found


def incremental_upgrade_can_scale(objects: Sequence[Object]) -> list[Finding]:
    """Capacity moves from cluster to cluster by Ray's autoscaler."""
    return [
        Finding(title(one), f"{INCREMENTAL} needs enableInTreeAutoscaling: true")
        for one in ray_services(objects)
        if dig(one, "spec", "upgradeStrategy", "type") == INCREMENTAL
        and not cluster_of(one).get("enableInTreeAutoscaling")
    ]


def initializing_timeout_is_a_duration(objects: Sequence[Object]) -> list[Finding]:
    """Without it a cluster that does not come up hangs for ever; misspelt, the operator refuses it."""
    given = [(title(one), dig(one, "metadata", "annotations", TIMEOUT)) for one in ray_services(objects)]
    return [
        Finding(where, f"annotation {TIMEOUT} is {text!r}; use a duration such as 45m")
        for where, text in given
        if not _DURATION.fullmatch(str(text))
    ]


def old_cluster_outlives_its_jobs(objects: Sequence[Object]) -> list[Finding]:
    """The old cluster of an upgrade is deleted by time, not when it is idle."""
    found = []
    for one in ray_services(objects):
        if dig(one, "spec", "upgradeStrategy", "type") == "None":
            continue
        delay = int(dig(one, "spec", "rayClusterDeletionDelaySeconds", default=60))
        longest = _job_deadline_s(one)
        if delay < longest:
            found.append(
                Finding(title(one), f"rayClusterDeletionDelaySeconds={delay} is below job_deadline_s={longest:g}")
            )
    return found


def serve_config_is_a_file_of_ours(objects: Sequence[Object]) -> list[Finding]:
    """One file for ``serve run``, the tests and the cluster: what the RayService has is what is in configs/serve."""
    files = [text for one in of_kind(objects, "ConfigMap") for text in (one.get("data") or {}).values()]
    return [
        Finding(title(one), "spec.serveConfigV2 is none of the files in the ConfigMap serve-configs")
        for one in ray_services(objects)
        if dig(one, "spec", "serveConfigV2") not in files
    ]


def _job_deadline_s(service: Object) -> float:
    try:
        config = yaml.safe_load(dig(service, "spec", "serveConfigV2", default=""))
    except yaml.YAMLError:
        return 0.0  # said by serve_config_has_rays_form
    return float(dig(config, "applications", 0, "args", "job_deadline_s", default=3600.0))


RULES = (
    api_version_is_v1,
    service_name_fits,
    upgrade_type_is_known,
    incremental_upgrade_is_complete,
    incremental_upgrade_can_scale,
    initializing_timeout_is_a_duration,
    old_cluster_outlives_its_jobs,
    serve_config_is_a_file_of_ours,
)
