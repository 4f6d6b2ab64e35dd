"""Every metric name that a rule or a panel may use: ours, and Ray's that were seen in a scrape of our service."""

import re

from serve.metrics import METRICS

RAY_METRICS = {
    "ray_serve_autoscaling_target_replicas": "ray.serve._private.deployment_state: replicas that there should be",
    "ray_serve_controller_control_loop_duration_s": "ray.serve._private.controller",
    "ray_serve_deployment_replica_healthy": "ray.serve._private.deployment_state: 1 for every healthy replica",
    "ray_serve_deployment_status": "ray.serve._private.common: 1 deploy failed, 2 unhealthy, 3..5 changing, 6 healthy",
    "ray_serve_num_http_requests_total": "ray.serve._private.request_ingress_metrics: by route, method, status_code",
    "ray_serve_replica_startup_latency_ms_count": "ray.serve._private.deployment_state: replicas started",
    "ray_object_store_available_memory": "raylet",
    "ray_object_store_used_memory": "raylet",
    "ray_spill_manager_request_total": "raylet: by Type",
    "ray_node_cpu_utilization": "ray.dashboard.modules.reporter: percent of the node",
    "ray_node_disk_free": "ray.dashboard.modules.reporter: bytes",
    "ray_node_disk_usage": "ray.dashboard.modules.reporter: bytes",
    "ray_node_gpus_utilization": "ray.dashboard.modules.reporter: percent of each GPU",
    "ray_node_gram_used": "ray.dashboard.modules.reporter: MiB of each GPU",
    "ray_node_mem_total": "ray.dashboard.modules.reporter: bytes",
    "ray_node_mem_used": "ray.dashboard.modules.reporter: bytes",
}
"""Ray 2.60's own, and what says so. Ray Serve exports nothing of a gang: its jobs do not pass through Serve."""

_NAME = re.compile(r"\b(?:ray_[a-z0-9_]+|pusa:[a-z0-9_:]+)")


def known_names() -> set[str]:
    """Names that a running service may export."""
    return {series for metric in METRICS for series in metric.series} | set(RAY_METRICS)


def used_names(expression: str) -> set[str]:
    """Names of metrics and recorded series in a PromQL expression."""
    return set(_NAME.findall(expression))
