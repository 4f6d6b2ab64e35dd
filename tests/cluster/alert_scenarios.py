"""Series of a healthy service, and of one in which an alert must fire: promtool's notation, a value a minute."""

from dataclasses import dataclass

HOURS = 8
_N = HOURS * 60


def steady(value):
    return f"{value}+0x{_N}"


def rising(by, start=0):
    return f"{start}+{by}x{_N}"


def from_minute(minute, by, start=0):
    """Not there before, then rising: a counter that counts for the first time."""
    return f"_x{minute} {start}+{by}x{_N - minute}"


def jobs(outcome, code):
    return f'ray_video_jobs_total{{outcome="{outcome}",code="{code}",priority="interactive",replica="d"}}'


def latency(le):
    return f'ray_video_job_seconds_bucket{{outcome="completed",priority="interactive",replica="d",le="{le}"}}'


def http(status, route="/v1/videos"):
    return (
        f'ray_serve_num_http_requests_total{{application="pusa",route="{route}",method="GET",status_code="{status}"}}'
    )


def of_role(name, role, replica=""):
    inside = f',replica="{replica}"' if replica else ""
    return f'ray_serve_{name}{{application="pusa",deployment="{role}"{inside}}}'


def node(name):
    return f'ray_{name}{{NodeAddress="10.0.0.1"}}'


COUNT = 'ray_video_job_seconds_count{outcome="completed",priority="interactive",replica="d"}'
ROUNDS = 'ray_video_dispatcher_rounds_total{replica="d"}'
OLDEST = 'ray_video_oldest_queued_seconds{priority="interactive",replica="d"}'
QUEUED = 'ray_video_queue_depth{status="queued",replica="d"}'
COST = 'ray_video_backlog_cost_seconds{status="queued",priority="interactive",tenant_class="1",replica="d"}'
OPEN = 'ray_video_gangs{state="open",replica="d"}'
STEP_SPENT = 'ray_video_step_seconds_spent_total{max_tokens="32768"}'
STEP_COUNT = 'ray_video_step_seconds_count{max_tokens="32768"}'
SPILLED = 'ray_spill_manager_request_total{NodeAddress="10.0.0.1",Type="Spilled"}'
LOOP = "ray_serve_controller_control_loop_duration_s"

HEALTHY = {
    ROUNDS: rising(60),
    jobs("completed", "completed"): rising(3),
    jobs("failed", "gang_died_twice"): from_minute(30, 0, 1),
    jobs("refused", "input_too_short"): rising(1),
    jobs("cancelled", "cancelled"): rising(1),
    latency("600.0"): rising(3),
    latency("+Inf"): rising(3),
    COUNT: rising(3),
    OLDEST: steady(5),
    'ray_video_oldest_queued_seconds{priority="batch",replica="d"}': steady(3000),
    QUEUED: steady(2),
    COST: steady(130),
    OPEN: steady(2),
    'ray_video_gangs{state="silent",replica="d"}': steady(0),
    STEP_SPENT: rising(40),
    STEP_COUNT: rising(10),
    'ray_video_gangs_lost_total{replica="d"}': from_minute(30, 0, 1),
    'ray_video_jobs_requeued_total{reason="gang_lost",replica="d"}': from_minute(30, 0, 2),
    'ray_video_rejects_total{code="quota_exceeded",status="429",replica="g"}': rising(5),
    'ray_video_webhooks_total{result="delivered",replica="d"}': rising(1),
    'ray_video_webhooks_total{result="postponed",replica="d"}': rising(1),
    'ray_video_moderation_total{subject="request",result="refused",replica="g"}': rising(1),
    of_role("deployment_replica_healthy", "Denoiser", "a"): steady(1),
    of_role("deployment_replica_healthy", "Denoiser", "b"): steady(1),
    of_role("autoscaling_target_replicas", "Denoiser"): steady(2),
    of_role("deployment_replica_healthy", "Vae", "c"): steady(1),
    of_role("autoscaling_target_replicas", "Vae"): steady(1),
    of_role("deployment_status", "Vae"): steady(6),
    of_role("deployment_status", "Denoiser"): f"3+0x15 6+0x{_N - 16}",
    http(30): rising(600),
    http(503): rising(1),
    http(503, "/health"): rising(60),
    node("node_mem_used"): steady(60),
    node("node_mem_total"): steady(100),
    node("node_disk_usage"): steady(50),
    node("node_disk_free"): steady(50),
    SPILLED: steady(3),
    LOOP: steady(0.01),
}

