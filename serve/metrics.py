"""Every metric of ours, declared once: Prometheus sees them as ``ray_<name>`` (counters ``_total``).

No metric carries a job or an unbounded label.
"""

from collections.abc import Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

_STAGE_BUCKETS = [0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800]
_STEP_BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


class JobMetrics:
    """What the dispatcher sees of the jobs."""

    def __init__(self) -> None:
        self._jobs = Counter("video_jobs", description="Jobs ended, by outcome or error code.", tag_keys=("outcome",))
        self._requeued = Counter(
            "video_jobs_requeued", description="Attempts given up and put back in the queue.", tag_keys=("reason",)
        )
        self._depth = Gauge("video_queue_depth", description="Jobs queued and in progress.", tag_keys=("status",))
        self._stage = Histogram(
            "video_stage_seconds",
            description="Seconds of a job in a stage.",
            boundaries=_STAGE_BUCKETS,
            tag_keys=("stage",),
        )
        self._total = Histogram(
            "video_job_seconds",
            description="Seconds from a job's creation to its end.",
            boundaries=_STAGE_BUCKETS,
            tag_keys=("outcome",),
        )

        self._gangs = Gauge("video_gangs", description="Gangs that take jobs.")
        self._places = Gauge("video_gang_places_free", description="Jobs that the gangs could hold beside theirs.")
        self._checkpoints = Counter("video_checkpoints", description="Checkpoints published.")
        self._released = Counter("video_jobs_released", description="Times that a gang let a job go on elsewhere.")
        self._repeated = Counter("video_steps_repeated", description="Steps made again after a fault.")

    def released(self) -> None:
        """A job left its gang between two steps, to go on later or elsewhere."""
        self._released.inc(1)

    def repeated(self) -> None:
        """A step was made again."""
        self._repeated.inc(1)

    def gangs(self, num_gangs: int, num_free: int) -> None:
        """What gangs there are right now."""
        self._gangs.set(num_gangs)
        self._places.set(num_free)

    def checkpointed(self) -> None:
        """A checkpoint was published."""
        self._checkpoints.inc(1)

    def ended(self, outcome: str, seconds: float) -> None:
        """A job ended: ``completed``, ``cancelled`` or an error code, that long after its creation."""
        self._jobs.inc(1, {"outcome": outcome})
        self._total.observe(max(seconds, 1e-3), {"outcome": outcome})

    def requeued(self, reason: str) -> None:
        """An attempt was given up and the job queued again."""
        self._requeued.inc(1, {"reason": reason})

    def stage(self, stage: str, seconds: float) -> None:
        """A job left a stage after that long."""
        self._stage.observe(max(seconds, 1e-6), {"stage": stage})

    def depth(self, counts: Mapping[str, int]) -> None:
        """Jobs by status right now."""
        for status in ("queued", "in_progress"):
            self._depth.set(counts.get(status, 0), {"status": status})


class GangMetrics:
    """What a denoiser sees of its gang."""

    def __init__(self) -> None:
        self._step = Histogram(
            "video_step_seconds",
            description="Seconds of a denoising step.",
            boundaries=_STEP_BUCKETS,
            tag_keys=("max_tokens",),
        )

    def step(self, num_tokens: int, seconds: float) -> None:
        """A step of that many tokens took that long; they are counted up to the next power of two."""
        self._step.observe(max(seconds, 1e-6), {"max_tokens": str(1 << max(num_tokens - 1, 0).bit_length())})
