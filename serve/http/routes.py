"""The routes: OpenAI's Videos and Models, and of ours ``cancel``, ``events``, usage and health.

Plain ``def`` routes run in worker threads, so nothing that blocks runs on the event loop; bodies are
read by an ``async`` dependency before.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from serve.http.arriving import paced
from serve.http.content import Variant, content_head, content_response, finished_artifact
from serve.http.errors import ErrorBody, ServeError
from serve.http.gateway import Gateway
from serve.http.idempotency import Origin
from serve.http.uploads import IncomingBody, read_body
from serve.http.views import (
    Answer,
    Model,
    ModelList,
    TenantUsage,
    Video,
    VideoDeleted,
    VideoList,
    model_view,
    page_view,
    video_view,
)
from serve.store.jobs import JOB_ID_PATTERN, Job

router = APIRouter(responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})

FILE_SUFFIXES: Mapping[Variant, str] = {
    "video": ".mp4",
    "thumbnail": ".webp",
    "spritesheet": ".jpg",
    "frames": ".zip",
}


async def _gateway(request: Request) -> Gateway:
    return request.app.state.gateway


async def _tenant(request: Request) -> str:
    return request.state.tenant


def _body(media_field: str) -> Callable[[Request], AsyncIterator[IncomingBody]]:
    async def read(request: Request) -> AsyncIterator[IncomingBody]:
        gateway = await _gateway(request)
        uploads, room, tenant = gateway.config.uploads, gateway.media.room, request.state.tenant
        with room.held(tenant) as take:
            arriving = Request(request.scope, paced(request.receive, take))
            body = await read_body(arriving, media_field, uploads.max_inputs, uploads.max_body_bytes)
            if not body.media:
                yield body
                return
            async with room.taken(tenant):
                yield body

    return read


TheGateway = Annotated[Gateway, Depends(_gateway)]
Tenant = Annotated[str, Depends(_tenant)]
CreateBody = Annotated[IncomingBody, Depends(_body("input_reference"))]
ExtendBody = Annotated[IncomingBody, Depends(_body("video"))]


class Asked(BaseModel):
    """Base of what is asked in the query of a URL."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ListQuery(Asked):
    """Which page of the videos."""

    after: str | None = Field(None, pattern=JOB_ID_PATTERN)
    """Id of the last video of the page before; left out: the first page."""
    limit: int = Field(20, ge=1, le=100)
    """Most videos of a page."""
    order: Literal["asc", "desc"] = "desc"
    """By age: ``desc`` is newest first."""


class UsageQuery(Asked):
    """How far back."""

    days: int = Field(30, ge=1, le=366)
    """Number of UTC days, today included."""


class ContentQuery(Asked):
    """Which file of a video."""

    variant: Variant = "video"
    """The MP4, a still, a sheet of stills, or a zip of lossless frames."""


class Health(Answer):
    """What is up."""

    status: Literal["ready", "starting"]
    """``ready`` when every deployment is."""
    model: str
    """Model that is served."""
    deployments: dict[str, bool]
    """Whether each is ready."""


def _answer(gateway: Gateway, job: Job, response: Response) -> Video:
    response.headers["openai-poll-after-ms"] = str(gateway.config.poll_after_ms)
    return video_view(job, gateway.queue_position(job), gateway.seconds_left(job))


@router.post("/v1/videos")
def create_video(gateway: TheGateway, tenant: Tenant, body: CreateBody, request: Request, response: Response) -> Video:
    """Order a video: multipart or JSON; images and clips as ``input_reference``, our own fields in ``pusa``."""
    origin = Origin.of("create", request.headers, body, request.state.arrived_at)
    return _answer(gateway, gateway.create(tenant, body, origin), response)


@router.post("/v1/videos/extensions")
def extend_video(gateway: TheGateway, tenant: Tenant, body: ExtendBody, request: Request, response: Response) -> Video:
    """Order a video that goes on where ``video`` (a file, or ``{"id": ...}``) ends.

    Its first frames are the clip's last ones again, up to four latent frames, so that the two join.
    """
    origin = Origin.of("extend", request.headers, body, request.state.arrived_at)
    return _answer(gateway, gateway.extend(tenant, body, origin), response)


@router.get("/v1/videos")
def list_videos(gateway: TheGateway, tenant: Tenant, query: Annotated[ListQuery, Query()]) -> VideoList:
    """Your videos, newest first; the next page begins ``after`` the last id of this one."""
    return page_view(*gateway.page(tenant, query.after, query.limit, query.order))