STARTING = {
    ROUNDS: rising(60),
    QUEUED: steady(0),
    OLDEST: steady(0),
    OPEN: steady(0),
    'ray_video_gangs{state="silent",replica="d"}': steady(1),
    of_role("autoscaling_target_replicas", "Denoiser"): steady(1),
    of_role("deployment_status", "Denoiser"): steady(3),
    LOOP: steady(0.01),
}
"""The first minutes: no gang yet, no job, no request."""


@dataclass(frozen=True)
class Scenario:
    """What changes from the healthy series, and what the alert then says."""

    changes: dict
    at: str = "2h30m"
    labels: dict | None = None
    summary: str | None = None


FIRING = {
    "PusaJobsFailFast": Scenario({jobs("failed", "numerics_error"): from_minute(120, 2, 1)}),
    "PusaJobsFailSlow": Scenario({jobs("failed", "replica_lost"): rising(0.25)}, at="7h"),
    "PusaJobsLate": Scenario({latency("600.0"): rising(2.8)}),
    "PusaQueueWaits": Scenario({OLDEST: f"5+0x130 600+60x{_N - 131}"}),
    "PusaDispatcherSilent": Scenario({ROUNDS: f"0+60x130 7800+0x{_N - 131}"}),
    "PusaNoGangs": Scenario({OPEN: f"2+0x130 0+0x{_N - 131}"}),
    "PusaReplicasMissing": Scenario(
        {of_role("deployment_replica_healthy", "Denoiser", "b"): f"1+0x110 0+0x{_N - 111}"},
        labels={"application": "pusa", "deployment": "Denoiser"},
        summary="Denoiser lacks 1 replicas.",
    ),
    "PusaDeploymentUnhealthy": Scenario(
        {of_role("deployment_status", "Vae"): f"6+0x130 2+0x{_N - 131}"},
        labels={"application": "pusa", "deployment": "Vae"},
        summary="Vae failed to deploy, or is unhealthy.",
    ),
    "PusaGangsDie": Scenario({'ray_video_gangs_lost_total{replica="d"}': f"_x130 1 1 1 2 2 3 3+0x{_N - 137}"}),
    "PusaAttemptsRepeat": Scenario(
        {'ray_video_jobs_requeued_total{reason="replica_lost",replica="d"}': from_minute(135, 1, 1)}
    ),
    "PusaCheckpointsFail": Scenario({"ray_video_checkpoint_failures_total": from_minute(140, 1, 1)}),
    "PusaStorageUnavailable": Scenario(
        {'ray_video_rejects_total{code="storage_unavailable",status="503",replica="g"}': from_minute(142, 1, 1)}
    ),
    "PusaServerErrors": Scenario({http(500): from_minute(120, 60, 1)}),
    "PusaStepsSlower": Scenario(
        {STEP_SPENT: f"0+40x110 4400+80x{_N - 111}"},
        labels={"max_tokens": "32768"},
        summary="Steps of up to 32768 tokens take half as long again as an hour ago.",
    ),
    "PusaDrainTooLong": Scenario({COST: f"130+0x110 9000+0x{_N - 111}"}),
    "PusaWebhooksGivenUp": Scenario(
        {'ray_video_webhooks_total{result="given_up",replica="d"}': from_minute(130, 0, 1)}
    ),
    "PusaModerationFails": Scenario(
        {'ray_video_moderation_total{subject="request",result="failed",replica="g"}': from_minute(145, 1, 1)}
    ),
    "PusaDecodersFail": Scenario(
        {'ray_video_decoder_failures_total{role="gateway",replica="g"}': from_minute(140, 1, 1)}
    ),
    "PusaNodeMemoryHigh": Scenario(
        {node("node_mem_used"): f"60+0x130 95+0x{_N - 131}"},
        labels={"NodeAddress": "10.0.0.1"},
        summary="Node 10.0.0.1 uses more than 92 % of its memory; Ray kills workers at 95 %.",
    ),
    "PusaNodeDiskFull": Scenario(
        {node("node_disk_usage"): f"50+0x130 900+0x{_N - 131}"},
        labels={"NodeAddress": "10.0.0.1"},
        summary="The disk of node 10.0.0.1 is 85 % full; Ray stops at 95 %.",
    ),
    "PusaObjectsSpill": Scenario(
        {SPILLED: f"3+0x130 3+5x{_N - 131}"},
        labels={"NodeAddress": "10.0.0.1"},
        summary="Node 10.0.0.1 writes tensors to disk because its object store is full.",
    ),
    "PusaControllerSlow": Scenario({LOOP: f"0.01+0x130 9+0x{_N - 131}"}),
}
