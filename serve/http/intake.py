"""Accepting a video: from a body that came in to a job that is on disk.

What costs nothing is checked first and what others share last: room in the tenant's quota, which counts the
request, shape of the body, media, limits of the model, moderation, and in the transaction that writes the job
the quota again.
"""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from sqlalchemy.exc import DBAPIError

from pusa_dist.config import ModelConfig
from pusa_dist.errors import RequestError
from pusa_dist.request import GenerationRequest, MediaInfo, RequestParams, check_request, resolve_request
from pusa_dist.tokenizer import count_tokens, load_tokenizer
from serve.config import ServeConfig
from serve.http.content import finished_artifact
from serve.http.errors import ServeError, moderation_unavailable, over_quota, storage_unavailable, tenant_erased
from serve.http.extension import extend_clip
from serve.http.forecast import Forecast
from serve.http.idempotency import Origin
from serve.http.lookup import find_job
from serve.http.measures import Measures
from serve.http.media import IncomingMedia
from serve.http.schemas import PusaBody, VideoBody
from serve.http.uploads import IncomingBody, Media, MediaUrl, Upload, VideoReference
from serve.logs import about
from serve.moderation import Moderation, ModerationUnavailableError
from serve.policy.quota import Quota
from serve.store.artifacts import ArtifactStore, input_key, job_prefix
from serve.store.jobs import (
    DuplicateKeyError,
    Job,
    JobStore,
    QuotaExceededError,
    StoredInput,
    UnknownTenantError,
    new_job_id,
)
from serve.traces import Traces

logger = logging.getLogger(__name__)

MAX_DRAWN_SEED = 2**32


