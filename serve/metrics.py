"""Every metric of ours, declared once: Prometheus sees them as ``ray_<name>`` (counters ``_total``).

The declarations are plain values, which the rules and the dashboards are checked against; a process that
records makes its instruments of them with Ray, which exports them where Prometheus scrapes the node. No
metric carries a job or a tenant: tenants appear as the class of their weight, of which there are seven.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log2
from typing import Any, Literal

from serve.policy.cost import Backlog
from serve.policy.priority import Priority

_WAITS = (0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_STAGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

FAULTS = frozenset(
    {
        "deadline_exceeded", "gang_died_twice", "internal_error", "moderation_unavailable", "numerics_error",
        "out_of_memory", "replica_lost",
    }
)  # fmt: skip
"""Codes of failures that a user cannot cause; whatever else a job fails with lies in what was asked."""

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it is declared."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that Prometheus knows it by."""
        full = f"ray_{self.name}"
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"{full}{end}" for end in ends[self.kind])

    def instrument(self) -> Any:
        """What records it, in a process that Ray runs."""
        from ray.serve import metrics  # whoever only reads the names needs no Ray

        labels: Any = self.labels  # Ray says tuple[str], and means any number
        if self.kind == "histogram":
            return metrics.Histogram(self.name, self.help, list(self.buckets), labels)
        make = metrics.Counter if self.kind == "counter" else metrics.Gauge
        return make(self.name, self.help, labels)


