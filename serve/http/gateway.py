"""What the API does, apart from HTTP: accept a job durably, and answer for any job of a tenant.

A plain class; nothing here knows of Ray or of a route. Every method blocks (database, object store,
media), so the routes call it from worker threads.
"""

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pusa_dist.errors import RequestError
from pusa_dist.media.probe import probe
from pusa_dist.request import GenerationRequest, MediaInfo, RequestParams, check_request, resolve_request
from pusa_dist.tokenizer import count_tokens, load_tokenizer
from serve.config import ServeConfig
from serve.http.content import finished_artifact
from serve.http.errors import ServeError, storage_unavailable, video_not_found
from serve.http.extension import extend_clip
from serve.http.repeats import Origin
from serve.http.schemas import VideoBody
from serve.http.tenants import Tenants
from serve.http.uploads import IncomingBody, Upload, VideoReference
from serve.store.artifacts import ArtifactStore, input_key, job_prefix
from serve.store.jobs import JOB_ID_PATTERN, DuplicateKeyError, Job, JobStore, Priority, StoredInput, new_job_id

logger = logging.getLogger(__name__)

Readiness = Callable[[], Awaitable[Mapping[str, bool]]]
"""Whether each deployment is ready, by its name."""

MAX_DRAWN_SEED = 2**32


