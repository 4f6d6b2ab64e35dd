"""A deliberately broken variant for every rule: it is caught by that rule, and by no other. No CRD schemas are used."""

import copy

import pytest

from cluster.manifests.finding import apply, name_of
from cluster.manifests.rules.all_rules import RULES
from tests.cluster.manifest_objects import (
    change_args,
    change_config,
    cluster,
    group,
    named,
    only,
    overlay,
    pod,
    ray,
    remove,
    spec,
)

KIND, NODE, PRODUCTION, HOSTS = "kind", "single-node", "production", "production-multi-host"
VARIANTS = []


def variant(overlay_name):
    """A function that breaks an overlay in the way that the rule of its name is for."""

    def add(break_it):
        VARIANTS.append((break_it.__name__.replace("_", "-"), overlay_name, break_it))
        return break_it

    return add


def caught(objects):
    return {result.check for result in apply(RULES, objects, "broken") if result.findings}


def autoscaler_off(objects):
    cluster(objects)["enableInTreeAutoscaling"] = False
    pod(objects, "head")["automountServiceAccountToken"] = False


# The RayService.
@variant(KIND)
def api_version_is_v1(objects):
    only(objects, "RayService")["apiVersion"] = "ray.io/v1alpha1"


@variant(KIND)
def service_name_fits(objects):
    only(objects, "RayService")["metadata"]["name"] = "p" * 48


@variant(KIND)
def upgrade_type_is_known(objects):
    spec(objects)["upgradeStrategy"]["type"] = "NewClutser"


@variant(PRODUCTION)
def incremental_upgrade_is_complete(objects):
    spec(objects)["upgradeStrategy"]["clusterUpgradeOptions"]["stepSizePercent"] = 50


@variant(KIND)
def incremental_upgrade_can_scale(objects):
    options = {"gatewayClassName": "istio", "maxSurgePercent": 100, "stepSizePercent": 50, "intervalSeconds": 10}
    spec(objects)["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": options,
    }
    autoscaler_off(objects)


@variant(KIND)
def initializing_timeout_is_a_duration(objects):
    only(objects, "RayService")["metadata"]["annotations"]["ray.io/initializing-timeout"] = "45 minutes"


@variant(PRODUCTION)
def old_cluster_outlives_its_jobs(objects):
    del spec(objects)["rayClusterDeletionDelaySeconds"]


@variant(KIND)
def serve_config_is_a_file_of_ours(objects):
    spec(objects)["serveConfigV2"] += "# patched\n"


# The cluster.
@variant(KIND)
def ray_version_is_ours(objects):
    cluster(objects)["rayVersion"] = "2.9.0"


@variant(KIND)
def cluster_has_no_upgrade_strategy(objects):
    cluster(objects)["upgradeStrategy"] = {"type": "Recreate"}


@variant(KIND)
def head_service_is_unnamed(objects):
    group(objects, "head")["headService"] = {"metadata": {"name": "pusa-head"}}


@variant(KIND)
def nothing_is_suspended(objects):
    group(objects, "vae")["suspend"] = True


@variant(KIND)
def manager_is_known(objects):
    spec(objects)["managedBy"] = "kueue"


@variant(KIND)
def only_default_gates_are_used(objects):
    cluster(objects)["tlsOptions"] = {"enabled": True}


@variant(KIND)
def auth_is_by_token(objects):
    cluster(objects)["authOptions"]["mode"] = "disabled"


@variant(KIND)
def autoscaler_is_v2(objects):
    del cluster(objects)["autoscalerOptions"]["version"]


@variant(KIND)
def autoscaler_is_set_by_fields(objects):
    ray(objects, "head")["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"})


@variant(KIND)
def autoscaler_shares_the_logs(objects):
    for values in (ray(objects, "head")["volumeMounts"], pod(objects, "head")["volumes"]):
        named(values, "ray-logs")["name"] = "logs"


@variant(PRODUCTION)
def redis_is_set_by_options(objects):
    ray(objects, "head")["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"})


@variant(PRODUCTION)
def redis_password_is_a_secret(objects):
    cluster(objects)["gcsFaultToleranceOptions"]["redisPassword"] = {"value": "open"}


# Groups.
@variant(KIND)
def start_params_are_strings(objects):
    group(objects, "head")["rayStartParams"]["num-cpus"] = 0


@variant(KIND)
def group_names_are_unique(objects):
    group(objects, "vae")["groupName"] = "text-encoder"


@variant(KIND)
def group_bounds_are_ordered(objects):
    group(objects, "denoiser")["minReplicas"] = 3


@variant(HOSTS)
def multi_host_groups_are_static(objects):
    group(objects, "denoiser-h200")["minReplicas"] = 0


@variant(KIND)
def restart_policy_is_never(objects):
    pod(objects, "vae")["restartPolicy"] = "Always"


@variant(KIND)
def idle_timeouts_need_the_autoscaler(objects):
    group(objects, "denoiser")["idleTimeoutSeconds"] = 60
    autoscaler_off(objects)


