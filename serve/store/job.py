"""A job as a value: what was asked, and what became of it."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pusa_dist.request import GenerationRequest
from serve.policy.priority import Priority

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Stage = Literal["text", "encode", "denoise", "decode"]

# Whatever JSON that is none, a field that is missing or unknown, or a value that is refused may raise.
UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)

JOB_ID_PATTERN = r"^video_[0-9a-f]{34}$"


class UnreadableRowError(ValueError):
    """A job whose row another version wrote, so that this one cannot say what it holds."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredInput:
    """One uploaded image or clip, as kept in the artifact store."""

    key: str
    kind: Literal["image", "clip"]
    width: int
    height: int
    num_frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One file of a result."""

    key: str
    content_type: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """How far a job is: what changes while it runs, without what it was asked."""

    id: str
    status: Status
    stage: Stage | None
    step: int
    num_steps: int
    attempt: int
    cost: float
    preview_key: str | None
    preview_step: int | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One accepted video request and what became of it. Times are Unix seconds."""

    id: str
    tenant: str
    model: str
    revision: str
    request: GenerationRequest
    created_at: float
    num_steps: int
    precision: str | None = None
    """Of the gang that ran it; None until one has."""
    status: Status = "queued"
    inputs: tuple[StoredInput, ...] = ()
    priority: Priority = "interactive"
    cost: float = 0.0
    """Seconds of a gang it is predicted to take, from its first step to its last."""
    stage: Stage | None = None
    step: int = 0
    """Denoising steps done, 0..num_steps."""
    steps_run: int = 0
    """Denoising steps that were seen to run, over all attempts; above ``num_steps`` when some ran twice."""
    furthest_step: int = 0
    """Denoising steps done where any attempt has come furthest: so many are its tenant's to pay, however often made."""
    started_at: float | None = None
    completed_at: float | None = None
    """When it ended, however it ended."""
    expires_at: float | None = None
    """When it is forgotten, files and all, if it has ended by then; None: never."""
    attempt: int = 0
    """Attempts begun; the fencing number of the current one."""
    gang_deaths: int = 0
    cancel_requested: bool = False
    checkpoint_key: str | None = None
    """Artifact that the next attempt continues from."""
    checkpoint_step: int | None = None
    """Denoising steps done in it."""
    preview_every: int = 0
    """Steps between previews; 0: none wanted."""
    preview_key: str | None = None
    """Artifact of the newest preview."""
    preview_step: int | None = None
    webhook_url: str | None = None
    """Who is told when it ends."""
    error_code: str | None = None
    error_message: str | None = None
    results: Mapping[str, Artifact] = field(default_factory=dict)
    """By content variant: video, thumbnail, spritesheet, frames."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time spent, by stage."""
    fingerprint: str | None = None
    """Digest of what was sent, to recognise a create that is sent again."""
    idempotency_key: str | None = None
    """What the sender called it; a tenant can use each once."""
    traceparent: str | None = None
    """The trace that its spans belong to; None: nobody collects them."""
    is_retry: bool = False
    """Whether the request that made it said that it was sent again."""

    @property
    def is_final(self) -> bool:
        """Whether its status can no longer change."""
        return self.status not in ("queued", "in_progress")

    @property
    def progress(self) -> JobProgress:
        """How far it is."""
        return JobProgress(**{item.name: getattr(self, item.name) for item in fields(JobProgress)})


def new_job_id(created_at: float) -> str:
    """An id that cannot be guessed; ids sort by age, so that one serves as a page's cursor."""
    return f"video_{int(created_at * 1e6):014x}{secrets.token_hex(10)}"


def job_from_row(row: Mapping[Any, Any]) -> Job:
    """The value of a row of the table ``jobs``.

    Raises:
        UnreadableRowError: it is another version's.
    """
    values = {item.name: row[item.name] for item in fields(Job)}
    try:
        values["request"] = GenerationRequest.from_dict(values["request"])
        values["inputs"] = tuple(StoredInput(**one) for one in values["inputs"])
        values["results"] = {variant: Artifact(**one) for variant, one in values["results"].items()}
        return Job(**values)
    except UNREADABLE as error:
        raise UnreadableRowError(row["id"]) from error