class Intake:
    """Accepts videos of one model.

    Args:
        config: of the application.
        model: that is served.
        store: of jobs.
        artifacts: where inputs are kept.
        forecast: predicts what a job costs.
        media: fetches and looks into what comes in.
        measures: told of what is accepted, and of what moderation says.
        traces: whose current span a new job goes on with.
        clock: Unix seconds.
    """

    def __init__(
        self,
        config: ServeConfig,
        model: ModelConfig,
        store: JobStore,
        artifacts: ArtifactStore,
        forecast: Forecast,
        media: IncomingMedia,
        measures: Measures,
        traces: Traces,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._model = model
        self._store = store
        self._artifacts = artifacts
        self._forecast = forecast
        self._media = media
        self._measures = measures
        self._traces = traces
        self._clock = clock
        self._tokenizer = load_tokenizer(model)
        self._moderation = Moderation.load(config.moderation, measures.moderated, config.moderation_timeout_s)

    def create(self, tenant: str, body: IncomingBody, origin: Origin) -> Job:
        """Accept a new video; when this returns, the job and its inputs are on disk.

        Raises:
            RequestError: a value that cannot be honoured, or moderation refused it; nothing was stored.
            ServeError: unknown model, over quota, or an idempotency key used for something else.
        """
        earlier = origin.earlier_job(self._store, tenant)
        if earlier is not None:
            return earlier
        self._check_room(tenant)
        order = self._parse(body)
        uploads = self._media.fetched([_upload_only(one) for one in body.media])
        media = [self._media.probe(upload, tenant) for upload in uploads]
        return self._accept(tenant, _params(order), order.pusa, uploads, media, origin)

    def extend(self, tenant: str, body: IncomingBody, origin: Origin) -> Job:
        """Accept a video that goes on where a clip, uploaded or made here, ends.

        Raises:
            RequestError: a value that cannot be honoured, or moderation refused it; nothing was stored.
            ServeError: unknown model or video, over quota, or the video has not finished.
        """
        earlier = origin.earlier_job(self._store, tenant)
        if earlier is not None:
            return earlier
        self._check_room(tenant)
        order = self._parse(body)
        params = _params(order)
        if len(body.media) != 1:
            raise RequestError(
                f"{len(body.media)} videos were given; give one to extend, as a file or by its id", "video", "one_video"
            )
        source = body.media[0]
        if isinstance(source, VideoReference):
            made = find_job(self._store, tenant, source.id)
            upload = self._finished_video(made, source.param)
            params = _in_the_format_of(made.request, params)
        else:
            (upload,) = self._media.fetched([source])
        media = self._media.probe(upload, tenant)
        params = extend_clip(params, media, self._model)
        return self._accept(tenant, params, order.pusa, [upload], [media], origin)

    def _check_room(self, tenant: str) -> None:
        """Count the request and refuse what is over quota whatever it holds; the job's own check comes last."""
        try:
            self._store.ask(tenant, self._quota(tenant))
        except QuotaExceededError as error:
            raise over_quota(error.refusal) from error
        except UnknownTenantError as error:
            raise tenant_erased() from error

    def _parse(self, body: IncomingBody) -> VideoBody:
        order = VideoBody.parse(body.fields)
        check_model(self._model, order.model)
        return order

    def _accept(
        self,
        tenant: str,
        params: RequestParams,
        ours: PusaBody,
        uploads: Sequence[Upload],
        media: Sequence[MediaInfo],
        origin: Origin,
    ) -> Job:
        request = resolve_request(params, media, self._model)
        self._check(request, ours)
        try:
            self._moderation.check_submission(tenant, request, [upload.data for upload in uploads])
        except ModerationUnavailableError as error:
            raise moderation_unavailable() from error
        now = self._clock()
        job_id = new_job_id(now)
        job = Job(
            id=job_id,
            tenant=tenant,
            model=self._model.name,
            revision=self._model.revision,
            request=request,
            inputs=tuple(_stored_input(input_key(job_id, index), info) for index, info in enumerate(media)),
            priority=ours.priority,
            cost=self._forecast.cost(request),
            num_steps=request.num_inference_steps,
            created_at=now,
            expires_at=now + self._config.result_ttl_s,
            preview_every=ours.preview_every,
            webhook_url=ours.webhook,
            fingerprint=origin.fingerprint,
            idempotency_key=origin.idempotency_key,
            traceparent=self._traces.traceparent(),
            is_retry=origin.is_retry,
        )
        return self._keep(job, uploads, origin)

    def _check(self, request: GenerationRequest, ours: PusaBody) -> None:
        check_request(self._config.denoiser.parallel, request)
        self._check_tokens(request.prompt, "prompt")
        self._check_tokens(request.negative_prompt, "pusa.negative_prompt")
        if ours.preview_every > request.num_inference_steps:
            raise RequestError(
                f"pusa.preview_every={ours.preview_every} is more than the {request.num_inference_steps} steps there "
                "are; use a smaller number, or 0 for no previews",
                "pusa.preview_every",
                "out_of_range",
            )

    def _keep(self, job: Job, uploads: Sequence[Upload], origin: Origin) -> Job:
        """Inputs first, then the row, so that a job in the database always has its inputs."""
        try:
            for stored, upload in zip(job.inputs, uploads, strict=True):
                self._artifacts.put(stored.key, upload.data)
            self._store.create(job, self._quota(job.tenant), repeats_since=origin.repeats_since)
        except BaseException as error:
            # Where the connection was lost the row may be there; if it is not, the hourly sweep removes the inputs.
            may_be_there = isinstance(error, DBAPIError) and error.connection_invalidated
            if job.inputs and not may_be_there:
                self._artifacts.delete(job_prefix(job.id))
            match error:
                case DuplicateKeyError():  # the same request came in twice at the same time
                    earlier = origin.earlier_job(self._store, job.tenant)
                    if earlier is not None:  # else it is deleted already
                        return earlier
                case QuotaExceededError():
                    raise over_quota(error.refusal) from error
                case UnknownTenantError():
                    raise tenant_erased() from error
                case OSError():
                    # Not the error itself: it names files.
                    logger.error("job %s of tenant %s could not be stored: %s", job.id, job.tenant, error.strerror)
                    raise storage_unavailable() from error
            raise
        self._measures.accepted(job.priority)
        with about(job=job.id):
            logger.info("job %s of tenant %s accepted with %d inputs", job.id, job.tenant, len(job.inputs))
        return job

    def _quota(self, tenant: str) -> Quota:
        known = self._store.tenant(tenant)
        return Quota() if known is None else known.quota

    def _check_tokens(self, text: str, param: str) -> None:
        limit = self._model.text_encoder.max_tokens
        num_tokens = count_tokens(self._tokenizer, text)
        if num_tokens > limit:
            raise RequestError(
                f"{param} has {num_tokens} tokens; the text encoder reads {limit}: shorten it",
                param,
                "prompt_too_long",
            )

    def _finished_video(self, job: Job, param: str) -> Upload:
        artifact = finished_artifact(job, "video")
        try:
            return Upload(param, self._artifacts.read(artifact.key))
        except FileNotFoundError as error:
            raise ServeError(
                404, "content_expired", f"video {job.id} is no longer kept; upload the clip instead", param
            ) from error


def check_model(model: ModelConfig, name: str | None) -> None:
    """Refuse any model but the one that is served; None means that one.

    Raises:
        ServeError: 404.
    """
    if name not in (None, model.name):
        raise ServeError(404, "model_not_found", f"model {name!r} is not served here; use {model.name!r}", "model")


def _params(order: VideoBody) -> RequestParams:
    return order.params(seed=secrets.randbelow(MAX_DRAWN_SEED))


def _upload_only(media: Media) -> Upload | MediaUrl:
    if isinstance(media, VideoReference):
        raise RequestError(
            f"{media.param}: a video is continued with POST /v1/videos/extensions; here, upload an image or a clip",
            media.param,
            "not_supported",
        )
    return media


def _in_the_format_of(source: GenerationRequest, params: RequestParams) -> RequestParams:
    """Size and frame rate of the video that is extended, where nothing else was asked."""
    if params.width is None:
        params = replace(params, width=source.width, height=source.height)
    return params if params.fps is not None else replace(params, fps=source.fps)


def _stored_input(key: str, info: MediaInfo) -> StoredInput:
    return StoredInput(
        key=key,
        kind=info.kind,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
    )
