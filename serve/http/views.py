"""Answers that go out: the OpenAI objects, with our own facts under the one key ``pusa``.

Every key is sent in every answer. A status is one of OpenAI's four, because the stock client stops
polling at any other word; what OpenAI cannot say (cancelled, the stage) is in ``pusa``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel

from pusa_dist.config import ModelConfig
from pusa_dist.geometry import PIXEL_MULTIPLE
from serve.store.jobs import Job, Priority, Stage, Status

TASKS = (
    "text-to-video",
    "image-to-video",
    "start-end-frames",
    "keyframes",
    "extension",
    "completion",
    "transition",
)


class VideoError(BaseModel):
    """Why a job did not end well."""

    code: str
    message: str


class VideoFacts(BaseModel):
    """What we know of a job beyond the contract."""

    state: Status
    """As kept: here ``cancelled`` is a state of its own."""
    stage: Stage | None
    step: int
    num_steps: int
    queue_position: int | None
    """1 for the oldest queued job; None when not queued, and in lists."""
    priority: Priority
    attempt: int
    seed: int
    precision: str | None
    revision: str
    stage_seconds: dict[str, float]
    request: dict[str, Any]
    """Every value that was used, defaults included."""


class Video(BaseModel):
    """OpenAI's video object."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    remixed_from_video_id: str | None = None
    seconds: str
    """Length of the video: frames / fps."""
    size: str
    error: VideoError | None
    pusa: VideoFacts


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Confirmation of a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """OpenAI's model object, with limits and defaults."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pusa"
    pusa: dict[str, Any]


class ModelList(BaseModel):
    """Every model served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


def video_view(job: Job, queue_position: int | None = None) -> Video:
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
        error=_error(job),
        pusa=VideoFacts(
            state=job.status,
            stage=job.stage,
            step=job.step,
            num_steps=job.num_steps,
            queue_position=queue_position,
            priority=job.priority,
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


def _error(job: Job) -> VideoError | None:
    match job.status:
        case "cancelled":
            return VideoError(code="cancelled", message="the job was cancelled on request")
        case "failed":
            return VideoError(code=job.error_code or "internal_error", message=job.error_message or "the job failed")
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