@variant(KIND)
def sizes_are_said_once(objects):
    group(objects, "vae")["rayStartParams"]["num-cpus"] = "1"
    group(objects, "vae")["resources"] = {"CPU": "1"}


@variant(KIND)
def ray_labels_are_fields(objects):
    group(objects, "vae")["rayStartParams"]["labels"] = "role=vae"


@variant(PRODUCTION)
def head_runs_no_replicas(objects):
    group(objects, "head")["rayStartParams"] = {}


@variant(NODE)
def lone_head_serves(objects):
    spec(objects)["excludeHeadPodFromServeSvc"] = True


# Pods.
@variant(KIND)
def ray_container_is_first(objects):
    sidecar = copy.deepcopy(ray(objects, "vae")) | {"name": "log-shipper"}
    pod(objects, "vae")["containers"].insert(0, sidecar)


@variant(KIND)
def names_are_used_once(objects):
    ray(objects, "vae")["env"].append({"name": "AWS_CONFIG_FILE", "value": "/etc/pusa/bucket/config"})


@variant(KIND)
def images_are_pinned(objects):
    ray(objects, "vae")["image"] = "pusa-serve-cpu:latest"


@variant(KIND)
def resources_are_declared(objects):
    del cluster(objects)["autoscalerOptions"]["resources"]


@variant(KIND)
def ray_memory_is_its_own(objects):
    ray(objects, "vae")["resources"]["requests"]["memory"] = "1Gi"


@variant(PRODUCTION)
def gpus_are_whole(objects):
    ray(objects, "denoiser-h200")["resources"]["requests"]["nvidia.com/gpu"] = "4"


@variant(KIND)
def shared_memory_is_sized(objects):
    del named(pod(objects, "denoiser")["volumes"], "shm")["emptyDir"]["sizeLimit"]


@variant(PRODUCTION)
def disk_is_asked_for(objects):
    named(pod(objects, "text-encoder")["volumes"], "weights")["emptyDir"]["sizeLimit"] = "400Gi"


@variant(KIND)
def probes_are_the_operators(objects):
    ray(objects, "gateway")["readinessProbe"] = {"httpGet": {"path": "/health", "port": "serve"}}


@variant(KIND)
def other_workloads_have_readiness(objects):
    database = only(objects, "StatefulSet", "postgres")["spec"]["template"]["spec"]
    del database["containers"][0]["readinessProbe"]


@variant(KIND)
def ray_environment_is_set(objects):
    named(ray(objects, "denoiser")["env"], "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS")["value"] = "0"


@variant(KIND)
def losses_are_found_soon(objects):
    environment = ray(objects, "head")["env"]
    environment.remove(named(environment, "RAY_health_check_failure_threshold"))


@variant(KIND)
def gangs_hand_over(objects):
    del ray(objects, "denoiser")["lifecycle"]


@variant(KIND)
def grace_covers_the_hand_over(objects):
    pod(objects, "denoiser")["terminationGracePeriodSeconds"] = 30


@variant(PRODUCTION)
def gpu_pods_stay(objects):
    del group(objects, "denoiser-h100")["template"]["metadata"]["annotations"]


@variant(PRODUCTION)
def gpu_pods_tolerate(objects):
    del pod(objects, "vae")["tolerations"]


# Security.
@variant(KIND)
def namespace_is_restricted(objects):
    only(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "privileged"


@variant(KIND)
def namespaces_agree(objects):
    only(objects, "Service", "postgres")["metadata"]["namespace"] = "default"


@variant(KIND)
def pods_are_unprivileged(objects):
    ray(objects, "vae")["securityContext"]["allowPrivilegeEscalation"] = True


@variant(KIND)
def pods_leave_the_host_alone(objects):
    volume = named(pod(objects, "vae")["volumes"], "ray-logs")
    volume["hostPath"] = {"path": "/tmp/ray"}
    del volume["emptyDir"]


@variant(KIND)
def workers_have_no_token(objects):
    del pod(objects, "vae")["automountServiceAccountToken"]


@variant(KIND)
def secrets_are_files(objects):
    ray(objects, "gateway")["env"].append({"name": "PGPASSWORD", "value": "development"})


# Network and disruption.
@variant(KIND)
def everything_is_denied_first(objects):
    remove(objects, "NetworkPolicy", "deny-all")


@variant(KIND)
def names_resolve(objects):
    remove(objects, "NetworkPolicy", "names")


@variant(KIND)
def ray_talks_to_ray(objects):
    rules = only(objects, "NetworkPolicy", "ray")["spec"]
    rules["ingress"][0]["ports"] = [{"protocol": "TCP", "port": 6379}]


@variant(KIND)
def clients_reach_serve(objects):
    remove(objects, "NetworkPolicy", "clients")


@variant(KIND)
def dashboard_is_closed(objects):
    rule = only(objects, "NetworkPolicy", "clients")["spec"]["ingress"][0]
    rule["ports"].append({"protocol": "TCP", "port": 8265})


@variant(KIND)
def operator_reaches_the_head(objects):
    remove(objects, "NetworkPolicy", "operator")


@variant(PRODUCTION)
def budgets_are_whole_numbers(objects):
    only(objects, "PodDisruptionBudget")["spec"]["minAvailable"] = "50%"


@variant(PRODUCTION)
def budgets_leave_room(objects):
    only(objects, "PodDisruptionBudget")["spec"]["minAvailable"] = 3


# References.
@variant(KIND)
def config_maps_exist(objects):
    named(pod(objects, "gateway")["volumes"], "serve-configs")["configMap"]["name"] = "serve-config"


@variant(KIND)
def secrets_exist(objects):
    named(pod(objects, "vae")["volumes"], "bucket")["secret"]["secretName"] = "pusa-buckets"


@variant(KIND)
def volumes_exist(objects):
    named(ray(objects, "gateway")["volumeMounts"], "serve-configs")["name"] = "serve-config"


@variant(KIND)
def mounted_files_are_there(objects):
    named(ray(objects, "gateway")["env"], "PGSERVICEFILE")["value"] = "/etc/pusa/database/pg_services.conf"


@variant(KIND)
def accounts_exist(objects):
    pod(objects, "vae")["serviceAccountName"] = "pusa-workers"


@variant(KIND)
def priority_classes_exist(objects):
    pod(objects, "vae")["priorityClassName"] = "interactive"


@variant(PRODUCTION)
def selectors_match(objects):
    only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]["ray.io/group"] = "gateways"


