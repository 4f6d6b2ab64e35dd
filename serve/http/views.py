"""Answers that go out: the OpenAI objects, with our own facts under the one key ``pusa``.

Every key is sent in every answer. A status is one of OpenAI's four, because the stock client stops
polling at any other word; what OpenAI cannot say (cancelled, the stage) is in ``pusa``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from pusa_dist.config import ModelConfig
from pusa_dist.geometry import PIXEL_MULTIPLE
from serve.policy.priority import Priority
from serve.policy.quota import Quota, Use
from serve.store.jobs import Job, Stage, Status
from serve.store.usage import Usage

N = TypeVar("N", int, float)

TASKS = (
    "text-to-video",
    "image-to-video",
    "start-end-frames",
    "keyframes",
    "extension",
    "completion",
    "transition",
)


class Answer(BaseModel):
    """Base of every body that goes out; the docstrings of its fields are in the document at /openapi.json."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class VideoError(Answer):
    """Why a job did not end well."""

    code: str
    """Stable reason, for programs."""
    message: str
    """The reason in a sentence, for people."""


class VideoFacts(Answer):
    """What we know of a job beyond the contract."""

    state: Status
    """State of the job; here ``cancelled`` is a state of its own."""
    stage: Stage | None
    """What is being done for it, or was when it failed or was cancelled; None if it waits or is completed."""
    step: int
    """Denoising steps done."""
    num_steps: int
    """Denoising steps in all."""
    queue_position: int | None
    """1 for the next in the fair order, as of a moment ago; None: not queued, not counted yet, or in a list."""
    estimated_seconds_left: float | None
    """Of denoising, once it is the job's turn; None before any step was measured, and in lists."""
    priority: Priority
    """As it was ordered: ``batch`` jobs give way to the tenant's interactive ones."""
    preview_every: int
    """Steps between preview frames in the event stream; 0: none."""
    attempt: int
    """How often work on it was begun: above 1 after a fault or a hand-over. 0: never yet."""
    seed: int
    """Seed of the noise, given or drawn."""
    precision: str | None
    """Precision of the transformer, ``bf16`` or ``fp32``; None until a gang has run it."""
    revision: str
    """Revision of the model's weights."""
    stage_seconds: dict[str, float]
    """Of every stage it has been through; ``wait`` is the part of ``denoise`` before its first step began."""
    request: dict[str, Any]
    """Every value that was used, defaults included."""


class Video(Answer):
    """OpenAI's video object."""

    id: str
    """Name of the video in every other route."""
    object: Literal["video"] = "video"
    """Kind of this object."""
    model: str
    """Model that makes it."""
    status: Literal["queued", "in_progress", "completed", "failed"]
    """One of OpenAI's four words; a cancelled video is ``failed``, and ``pusa.state`` says what it is."""
    progress: int
    """Percent of the steps; 100 once the video can be downloaded."""
    created_at: int
    """Unix seconds."""
    completed_at: int | None
    """Unix seconds; None unless it is completed."""
    expires_at: int | None
    """Unix seconds until which its files are kept; None unless it is completed."""
    prompt: str | None
    """What the video shows."""
    remixed_from_video_id: str | None = None
    """Always None: remixes are not offered."""
    seconds: str
    """Length of the video: frames / fps."""
    size: str
    """WIDTHxHEIGHT in pixels."""
    error: VideoError | None
    """Why it did not end well; None if it did, or has not ended."""
    pusa: VideoFacts
    """What OpenAI's contract has no words for."""


class VideoList(Answer):
    """A page of videos."""

    object: Literal["list"] = "list"
    """Kind of this object."""
    data: list[Video]
    """The videos, by age."""
    first_id: str | None
    """Id of the first; None: the page is empty."""
    last_id: str | None
    """Id of the last, after which the next page begins; None: the page is empty."""
    has_more: bool
    """Whether there is a next page."""


class VideoDeleted(Answer):
    """Confirmation of a deletion."""

    id: str
    """Of the video that was removed."""
    object: Literal["video.deleted"] = "video.deleted"
    """Kind of this object."""
    deleted: Literal[True] = True
    """It is gone, with its files."""


class Model(Answer):
    """OpenAI's model object, with limits and defaults."""

    id: str
    """Name of the model, as ``model`` of a request takes it."""
    object: Literal["model"] = "model"
    """Kind of this object."""
    created: int
    """Unix seconds of the start of the gateway that answers."""
    owned_by: str = "pusa"
    """Always the same."""
    pusa: dict[str, Any]
    """Its revision, tasks, limits, defaults and experts."""


class ModelList(Answer):
    """Every model served: one."""

    object: Literal["list"] = "list"
    """Kind of this object."""
    data: list[Model]
    """The models."""


class UsageOfDay(Answer):
    """What was used on one UTC day."""

    day: str
    """As 2026-11-20."""
    requests: int
    """Jobs accepted."""
    completed: int
    """Jobs that ended with a video."""
    gang_seconds: float
    """Cost delivered: seconds of a gang, the measure of fair shares."""
    video_seconds: float
    """Length of the completed videos."""


