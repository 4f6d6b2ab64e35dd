"""Prometheus rules: what is worth computing once, and what is worth waking somebody for.

Objectives: 99 % of the jobs that the service can do are done, and 95 % of interactive ones within ten
minutes. The fast and slow burn alerts are those of the SRE workbook (14.4 times the budget over an hour,
6 times over six), with a least number of failures so that one bad job at night wakes nobody.

Failures are rare, and a counter that has never counted is not exported at all: Prometheus' ``increase``
does not see it go from nothing to 1. ``events`` adds those first values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.metrics import (
    BACKLOG_COST,
    CHECKPOINT_FAILURES,
    DECODER_FAILURES,
    DELIVERED_COST,
    DISPATCHER_ROUNDS,
    GANGS,
    GANGS_LOST,
    JOB_SECONDS,
    JOBS,
    MODERATION,
    OLDEST_QUEUED,
    QUEUE_DEPTH,
    REJECTS,
    REQUEUED,
    STEP_SECONDS,
    STEP_SECONDS_SPENT,
    WEBHOOKS,
)

ALLOWED_FAILURES = 0.01
OBJECTIVE_S = 600.0
"""A bucket's bound of JOB_SECONDS."""
ALLOWED_LATE = 0.05

_JOBS, _ROUNDS = JOBS.series[0], DISPATCHER_ROUNDS.series[0]
_LATENCY_BUCKET, _, _LATENCY_COUNT = JOB_SECONDS.series
_STEP_SPENT, _STEP_COUNT = STEP_SECONDS_SPENT.series[0], STEP_SECONDS.series[2]
_HTTP = "ray_serve_num_http_requests_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A series that is computed once and used often."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A condition that asks somebody to act."""

    name: str
    expr: str
    wait: str
    """How long it must hold."""
    severity: Literal["page", "ticket"]
    """Now, or the next working day."""
    summary: str
    runbook: str
    """What to do, most likely first."""


def events(selector: str, window: str) -> str:
    """How often a counter counted within a window, its first time included.

    What was there before Prometheus looked for the first time is not counted.
    """
    first = f"sum(min_over_time({selector}[{window}]) unless {selector} offset {window})"
    return (
        f"(sum(increase({selector}[{window}])) or vector(0))"
        f" + (({first} and count({_ROUNDS} offset {window})) or vector(0))"
    )


def _counter(metric_series: str, **labels: str) -> str:
    inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{metric_series}{{{inside}}}"


def _burn(window: str) -> list[Recording]:
    failed, done = _counter(_JOBS, outcome="failed"), _counter(_JOBS, outcome="completed")
    return [
        Recording(record=f"pusa:jobs_failed:increase{window}", expr=events(failed, window)),
        Recording(
            record=f"pusa:jobs_failed:ratio{window}",
            expr=f"pusa:jobs_failed:increase{window}"
            f" / clamp_min(pusa:jobs_failed:increase{window} + {events(done, window)}, 1)",
        ),
    ]


RECORDINGS: tuple[Recording, ...] = (
    *(recording for window in ("5m", "30m", "1h", "6h") for recording in _burn(window)),
    # Every dispatcher of a rolling upgrade counts the same store: the largest of their sums is the backlog.
    Recording(record="pusa:backlog_cost_seconds", expr=f"max(sum by (replica) ({BACKLOG_COST.series[0]}))"),
    Recording(
        record="pusa:gangs:open", expr=f"max(sum by (replica) ({_counter(GANGS.series[0], state='open')})) or vector(0)"
    ),
    Recording(record="pusa:drain_seconds", expr="pusa:backlog_cost_seconds / clamp_min(pusa:gangs:open, 1)"),
    Recording(
        record="pusa:gangs:busy_ratio",
        expr=f"sum(rate({_STEP_SPENT}[5m])) / clamp_min(pusa:gangs:open, 1)",
    ),
    Recording(
        record="pusa:step_seconds:mean15m",
        expr=f"sum by (max_tokens) (rate({_STEP_SPENT}[15m])) / sum by (max_tokens) (rate({_STEP_COUNT}[15m]))",
    ),
    Recording(
        record="pusa:replicas_missing",
        expr="max by (application, deployment) (ray_serve_autoscaling_target_replicas)"
        " - on (application, deployment) (sum by (application, deployment) (ray_serve_deployment_replica_healthy)"
        " or max by (application, deployment) (ray_serve_autoscaling_target_replicas) * 0)",
    ),
    Recording(
        record="pusa:tenant_class:cost_rate5m",
        expr=f"sum by (tenant_class) (rate({DELIVERED_COST.series[0]}[5m]))",
    ),
)

_LATE = (
    f"1 - sum(rate({_counter(_LATENCY_BUCKET, outcome='completed', priority='interactive', le=str(OBJECTIVE_S))}[1h]))"
    f" / sum(rate({_counter(_LATENCY_COUNT, outcome='completed', priority='interactive')}[1h]))"
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        name="PusaJobsFailFast",
        expr=f"pusa:jobs_failed:ratio1h > {14.4 * ALLOWED_FAILURES:g}"
        f" and pusa:jobs_failed:ratio5m > {14.4 * ALLOWED_FAILURES:g} and pusa:jobs_failed:increase1h >= 5",
        wait="2m",
        severity="page",
        summary="Jobs fail so fast that a month's allowance is gone in two days.",
        runbook="Overview, 'Jobs ended by code' says with what. gang_died_twice, numerics_error: the gangs' logs, then "
        "the last change of weights or driver. out_of_memory: the model's limits allow more than its GPUs hold; "
        "lower limits.max_tokens, or give its gangs more ranks. replica_lost: pods that die (memory, "
        "nodes). deadline_exceeded: see PusaQueueWaits. internal_error: the dispatcher's log by job; roll back the "
        "last release.",
    ),
    Alert(
        name="PusaJobsFailSlow",
        expr=f"pusa:jobs_failed:ratio6h > {6 * ALLOWED_FAILURES:g}"
        f" and pusa:jobs_failed:ratio30m > {6 * ALLOWED_FAILURES:g} and pusa:jobs_failed:increase6h >= 10",
        wait="15m",
        severity="ticket",
        summary="Jobs have been failing for hours at six times the allowed rate.",
        runbook="As PusaJobsFailFast; look for one node, model or size that the failed jobs share.",
    ),
    Alert(
        name="PusaJobsLate",
        expr=f"{_LATE} > {ALLOWED_LATE:g} and sum(increase("
        f"{_counter(_LATENCY_COUNT, outcome='completed', priority='interactive')}[1h])) >= 10",
        wait="10m",
        severity="ticket",
        summary=f"More than {ALLOWED_LATE:.0%} of interactive jobs took longer than {OBJECTIVE_S:g} s.",
        runbook="Overview, 'Seconds by stage': place grows: too few gangs (raise max_replicas, see PusaDrainTooLong); "
        "denoise alone grows: see PusaStepsSlower; decode grows: more VAE replicas.",
    ),
    Alert(
        name="PusaQueueWaits",
        expr=f"max({_counter(OLDEST_QUEUED.series[0], priority='interactive')}) > {OBJECTIVE_S:g}",
        wait="5m",
        severity="page",
        summary="An interactive job has been queued for more than ten minutes.",
        runbook="If gangs have free places, the job's tenant is at its max_running quota: nothing to do but tell it. "
        "Otherwise capacity is short: raise max_replicas of the denoiser, or find out why replicas are missing.",
    ),
    Alert(
        name="PusaDispatcherSilent",
        expr=f"absent({_ROUNDS}) or sum(rate({_ROUNDS}[3m])) < 0.1",
        wait="3m",
        severity="page",
        summary="No dispatcher has reached the database: no job is started, none ends.",
        runbook="Is the database up, and reachable from the dispatcher's node? Its log says 'could not reach its "
        "store'. If the deployment is not healthy: ray status, then its replica's log. If there is no data at all: "
        "Prometheus does not scrape Ray's metrics port.",
    ),
    Alert(
        name="PusaNoGangs",
        expr=f"max({_counter(QUEUE_DEPTH.series[0], status='queued')}) > 0 and pusa:gangs:open == 0",
        wait="10m",
        severity="page",
        summary="Jobs wait, and no gang takes any.",
        runbook="ray status: are GPUs free for a whole gang (its placement group waits otherwise)? Gangs, 'Gangs by "
        "state': silent means their coordinators do not answer; the Denoiser replicas' logs say why a start failed "
        "(weights, rendezvous, memory).",
    ),
    Alert(
        name="PusaReplicasMissing",
        expr="pusa:replicas_missing > 0",
        wait="20m",
        severity="ticket",
        summary="{{ $labels.deployment }} lacks {{ $value }} replicas.",
        runbook="Pods pending: quota, node pool or GPU type. Pods running: the replica's log says why it does not "
        "start. Takes longer than a cold start to mean anything.",
    ),
    Alert(
        name="PusaDeploymentUnhealthy",
        expr="min by (application, deployment) (ray_serve_deployment_status > 0) <= 2",
        wait="5m",
        severity="page",
        summary="{{ $labels.deployment }} failed to deploy, or is unhealthy.",
        runbook="serve status shows the message. After a release: roll back. Otherwise its replica's log; the "
        "Dispatcher and the Gateway refuse to start when their stores cannot be used, and say so.",
    ),
    Alert(
        name="PusaGangsDie",
        expr=f"{events(GANGS_LOST.series[0], '30m')} > 2.5",
        wait="0s",
        severity="ticket",
        summary="Three gangs or more died within half an hour.",
        runbook="'gang lost' in the logs says of what: a step past its deadline (a hung collective, a slow GPU), a "
        "rank that died (memory, driver), a ping (a frozen node). One node again and again: drain it.",
    ),
    Alert(
        name="PusaAttemptsRepeat",
        expr=f"{events(REQUEUED.series[0], '30m')} > 9.5",
        wait="0s",
        severity="ticket",
        summary="Ten attempts at jobs or more were given up within half an hour.",
        runbook="By reason, Gangs: gang_lost: see PusaGangsDie; replica_lost: encoder or VAE pods die; "
        "lease_expired: dispatchers die or cannot reach the database in time.",
    ),
    Alert(
        name="PusaCheckpointsFail",
        expr=f"{events(CHECKPOINT_FAILURES.series[0], '15m')} > 4.5",
        wait="0s",
        severity="ticket",
        summary="Gangs cannot write checkpoints; jobs wait for them after checkpoint_every steps.",
        runbook="Is the bucket reachable and writable from the gangs' nodes, and its quota not used up? The "
        "denoisers' logs have the store's own words.",
    ),
    Alert(
        name="PusaStorageUnavailable",
        expr=f"{events(_counter(REJECTS.series[0], code='storage_unavailable'), '10m')} > 4.5",
        wait="0s",
        severity="page",
        summary="Gateways answer 503 because database or artifact store do not.",
        runbook="Check the database and the bucket from a gateway's pod; nothing accepted is lost, clients try again.",
    ),
    Alert(
        name="PusaServerErrors",
        expr=f'sum(rate({_HTTP}{{status_code=~"5..",route!="/health"}}[10m]))'
        f' / sum(rate({_HTTP}{{route!="/health"}}[10m])) > 0.05 and sum(increase('
        f'{_HTTP}{{status_code=~"5..",route!="/health"}}[10m])) >= 10',
        wait="5m",
        severity="page",
        summary="More than 5 % of the answers are server errors.",
        runbook="Overview, 'Refused requests by code': internal_error: gateway log by request id, roll back; "
        "storage_unavailable, moderation_unavailable, decoding_unavailable: that dependency; only Serve's own 503: "
        "too few gateways.",
    ),
    Alert(
        name="PusaStepsSlower",
        expr="pusa:step_seconds:mean15m > 1.5 * (pusa:step_seconds:mean15m offset 1h)"
        f" and sum by (max_tokens) (increase({_STEP_COUNT}[15m])) > 20",
        wait="10m",
        severity="ticket",
        summary="Steps of up to {{ $labels.max_tokens }} tokens take half as long again as an hour ago.",
        runbook="GPUs that throttle or count ECC errors, a neighbour on the node or the network between ranks. "
        "Harmless if another release or another attention kernel was rolled out.",
    ),
    Alert(
        name="PusaDrainTooLong",
        expr="pusa:drain_seconds > 3600",
        wait="30m",
        severity="ticket",
        summary="The backlog keeps the gangs there are busy for more than an hour.",
        runbook="At max_replicas: raise it (python -m cluster.simulation says to what) or lower the tenants' quotas. "
        "Below: see PusaReplicasMissing.",
    ),
    Alert(
        name="PusaWebhooksGivenUp",
        expr=f"{events(_counter(WEBHOOKS.series[0], result='given_up'), '1h')} > 0.5",
        wait="0s",
        severity="ticket",
        summary="A tenant was not told that its job ended, after 31 hours of tries.",
        runbook="The dispatcher's log names webhook and tenant, never the URL: tell the tenant. Many tenants at "
        "once: is egress to port 443 blocked?",
    ),
    Alert(
        name="PusaModerationFails",
        expr=f"{events(_counter(MODERATION.series[0], result='failed'), '10m')} > 2.5",
        wait="0s",
        severity="page",
        summary="The moderation hook fails, so nothing passes.",
        runbook="The log names the hook's exception. Fix the hook or what it asks; taking it out of the "
        "configuration lets everything pass.",
    ),
    Alert(
        name="PusaDecodersFail",
        expr=f"{events(DECODER_FAILURES.series[0], '15m')} > 4.5",
        wait="0s",
        severity="ticket",
        summary="Processes that decode uploads are killed or do not start.",
        runbook="Usually the pod's memory limit: decoders of a gateway take decoders x decode_memory_mib at most.",
    ),
    Alert(
        name="PusaNodeMemoryHigh",
        expr="max by (NodeAddress) (ray_node_mem_used / ray_node_mem_total) > 0.92",
        wait="10m",
        severity="ticket",
        summary="Node {{ $labels.NodeAddress }} uses more than 92 % of its memory; Ray kills workers at 95 %.",
        runbook="The head: more memory, fewer dashboards. A VAE or gang node: smaller max_resident, or a bigger pod.",
    ),
    Alert(
        name="PusaNodeDiskFull",
        expr="max by (NodeAddress) (ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free)) > 0.85",
        wait="10m",
        severity="ticket",
        summary="The disk of node {{ $labels.NodeAddress }} is 85 % full; Ray stops at 95 %.",
        runbook="Logs and spilled objects under Ray's temporary folder; a state_dir on the node keeps results until "
        "they expire: shorter result_ttl_s, or a bucket.",
    ),
    Alert(
        name="PusaObjectsSpill",
        expr='sum by (NodeAddress) (increase(ray_spill_manager_request_total{Type="Spilled"}[15m])) > 10',
        wait="5m",
        severity="ticket",
        summary="Node {{ $labels.NodeAddress }} writes tensors to disk because its object store is full.",
        runbook="More shared memory for the pod, or fewer jobs in decode: more VAE replicas.",
    ),
    Alert(
        name="PusaControllerSlow",
        expr="max(ray_serve_controller_control_loop_duration_s) > 5",
        wait="10m",
        severity="ticket",
        summary="Ray Serve's controller takes more than 5 s a round: dead replicas are found late.",
        runbook="The head node is short of CPU or memory, or the GCS is slow (its Redis).",
    ),
)


def rule_file() -> dict[str, Any]:
    """What Prometheus reads as a rule file, and the operator as ``spec`` of a PrometheusRule."""
    return {
        "groups": [
            {
                "name": "pusa-recordings",
                "interval": "30s",
                "rules": [{"record": one.record, "expr": one.expr} for one in RECORDINGS],
            },
            {"name": "pusa-alerts", "interval": "30s", "rules": [_rule(one) for one in ALERTS]},
        ]
    }


def _rule(alert: Alert) -> Mapping[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook": alert.runbook},
    }


def runbook_table() -> str:
    """The alerts as a Markdown table."""
    rows = [f"| {one.name} | {one.severity} | {one.summary} | {one.runbook} |" for one in ALERTS]
    return "\n".join(["| alert | | what it says | what to do |", "|---|---|---|---|", *rows]) + "\n"
