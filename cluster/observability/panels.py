"""What the three dashboards show: every panel with its queries, and why it may be empty."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.observability.rules import ALLOWED_FAILURES, OBJECTIVE_S
from serve.metrics import (
    ACCEPTED,
    BACKLOG_COST,
    CHECKPOINT_FAILURES,
    CHECKPOINTS,
    DECODER_FAILURES,
    FAIRNESS_SPREAD,
    FREE_PLACES,
    GANGS,
    GANGS_LOST,
    JOB_SECONDS,
    JOBS,
    MODERATION,
    OLDEST_QUEUED,
    QUEUE_DEPTH,
    QUEUE_WAIT,
    REJECTS,
    RELEASED,
    REPEATED,
    REQUEUED,
    STAGE_SECONDS,
    STEP_SECONDS,
    WAITING_TENANTS,
    WEBHOOKS,
    Metric,
)

_NO_FAULT = "Empty until the first fault: a counter that has never counted is not exported."


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel."""

    title: str
    queries: Mapping[str, str]
    """PromQL by legend, in which ``{{label}}`` stands for a label's value."""
    unit: str
    """As Grafana names it."""
    meaning: str = ""
    why_empty: str = ""
    """Why it may have no data on a service that works; else it has some once a job has run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def _per_minute(metric: Metric, by: str = "", labels: str = "") -> str:
    return f"sum{_by(by)} (rate({metric.series[0]}{labels}[5m])) * 60"


def _recent(metric: Metric, by: str = "", labels: str = "") -> str:
    return f"sum{_by(by)} (increase({metric.series[0]}{labels}[15m]))"


def _quantile(share: float, metric: Metric, by: str, labels: str = "") -> str:
    return f"histogram_quantile({share:g}, sum by (le, {by}) (rate({metric.series[0]}{labels}[15m])))"


def _now(metric: Metric, by: str = "") -> str:
    """Every dispatcher of a rolling upgrade tells the same of the store."""
    return f"max{_by(by)} ({metric.series[0]})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


OVERVIEW = Dashboard(
    uid="pusa-overview",
    title="Pusa: overview",
    panels=(
        Panel(
            title="Jobs a minute",
            queries={"accepted": _per_minute(ACCEPTED), "{{outcome}}": _per_minute(JOBS, "outcome")},
            unit="short",
            meaning="failed: the service's fault. refused: what was asked for could not be done.",
        ),
        Panel(
            title="Share of failed jobs",
            queries={
                "last hour": "pusa:jobs_failed:ratio1h",
                "six hours": "pusa:jobs_failed:ratio6h",
                "allowed": f"vector({ALLOWED_FAILURES:g})",
            },
            unit="percentunit",
        ),
        Panel(
            title="Jobs ended by code",
            queries={"{{code}}": _recent(JOBS, "code", '{outcome=~"failed|refused"}')},
            unit="short",
            meaning="Within 15 minutes.",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="Seconds from creation to completion",
            queries={
                "{{priority}} p50": _quantile(0.5, JOB_SECONDS, "priority", '{outcome="completed"}'),
                "{{priority}} p95": _quantile(0.95, JOB_SECONDS, "priority", '{outcome="completed"}'),
                "objective": f"vector({OBJECTIVE_S:g})",
            },
            unit="s",
        ),
        Panel(
            title="Seconds by stage",
            queries={
                "{{stage}} p50": _quantile(0.5, STAGE_SECONDS, "stage"),
                "{{stage}} p95": _quantile(0.95, STAGE_SECONDS, "stage"),
            },
            unit="s",
            meaning="place is a job's wait for a gang, and part of denoise.",
        ),
        Panel(
            title="Seconds in the queue, p95",
            queries={"{{priority}}": _quantile(0.95, QUEUE_WAIT, "priority")},
            unit="s",
            meaning="Until a dispatcher took the job; see place for the wait after that.",
        ),
        Panel(title="Unfinished jobs", queries={"{{status}}": _now(QUEUE_DEPTH, "status")}, unit="short"),
        Panel(
            title="Age of the oldest queued job", queries={"{{priority}}": _now(OLDEST_QUEUED, "priority")}, unit="s"
        ),
        Panel(
            title="Time to work off the backlog",
            queries={"with the gangs there are": "pusa:drain_seconds", "gang-seconds": "pusa:backlog_cost_seconds"},
            unit="s",
        ),
        Panel(
            title="Refused requests by code",
            queries={"{{status}} {{code}}": _per_minute(REJECTS, "status, code")},
            unit="short",
            meaning="A minute.",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="Requests a minute",
            queries={
                "{{method}} {{route}} {{status_code}}": (
                    "sum by (method, route, status_code) (rate(ray_serve_num_http_requests_total[5m])) * 60"
                )
            },
            unit="short",
        ),
        Panel(
            title="Replicas",
            queries={
                "{{deployment}} healthy": "sum by (deployment) (ray_serve_deployment_replica_healthy)",
                "{{deployment}} wanted": "max by (deployment) (ray_serve_autoscaling_target_replicas)",
            },
            unit="short",
        ),
        Panel(
            title="Replicas started",
            queries={
                "{{deployment}}": "sum by (deployment) (increase(ray_serve_replica_startup_latency_ms_count[15m]))"
            },
            unit="short",
            meaning="Within 15 minutes: scaling up, or replacing what died.",
        ),
        Panel(
            title="Webhooks",
            queries={"{{result}}": _recent(WEBHOOKS, "result")},
            unit="short",
            meaning="Tries within 15 minutes.",
            why_empty="Empty until a job with a webhook has ended.",
        ),
        Panel(
            title="Moderation",
            queries={"{{subject}} {{result}}": _recent(MODERATION, "subject, result")},
            unit="short",
            meaning="Within 15 minutes.",
            why_empty="Empty unless the configuration names a moderation hook.",
        ),
        Panel(
            title="Decoder failures",
            queries={"{{role}}": _recent(DECODER_FAILURES, "role")},
            unit="short",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="Memory of the nodes",
            queries={"{{NodeAddress}}": "max by (NodeAddress) (ray_node_mem_used / ray_node_mem_total)"},
            unit="percentunit",
        ),
        Panel(
            title="Disks of the nodes",
            queries={
                "{{NodeAddress}}": (
                    "max by (NodeAddress) (ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free))"
                )
            },
            unit="percentunit",
        ),
        Panel(
            title="Object stores",
            queries={
                "{{NodeAddress}} used": "max by (NodeAddress) (ray_object_store_used_memory)",
                "{{NodeAddress}} free": "max by (NodeAddress) (ray_object_store_available_memory)",
            },
            unit="bytes",
        ),
        Panel(
            title="A round of Ray Serve's controller",
            queries={"seconds": "max(ray_serve_controller_control_loop_duration_s)"},
            unit="s",
        ),
    ),
)

GANGS_BOARD = Dashboard(
    uid="pusa-gangs",
    title="Pusa: gangs",
    panels=(
        Panel(
            title="Gangs by state",
            queries={"{{state}}": _now(GANGS, "state")},
            unit="short",
            meaning="open: takes jobs. full: holds another dispatcher's. leaving: hands over. silent: does not answer.",
        ),
        Panel(title="Free places", queries={"places": _now(FREE_PLACES)}, unit="short"),
        Panel(
            title="Share of time in steps",
            queries={"of the open gangs": "pusa:gangs:busy_ratio"},
            unit="percentunit",
            meaning="What is left is waiting for jobs, admitting them and writing checkpoints.",
        ),
        Panel(
            title="Seconds of a step",
            queries={
                "up to {{max_tokens}} tokens, p50": _quantile(0.5, STEP_SECONDS, "max_tokens"),
                "up to {{max_tokens}} tokens, p95": _quantile(0.95, STEP_SECONDS, "max_tokens"),
                "up to {{max_tokens}} tokens, mean": "pusa:step_seconds:mean15m",
            },
            unit="s",
        ),
        Panel(
            title="Steps a second",
            queries={"up to {{max_tokens}} tokens": f"sum by (max_tokens) (rate({STEP_SECONDS.series[2]}[5m]))"},
            unit="short",
        ),
        Panel(
            title="Seconds a job waits for a gang, p95",
            queries={"seconds": _quantile(0.95, STAGE_SECONDS, "stage", '{stage="place"}')},
            unit="s",
        ),
        Panel(
            title="Checkpoints a minute",
            queries={"published": _per_minute(CHECKPOINTS)},
            unit="short",
            why_empty="Empty while no job has had more than checkpoint_every steps, and none was handed over.",
        ),
        Panel(
            title="Checkpoints that could not be written",
            queries={"within 15 minutes": _recent(CHECKPOINT_FAILURES)},
            unit="short",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="Jobs that moved",
            queries={"let go by a gang": _recent(RELEASED)},
            unit="short",
            meaning="Within 15 minutes: for fairness, for priority, or because the gang was leaving.",
            why_empty="Empty until a job has had to make room or its gang has left.",
        ),
        Panel(
            title="Attempts given up",
            queries={"{{reason}}": _recent(REQUEUED, "reason")},
            unit="short",
            meaning="Within 15 minutes.",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="Gangs lost",
            queries={"within 15 minutes": _recent(GANGS_LOST)},
            unit="short",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="Steps made again",
            queries={"within 15 minutes": _recent(REPEATED)},
            unit="short",
            why_empty=_NO_FAULT,
        ),
        Panel(
            title="GPUs at work",
            queries={
                "{{NodeAddress}} {{GpuIndex}}": "avg by (NodeAddress, GpuIndex) (ray_node_gpus_utilization) / 100"
            },
            unit="percentunit",
            why_empty="Empty on nodes without a GPU.",
        ),
        Panel(
            title="GPU memory",
            queries={"{{NodeAddress}} {{GpuIndex}}": "max by (NodeAddress, GpuIndex) (ray_node_gram_used)"},
            unit="mbytes",
            why_empty="Empty on nodes without a GPU.",
        ),
        Panel(
            title="CPUs of the nodes",
            queries={"{{NodeAddress}}": "max by (NodeAddress) (ray_node_cpu_utilization) / 100"},
            unit="percentunit",
        ),
    ),
)

TENANTS = Dashboard(
    uid="pusa-tenants",
    title="Pusa: tenants",
    panels=(
        Panel(
            title="Gang-seconds a second, by class of weight",
            queries={"weight {{tenant_class}}": "pusa:tenant_class:cost_rate5m"},
            unit="short",
            meaning="What was delivered. A class is a tenant's weight, to the nearest power of two from 0.25 to 16.",
        ),
        Panel(
            title="The same for each tenant with unfinished jobs",
            queries={
                "weight {{tenant_class}}": (
                    "pusa:tenant_class:cost_rate5m"
                    f" / on (tenant_class) clamp_min({_now(WAITING_TENANTS, 'tenant_class')}, 1)"
                )
            },
            unit="short",
            meaning="Fair is: in proportion to the weight, among classes that all have jobs waiting.",
        ),
        Panel(
            title="Tenants with unfinished jobs",
            queries={"weight {{tenant_class}}": _now(WAITING_TENANTS, "tenant_class")},
            unit="short",
        ),
        Panel(
            title="Backlog",
            queries={
                "{{priority}}, weight {{tenant_class}}": (
                    f"max by (priority, tenant_class) (sum by (replica, priority, tenant_class)"
                    f" ({BACKLOG_COST.series[0]}))"
                )
            },
            unit="s",
            meaning="Predicted gang-seconds that unfinished jobs still need.",
        ),
        Panel(
            title="Seconds in the queue, p95",
            queries={"weight {{tenant_class}}": _quantile(0.95, QUEUE_WAIT, "tenant_class")},
            unit="s",
        ),
        Panel(
            title="Between the most and the least favoured tenant",
            queries={"gang-seconds by weight": _now(FAIRNESS_SPREAD)},
            unit="s",
            meaning="Of those that wait. It stays within the cost of the jobs that one tenant has on gangs at once.",
        ),
    ),
)

DASHBOARDS = (OVERVIEW, GANGS_BOARD, TENANTS)