@variant(KIND)
def named_ports_exist(objects):
    only(objects, "Service", "bucket")["spec"]["ports"][0]["targetPort"] = "http"


# The Serve config.
@variant(KIND)
def serve_config_has_rays_form(objects):
    change_config(objects, lambda config: config.update(logging_config={"encoding": "XML"}))


@variant(KIND)
def serve_keys_are_known(objects):
    change_config(objects, lambda config: config["http_options"].update(keep_alive_timeout=5))


@variant(KIND)
def serve_scaling_is_ordered(objects):
    scaling = {"min_replicas": 2, "max_replicas": 1}
    override = [{"name": "Denoiser", "autoscaling_config": scaling}]
    change_config(objects, lambda config: config["applications"][0].update(deployments=override))


@variant(KIND)
def serve_args_are_accepted(objects):
    change_args(objects, lambda args: args["denoiser"].update(ulysses_degre=2))


@variant(KIND)
def serve_routes_are_paths(objects):
    change_config(objects, lambda config: config["applications"][0].update(route_prefix="v1"))


@variant(KIND)
def serve_overrides_name_deployments(objects):
    override = [{"name": "Denoisers", "max_ongoing_requests": 3}]
    change_config(objects, lambda config: config["applications"][0].update(deployments=override))


# The application on the cluster.
@variant(KIND)
def labels_select_a_group(objects):
    change_args(objects, lambda args: args["denoiser"].update(label_selector={"role": "dit"}))


@variant(KIND)
def bundles_fit_a_pod(objects):
    change_args(objects, lambda args: args["denoiser"].update(ulysses_degree=3))


@variant(KIND)
def groups_hold_every_replica(objects):
    change_args(objects, lambda args: args["denoiser"].update(max_replicas=3))


@variant(KIND)
def groups_are_used(objects):
    spare = copy.deepcopy(group(objects, "vae")) | {"groupName": "spare", "labels": {"role": "spare"}}
    cluster(objects)["workerGroupSpecs"].append(spare)


@variant(KIND)
def stores_are_shared(objects):
    change_args(objects, lambda args: args.pop("database_url"))


@variant(KIND)
def http_is_reachable(objects):
    change_config(objects, lambda config: config["http_options"].update(host="127.0.0.1"))


@variant(KIND)
def keys_are_asked_for(objects):
    change_args(objects, lambda args: args.pop("require_keys"))


@variant(KIND)
def proxies_are_on_workers(objects):
    change_config(objects, lambda config: config.update(proxy_location="HeadOnly"))


@variant(PRODUCTION)
def quota_covers_an_upgrade(objects):
    only(objects, "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"] = "76"


# Weights.
@variant(PRODUCTION)
def weights_are_checked(objects):
    pod(objects, "vae")["initContainers"][0]["command"] = ["sh", "-c", "cp -r /mnt/weights /models"]


@variant(PRODUCTION)
def weights_are_listed(objects):
    data = only(objects, "ConfigMap", "weights")["data"]
    data["SHA256SUMS"] = "".join(line for line in data["SHA256SUMS"].splitlines(True) if "VAE" not in line)


def test_a_quota_without_room_for_gangs_of_a_fixed_number_twice_is_caught():
    objects = overlay(HOSTS)
    only(objects, "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"] = "77"
    assert caught(objects) == {"quota-covers-an-upgrade"}


@pytest.mark.parametrize(("rule", "name", "break_it"), VARIANTS, ids=[one[0] for one in VARIANTS])
def test_a_broken_variant_is_caught_by_the_rule_of_its_name_alone(rule, name, break_it):
    objects = overlay(name)
    break_it(objects)
    assert caught(objects) == {rule}


def test_every_rule_has_its_broken_variant():
    assert [name_of(rule) for rule in RULES] == [rule for rule, _, _ in VARIANTS]