ACCEPTED = Metric("video_jobs_accepted", "counter", "Jobs accepted by the gateways.", ("priority",))
REJECTS = Metric("video_rejects", "counter", "Requests answered with an error.", ("code", "status"))
JOBS = Metric("video_jobs", "counter", "Jobs ended.", ("outcome", "code", "priority"))
JOB_SECONDS = Metric(
    "video_job_seconds", "histogram", "Seconds from a job's creation to its end.", ("outcome", "priority"), _WAITS
)
QUEUE_WAIT = Metric(
    "video_queue_wait_seconds",
    "histogram",
    "Seconds from a job's creation until a dispatcher took it.",
    ("priority", "tenant_class"),
    _WAITS,
)
STAGE_SECONDS = Metric(
    "video_stage_seconds",
    "histogram",
    "Seconds of a job in a stage: text, encode, denoise, decode; and place, its wait for a gang within denoise.",
    ("stage",),
    _STAGES,
)
STEP_SECONDS = Metric(
    "video_step_seconds", "histogram", "Seconds of a denoising step, on the gang.", ("max_tokens",), _STEPS
)
STEP_SECONDS_SPENT = Metric(
    "video_step_seconds_spent", "counter", "Seconds that gangs spent in steps.", ("max_tokens",)
)
"""For means: Ray makes up the sum of a histogram from the middles of its buckets."""
QUEUE_DEPTH = Metric("video_queue_depth", "gauge", "Jobs in the store that have not ended.", ("status",))
BACKLOG_COST = Metric(
    "video_backlog_cost_seconds",
    "gauge",
    "Predicted gang-seconds that unfinished jobs still need.",
    ("status", "priority", "tenant_class"),
)
OLDEST_QUEUED = Metric("video_oldest_queued_seconds", "gauge", "Age of the oldest queued job.", ("priority",))
WAITING_TENANTS = Metric("video_tenants_waiting", "gauge", "Tenants with unfinished jobs.", ("tenant_class",))
DELIVERED_COST = Metric(
    "video_delivered_cost_seconds",
    "counter",
    "Gang-seconds charged to tenants; fair is: in proportion to their weights.",
    ("tenant_class",),
)
FAIRNESS_SPREAD = Metric(
    "video_fairness_spread_seconds",
    "gauge",
    "Between the waiting tenants that are most and least ahead of their share, in gang-seconds by weight.",
)
GANGS = Metric("video_gangs", "gauge", "Gangs that a dispatcher knows.", ("state",))
FREE_PLACES = Metric("video_gang_places_free", "gauge", "Jobs that the gangs could hold beside theirs.")
GANGS_LOST = Metric("video_gangs_lost", "counter", "Gangs that died or went silent without handing over.")
REQUEUED = Metric("video_jobs_requeued", "counter", "Attempts given up and put back in the queue.", ("reason",))
RELEASED = Metric("video_jobs_released", "counter", "Times that a gang let a job go on elsewhere.")
REPEATED = Metric("video_steps_repeated", "counter", "Steps made again after a fault.")
CHECKPOINTS = Metric("video_checkpoints", "counter", "Checkpoints published.")
CHECKPOINT_FAILURES = Metric("video_checkpoint_failures", "counter", "Checkpoints that could not be written.")
WEBHOOKS = Metric("video_webhooks", "counter", "Tries to tell a tenant that a job has ended.", ("result",))
MODERATION = Metric("video_moderation", "counter", "Answers of the moderation hook.", ("subject", "result"))
DECODER_FAILURES = Metric(
    "video_decoder_failures", "counter", "Media that could not be decoded by no fault of theirs.", ("role",)
)
DISPATCHER_ROUNDS = Metric(
    "video_dispatcher_rounds", "counter", "Times, once a second, that the dispatcher reached its store."
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of the above."""


def tenant_class(weight: float) -> str:
    """The label of a tenant: its weight, to the nearest power of two from a quarter to 16."""
    return f"{2.0 ** min(4, max(-2, round(log2(weight)))):g}"


def outcome_of(code: str) -> str:
    """How a job ended: completed, cancelled, failed (the service's fault) or refused (the request's)."""
    if code in ("completed", "cancelled"):
        return code
    return "failed" if code in FAULTS else "refused"


class JobMetrics:
    """What the dispatcher sees of the jobs."""

    def __init__(self) -> None:
        self._jobs, self._total = JOBS.instrument(), JOB_SECONDS.instrument()
        self._wait, self._stage = QUEUE_WAIT.instrument(), STAGE_SECONDS.instrument()
        self._requeued, self._released = REQUEUED.instrument(), RELEASED.instrument()
        self._repeated, self._checkpoints = REPEATED.instrument(), CHECKPOINTS.instrument()
        self._depth, self._cost = QUEUE_DEPTH.instrument(), BACKLOG_COST.instrument()
        self._oldest, self._tenants = OLDEST_QUEUED.instrument(), WAITING_TENANTS.instrument()
        self._delivered, self._spread = DELIVERED_COST.instrument(), FAIRNESS_SPREAD.instrument()
        self._gangs, self._places = GANGS.instrument(), FREE_PLACES.instrument()
        self._lost, self._rounds = GANGS_LOST.instrument(), DISPATCHER_ROUNDS.instrument()
        self._webhooks, self._moderation = WEBHOOKS.instrument(), MODERATION.instrument()
        # What has been there is told of when it is gone, too; the usual from the start.
        self._seen = {("queued", "interactive", "1"), ("in_progress", "interactive", "1")}

    def waited(self, seconds: float, priority: Priority, weight: float) -> None:
        """A dispatcher took a job for the first time."""
        self._wait.observe(max(seconds, 1e-3), {"priority": priority, "tenant_class": tenant_class(weight)})

    def ended(self, code: str, seconds: float, priority: Priority) -> None:
        """A job ended: ``completed``, ``cancelled`` or an error code, that long after its creation."""
        outcome = outcome_of(code)
        self._jobs.inc(1, {"outcome": outcome, "code": code, "priority": priority})
        self._total.observe(max(seconds, 1e-3), {"outcome": outcome, "priority": priority})

    def requeued(self, reason: str) -> None:
        """An attempt was given up and the job queued again."""
        self._requeued.inc(1, {"reason": reason})

    def stage(self, stage: str, seconds: float) -> None:
        """A job left a stage after that long."""
        self._stage.observe(max(seconds, 1e-6), {"stage": stage})

    def released(self) -> None:
        """A job left its gang between two steps, to go on later or elsewhere."""
        self._released.inc(1)

    def repeated(self) -> None:
        """A step was made again."""
        self._repeated.inc(1)

    def checkpointed(self) -> None:
        """A checkpoint was published."""
        self._checkpoints.inc(1)

    def delivered(self, cost: float, weight: float) -> None:
        """So many gang-seconds, more than 0, were charged to a tenant of that weight."""
        self._delivered.inc(cost, {"tenant_class": tenant_class(weight)})

    def spread(self, seconds: float) -> None:
        """How far apart the waiting tenants are."""
        self._spread.set(seconds)

    def gangs(self, states: Mapping[str, int], num_free: int) -> None:
        """What gangs there are right now."""
        for state in ("open", "full", "leaving", "silent"):
            self._gangs.set(states.get(state, 0), {"state": state})
        self._places.set(num_free)

    def gang_lost(self) -> None:
        """A gang is given up that had not said it would leave."""
        self._lost.inc(1)

    def round(self, backlog: Iterable[Backlog], weight_of: Callable[[str], float]) -> None:
        """The dispatcher has reached its store, about once a second, and this is what it found there."""
        self._rounds.inc(1)
        depth: dict[str, int] = {"queued": 0, "in_progress": 0}
        oldest: dict[str, float] = {"interactive": 0.0, "batch": 0.0}
        cost = dict.fromkeys(self._seen, 0.0)
        tenants: dict[str, set[str]] = {of: set() for _, _, of in self._seen}
        for one in backlog:
            of = tenant_class(weight_of(one.tenant))
            depth[one.status] += one.num
            key = (one.status, one.priority, of)
            cost[key] = cost.get(key, 0.0) + one.cost
            tenants.setdefault(of, set()).add(one.tenant)
            if one.status == "queued":
                oldest[one.priority] = max(oldest[one.priority], one.oldest_s)
        self._seen = set(cost)
        for (status, priority, of), value in cost.items():
            self._cost.set(value, {"status": status, "priority": priority, "tenant_class": of})
        for of, names in tenants.items():
            self._tenants.set(len(names), {"tenant_class": of})
        for status, num in depth.items():
            self._depth.set(num, {"status": status})
        for priority, age in oldest.items():
            self._oldest.set(age, {"priority": priority})

    def webhook(self, result: str) -> None:
        """A try: ``delivered``, ``postponed`` or ``given_up``."""
        self._webhooks.inc(1, {"result": result})

    def moderated(self, subject: str, result: str) -> None:
        """See ``GatewayMetrics.moderated``."""
        self._moderation.inc(1, {"subject": subject, "result": result})


class GatewayMetrics:
    """What a gateway sees of requests."""

    def __init__(self) -> None:
        self._accepted, self._rejects = ACCEPTED.instrument(), REJECTS.instrument()
        self._moderation, self._decoders = MODERATION.instrument(), DECODER_FAILURES.instrument()

    def accepted(self, priority: Priority) -> None:
        """A job is on disk."""
        self._accepted.inc(1, {"priority": priority})

    def rejected(self, code: str, status: int) -> None:
        """A request was answered with an error."""
        self._rejects.inc(1, {"code": code, "status": str(status)})

    def moderated(self, subject: str, result: str) -> None:
        """The hook said of a ``request`` or a ``video``: ``passed``, ``refused``; or ``failed`` itself."""
        self._moderation.inc(1, {"subject": subject, "result": result})

    def decoder_failed(self) -> None:
        """Decoders died, or cannot be started."""
        self._decoders.inc(1, {"role": "gateway"})


class VaeMetrics:
    """What a VAE sees of its decoders."""

    def __init__(self) -> None:
        self._decoders = DECODER_FAILURES.instrument()

    def decoder_failed(self) -> None:
        """Decoders died, or cannot be started."""
        self._decoders.inc(1, {"role": "vae"})


class GangMetrics:
    """What a denoiser sees of its gang."""

    def __init__(self) -> None:
        self._step, self._spent = STEP_SECONDS.instrument(), STEP_SECONDS_SPENT.instrument()
        self._unwritten = CHECKPOINT_FAILURES.instrument()

    def step(self, num_tokens: int, seconds: float) -> None:
        """A step of that many tokens took that long; they are counted up to the next power of two."""
        seconds, size = max(seconds, 1e-6), {"max_tokens": str(1 << max(num_tokens - 1, 0).bit_length())}
        self._step.observe(seconds, size)
        self._spent.inc(seconds, size)

    def checkpoint_failed(self) -> None:
        """A checkpoint could not be written; it is tried again."""
        self._unwritten.inc(1)