class Limits(Answer):
    """A tenant's quotas; null is no limit."""

    requests_per_minute: int | None
    """Jobs accepted in a minute."""
    max_queued: int | None
    """Jobs that wait."""
    max_running: int | None
    """Jobs in progress at once; more wait, none is refused for it."""
    gang_seconds_per_day: float | None
    """Seconds of a gang's work in a UTC day."""
    max_tokens: int | None
    """Tokens of the largest video."""


class Left(Answer):
    """What a tenant may still ask for; null is no limit."""

    requests_this_minute: int | None
    """Jobs that would be accepted now."""
    queued: int | None
    """Jobs that may still be queued."""
    gang_seconds_today: float | None
    """Seconds of a gang's work; unfinished jobs count with what they are predicted to need."""


class TenantUsage(Answer):
    """What a tenant has used, and what is left."""

    object: Literal["usage"] = "usage"
    """Kind of this object."""
    tenant: str
    """Name of the tenant."""
    weight: float
    """Share of the gangs under contention, relative to the other tenants'."""
    today: UsageOfDay
    """What was used today."""
    days: list[UsageOfDay]
    """Oldest first, today last; days without any use are left out."""
    limits: Limits
    """The tenant's quotas."""
    left: Left
    """What they still allow."""


def video_view(job: Job, queue_position: int | None = None, seconds_left: float | None = None) -> Video:
    """A job as its owner sees it."""
    request = job.request
    completed = job.status == "completed"
    return Video(
        id=job.id,
        model=job.model,
        status="failed" if job.status == "cancelled" else job.status,
        progress=_progress(job),
        created_at=int(job.created_at),
        completed_at=int(job.completed_at) if completed and job.completed_at is not None else None,
        expires_at=int(job.expires_at) if completed and job.expires_at is not None else None,
        prompt=request.prompt,
        seconds=f"{request.num_frames / request.fps:g}",
        size=f"{request.width}x{request.height}",
        error=error_view(job.status, job.error_code, job.error_message),
        pusa=VideoFacts(
            state=job.status,
            stage=job.stage,
            step=job.step,
            num_steps=job.num_steps,
            queue_position=queue_position,
            estimated_seconds_left=seconds_left,
            priority=job.priority,
            preview_every=job.preview_every,
            attempt=job.attempt,
            seed=request.seed,
            precision=job.precision,
            revision=job.revision,
            stage_seconds=dict(job.seconds),
            request=request.to_dict(),
        ),
    )


def _progress(job: Job) -> int:
    """Percent of the steps; 100 is kept for a video that can be downloaded."""
    if job.status == "completed":
        return 100
    return min(100 * job.step // max(job.num_steps, 1), 99)


def error_view(status: Status, code: str | None, message: str | None) -> VideoError | None:
    """Why a job did not end well; None if it did, or has not ended."""
    match status:
        case "cancelled":
            return VideoError(code="cancelled", message="the job was cancelled on request")
        case "failed":
            return VideoError(code=code or "internal_error", message=message or "the job failed")
        case _:
            return None


def page_view(jobs: Sequence[Job], has_more: bool) -> VideoList:
    """A page of jobs."""
    return VideoList(
        data=[video_view(job) for job in jobs],
        first_id=jobs[0].id if jobs else None,
        last_id=jobs[-1].id if jobs else None,
        has_more=has_more,
    )


def model_view(model: ModelConfig, limits: Mapping[str, int], created: int) -> Model:
    """What a user may ask of the model, and what happens when nothing is said."""
    facts = {
        "revision": model.revision,
        "tasks": TASKS,
        "limits": {
            **asdict(model.limits),
            "max_prompt_tokens": model.text_encoder.max_tokens,
            "size_multiple": PIXEL_MULTIPLE,
            **limits,
        },
        "defaults": {**asdict(model.defaults), "lora_alpha": dict(model.lora.alpha) if model.lora else None},
        "experts": model.experts,
    }
    return Model(id=model.name, created=created, pusa=facts)


def usage_view(name: str, weight: float, quota: Quota, use: Use, today: str, days: Sequence[Usage]) -> TenantUsage:
    """A tenant's usage.

    Args:
        name: of the tenant.
        weight: its share.
        quota: its limits.
        use: what counts against them now.
        today: the present day, in UTC.
        days: with any use, oldest first.
    """
    return TenantUsage(
        tenant=name,
        weight=weight,
        today=_day_view(next((one for one in days if one.day == today), Usage(day=today))),
        days=[_day_view(one) for one in days],
        limits=Limits(
            requests_per_minute=quota.requests_per_minute,
            max_queued=quota.max_queued,
            max_running=quota.max_running,
            gang_seconds_per_day=quota.cost_per_day,
            max_tokens=quota.max_tokens,
        ),
        left=Left(
            requests_this_minute=_left(quota.requests_per_minute, use.requests),
            queued=_left(quota.max_queued, use.queued),
            gang_seconds_today=_left(quota.cost_per_day, use.cost),
        ),
    )


def _day_view(used: Usage) -> UsageOfDay:
    return UsageOfDay(
        day=used.day,
        requests=used.requests,
        completed=used.completed,
        gang_seconds=round(used.cost, 3),
        video_seconds=round(used.video_seconds, 3),
    )


def _left(limit: N | None, used: N) -> N | None:
    return None if limit is None else max(limit - used, type(limit)(0))