@router.post("/v1/videos/edits")
def edit_video() -> Response:
    """Not offered."""
    raise _not_offered("edits", "POST /v1/videos with the frames to keep as input_reference and pusa.conditioning")


@router.post("/v1/videos/characters")
def create_character() -> Response:
    """Not offered."""
    raise _not_offered("characters", "POST /v1/videos with pictures of the character as input_reference")


@router.get("/v1/videos/characters/{character_id}")
def get_character(character_id: str) -> Response:
    """Not offered."""
    raise _not_offered("characters", "POST /v1/videos with pictures of the character as input_reference")


@router.post("/v1/videos/{video_id}/remix")
def remix_video(video_id: str) -> Response:
    """Not offered."""
    raise _not_offered("remix", "POST /v1/videos with a new prompt and the same pusa.seed")


def _not_offered(what: str, instead: str) -> ServeError:
    return ServeError(400, "not_supported", f"{what} is not offered here; use {instead}")


@router.get("/v1/videos/{video_id}")
def retrieve_video(gateway: TheGateway, tenant: Tenant, video_id: str, response: Response) -> Video:
    """A video and how far it is."""
    return _answer(gateway, gateway.get(tenant, video_id), response)


@router.delete("/v1/videos/{video_id}")
def delete_video(gateway: TheGateway, tenant: Tenant, video_id: str) -> VideoDeleted:
    """Remove a video and its files; one in progress is cancelled."""
    gateway.delete(tenant, video_id)
    return VideoDeleted(id=video_id)


@router.post("/v1/videos/{video_id}/cancel")
def cancel_video(gateway: TheGateway, tenant: Tenant, video_id: str, response: Response) -> Video:
    """Stop a video at its next step."""
    return _answer(gateway, gateway.cancel(tenant, video_id), response)


@router.head("/v1/videos/{video_id}/content", response_class=Response, include_in_schema=False)
@router.get("/v1/videos/{video_id}/content", response_class=Response)
def download_video(
    gateway: TheGateway,
    tenant: Tenant,
    video_id: str,
    query: Annotated[ContentQuery, Query()],
    request: Request,
    range_header: Annotated[str | None, Header(alias="range", description="Bytes of the file, as in RFC 9110.")] = None,
    if_range: Annotated[str | None, Header(description="ETag that the range is meant for.")] = None,
) -> Response:
    """The bytes of a finished video, or a redirect to them."""
    artifact = finished_artifact(gateway.get(tenant, video_id), query.variant)
    filename = f"{video_id}{FILE_SUFFIXES[query.variant]}"
    if request.method == "HEAD":
        return content_head(artifact, filename)
    return content_response(gateway.artifacts, artifact, filename, range_header, if_range)


@router.get("/v1/videos/{video_id}/events", response_class=Response)
def stream_events(
    gateway: TheGateway,
    tenant: Tenant,
    video_id: str,
    request: Request,
    last_event_id: Annotated[str | None, Header(description="Id of the last event that was received.")] = None,
) -> Response:
    """How far a video is, as server-sent events, until it ends.

    ``progress`` whenever its state, stage or step changes, ``preview`` with a picture if previews were asked
    for, and at last ``completed``, ``failed``, ``cancelled`` or ``deleted``. A client that was cut off goes on
    from ``Last-Event-ID``, at any gateway.
    """
    return gateway.events(tenant, video_id, last_event_id, request.headers.get("authorization"))


@router.get("/v1/usage")
def retrieve_usage(gateway: TheGateway, tenant: Tenant, query: Annotated[UsageQuery, Query()]) -> TenantUsage:
    """What you have used, today and by day, your limits, and what they leave."""
    return gateway.usage(tenant, query.days)


@router.get("/v1/models")
def list_models(gateway: TheGateway) -> ModelList:
    """What is served, with its limits and defaults."""
    return ModelList(data=[_model(gateway)])


@router.get("/v1/models/{name}")
def retrieve_model(gateway: TheGateway, name: str) -> Model:
    """One model, with its limits and defaults."""
    gateway.check_model(name)
    return _model(gateway)


def _model(gateway: Gateway) -> Model:
    uploads = gateway.config.uploads
    limits = {"max_body_bytes": uploads.max_body_bytes, "max_inputs": uploads.max_inputs}
    return model_view(gateway.model, limits, int(gateway.started_at))


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(gateway: TheGateway) -> JSONResponse:
    """200 when every deployment is ready, else 503; the body says which is not."""
    deployments = await gateway.readiness()
    ready = all(deployments.values())
    body = {"status": "ready" if ready else "starting", "model": gateway.model.name, "deployments": dict(deployments)}
    return JSONResponse(body, 200 if ready else 503)