class Gateway:
    """One replica of the front; any of them answers for any job.

    Args:
        config: the application's configuration.
        readiness: asks whether the other deployments are up.
        clock: Unix seconds.
    """

    def __init__(self, config: ServeConfig, readiness: Readiness, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.model = config.load_model()
        self.readiness = readiness
        self.tenants = Tenants.from_file(config.keys_file)
        self.artifacts = ArtifactStore(config.resolved_artifacts_url)
        self.started_at = clock()
        self._clock = clock
        self._tokenizer = load_tokenizer(self.model)
        self._store = JobStore(config.resolved_database_url, clock)
        self._store.create_tables()

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    def create(self, tenant: str, body: IncomingBody, origin: Origin) -> Job:
        """Accept a new video; when this returns, the job and its inputs are on disk.

        Raises:
            RequestError: a value that cannot be honoured; nothing was stored.
            ServeError: unknown model, or an idempotency key used for something else.
        """
        earlier = origin.earlier_job(self._store, tenant, self._clock())
        if earlier is not None:
            return earlier
        order = VideoBody.parse(body.fields)
        self.check_model(order.model)
        uploads = [_upload_only(one) for one in body.media]
        media = [probe(upload.data, upload.param) for upload in uploads]
        return self._accept(tenant, _params(order), order.pusa.priority, uploads, media, origin)

    def extend(self, tenant: str, body: IncomingBody, origin: Origin) -> Job:
        """Accept a video that goes on where a clip, uploaded or made here, ends.

        Raises:
            RequestError: a value that cannot be honoured; nothing was stored.
            ServeError: unknown model or video, or the video has not finished.
        """
        earlier = origin.earlier_job(self._store, tenant, self._clock())
        if earlier is not None:
            return earlier
        order = VideoBody.parse(body.fields)
        self.check_model(order.model)
        params = _params(order)
        if len(body.media) != 1:
            raise RequestError(
                f"{len(body.media)} videos were given; give one to extend, as a file or by its id", "video", "one_video"
            )
        source = body.media[0]
        if isinstance(source, VideoReference):
            made = self.get(tenant, source.id)
            upload = self._finished_video(made, source.param)
            params = _in_the_format_of(made.request, params)
        else:
            upload = source
        media = probe(upload.data, upload.param)
        params = extend_clip(params, media, self.model)
        return self._accept(tenant, params, order.pusa.priority, [upload], [media], origin)

    def get(self, tenant: str, video_id: str) -> Job:
        """A tenant's job.

        Raises:
            ServeError: 404, it does not exist.
        """
        _check_id(video_id)
        return _found(self._store.get(tenant, video_id), video_id)

    def page(self, tenant: str, after: str | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """A tenant's jobs by age, and whether there are more."""
        return self._store.page(tenant, after, limit, order)

    def delete(self, tenant: str, video_id: str) -> None:
        """Forget a job and everything of it; one that runs is cancelled.

        Raises:
            ServeError: 404, it does not exist.
        """
        _check_id(video_id)
        job = _found(self._store.delete(tenant, video_id), video_id)
        self.artifacts.delete(job_prefix(job.id))
        logger.info("job %s of tenant %s deleted while %s", job.id, job.tenant, job.status)

    def cancel(self, tenant: str, video_id: str) -> Job:
        """Stop a job: at once if it is queued, at its next step if it runs.

        Raises:
            ServeError: 404, it does not exist; 409, it has already ended otherwise.
        """
        _check_id(video_id)
        job = _found(self._store.request_cancel(tenant, video_id), video_id)
        if job.status in ("completed", "failed"):
            raise ServeError(
                409, "already_finished", f"video {job.id} has already {job.status}; DELETE it to remove it", "video_id"
            )
        return job

    def queue_position(self, job: Job) -> int | None:
        """1 for the oldest queued job; None for a job that is not queued."""
        return self._store.num_queued_before(job) + 1 if job.status == "queued" else None

    def check_model(self, name: str | None) -> None:
        """Refuse any model but the one that is served; None means that one.

        Raises:
            ServeError: 404.
        """
        if name not in (None, self.model.name):
            raise ServeError(
                404, "model_not_found", f"model {name!r} is not served here; use {self.model.name!r}", "model"
            )

    def _accept(
        self,
        tenant: str,
        params: RequestParams,
        priority: Priority,
        uploads: Sequence[Upload],
        media: Sequence[MediaInfo],
        origin: Origin,
    ) -> Job:
        request = resolve_request(params, media, self.model)
        check_request(self.config.denoiser.parallel, request)
        self._check_tokens(request.prompt, "prompt")
        self._check_tokens(request.negative_prompt, "pusa.negative_prompt")
        now = self._clock()
        job_id = new_job_id(now)
        job = Job(
            id=job_id,
            tenant=tenant,
            model=self.model.name,
            revision=self.model.revision,
            request=request,
            inputs=tuple(
                _stored_input(input_key(job_id, index), upload, info)
                for index, (upload, info) in enumerate(zip(uploads, media, strict=True))
            ),
            priority=priority,
            num_steps=request.num_inference_steps,
            created_at=now,
            expires_at=now + self.config.result_ttl_s,
            fingerprint=origin.fingerprint,
            idempotency_key=origin.idempotency_key,
        )
        return self._keep(job, uploads, origin)

    def _keep(self, job: Job, uploads: Sequence[Upload], origin: Origin) -> Job:
        """Inputs first, then the row, so that a job in the database always has its inputs."""
        try:
            for stored, upload in zip(job.inputs, uploads, strict=True):
                self.artifacts.put(stored.key, upload.data)
            self._store.create(job)
        except BaseException as error:
            self.artifacts.delete(job_prefix(job.id))
            if isinstance(error, DuplicateKeyError):  # the same request came in twice at the same time
                earlier = origin.earlier_job(self._store, job.tenant, job.created_at)
                if earlier is not None:
                    return earlier
            if isinstance(error, OSError):
                logger.error("job %s of tenant %s could not be stored: %s", job.id, job.tenant, error)
                raise storage_unavailable() from error
            raise
        logger.info("job %s of tenant %s accepted with %d inputs", job.id, job.tenant, len(job.inputs))
        return job

    def _check_tokens(self, text: str, param: str) -> None:
        limit = self.model.text_encoder.max_tokens
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
            return Upload(param, self.artifacts.read(artifact.key), artifact.content_type)
        except FileNotFoundError as error:
            raise ServeError(
                404, "content_expired", f"video {job.id} is no longer kept; upload the clip instead", param
            ) from error


def _params(order: VideoBody) -> RequestParams:
    return order.params(seed=secrets.randbelow(MAX_DRAWN_SEED))


def _check_id(video_id: str) -> None:
    """What cannot be an id is not looked up: a database may refuse some characters altogether."""
    if not re.fullmatch(JOB_ID_PATTERN, video_id):
        raise video_not_found(video_id)


def _found(job: Job | None, video_id: str) -> Job:
    if job is None:
        raise video_not_found(video_id)
    return job


def _upload_only(media: Upload | VideoReference) -> Upload:
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


def _stored_input(key: str, upload: Upload, info: MediaInfo) -> StoredInput:
    return StoredInput(
        key=key,
        content_type=upload.content_type,
        kind=info.kind,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
    )
