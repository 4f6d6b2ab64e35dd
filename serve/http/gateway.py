"""What the API does, apart from HTTP: accept a job durably, and answer for any job of a tenant.

A plain class; nothing here knows of Ray or of a route. Every method blocks (database, object store,
media), so the routes call it from worker threads.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from serve.config import MAX_STREAMS, ServeConfig
from serve.http.errors import ServeError, video_not_found
from serve.http.events import Cursor, EventStream
from serve.http.forecast import Forecast
from serve.http.idempotency import Origin
from serve.http.intake import Intake, check_model
from serve.http.lookup import check_id, find_job, found
from serve.http.measures import Measures, Unmeasured
from serve.http.media import IncomingMedia
from serve.http.tenants import Tenants
from serve.http.uploads import IncomingBody
from serve.http.views import TenantUsage, usage_view
from serve.http.watch import Watch
from serve.policy.quota import Quota
from serve.store.artifacts import ArtifactStore, StorageError, job_prefix, unfinished_prefixes
from serve.store.job import JobProgress
from serve.store.jobs import Job, JobStore
from serve.traces import NO_TRACES, Traces

logger = logging.getLogger(__name__)

Readiness = Callable[[], Awaitable[Mapping[str, bool]]]
"""Whether each deployment is ready, by its name."""

EVENT_POLL_S = 0.25


class Gateway:
    """One replica of the front; any of them answers for any job.

    Args:
        config: the application's configuration.
        readiness: asks whether the other deployments are up.
        clock: Unix seconds.
        measures: told of what it accepts and refuses.
        traces: where spans of requests go.
    """

    def __init__(
        self,
        config: ServeConfig,
        readiness: Readiness,
        clock: Callable[[], float] = time.time,
        measures: Measures | None = None,
        traces: Traces = NO_TRACES,
    ) -> None:
        self.config = config
        self.measures = measures or Unmeasured()
        self.traces = traces
        self.model = config.load_model()
        self.readiness = readiness
        self.clock = clock
        self.started_at = clock()
        self.artifacts = ArtifactStore(config.resolved_artifacts_url)
        self._store = JobStore(config.resolved_database_url, clock)
        self._store.create_tables()
        self.tenants = Tenants(self._store.tenant_of_key if config.require_keys else None)
        self._forecast = Forecast(self._store, self.model.name, clock)
        self.media = IncomingMedia(config.uploads, on_decoder_failure=self.measures.decoder_failed)
        self._intake = Intake(
            config, self.model, self._store, self.artifacts, self._forecast, self.media, self.measures, traces, clock
        )
        self._watch: Watch[JobProgress] = Watch(
            self._store.progress_of, EVENT_POLL_S, MAX_STREAMS, config.max_event_streams
        )

    def close(self) -> None:
        """Close the database, end the decoders and send the last spans."""
        self.media.close()
        self._store.close()
        self.traces.close()

    def create(self, tenant: str, body: IncomingBody, origin: Origin) -> Job:
        """Accept a new video; see ``Intake.create``."""
        return self._intake.create(tenant, body, origin)

    def extend(self, tenant: str, body: IncomingBody, origin: Origin) -> Job:
        """Accept a video that goes on where another ends; see ``Intake.extend``."""
        return self._intake.extend(tenant, body, origin)

    def get(self, tenant: str, video_id: str) -> Job:
        """A tenant's job.

        Raises:
            ServeError: 404, it does not exist.
        """
        return find_job(self._store, tenant, video_id)

    def page(self, tenant: str, after: str | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """A tenant's jobs by age, and whether there are more."""
        return self._store.page(tenant, after, limit, order)

    def delete(self, tenant: str, video_id: str) -> None:
        """Forget a job and everything of it; one that runs is cancelled.

        Raises:
            ServeError: 404, it does not exist.
        """
        check_id(video_id)
        if not self._store.delete(tenant, video_id):
            raise video_not_found(video_id)
        self._remove(video_id, [job_prefix(video_id)])
        logger.info("job %s of tenant %s deleted", video_id, tenant)

    def cancel(self, tenant: str, video_id: str) -> Job:
        """Stop a job: at once if it is queued, at its next step if it runs.

        Raises:
            ServeError: 404, it does not exist; 409, it has already ended otherwise.
        """
        check_id(video_id)
        job = found(self._store.request_cancel(tenant, video_id), video_id)
        if job.status in ("completed", "failed"):
            raise ServeError(
                409, "already_finished", f"video {job.id} has already {job.status}; DELETE it to remove it", "video_id"
            )
        if job.status == "cancelled":  # at once; a running attempt removes its files when it has stopped
            self._remove(job.id, unfinished_prefixes(job.id))
        return job

    def _remove(self, job_id: str, prefixes: Iterable[str]) -> None:
        for prefix in prefixes:
            try:
                self.artifacts.delete(prefix)
            except StorageError as error:  # the sweeper will
                logger.warning("job %s: its files cannot be removed yet: %s", job_id, error)

    def events(
        self, tenant: str, video_id: str, last_event_id: str | None, authorization: str | None = None
    ) -> EventStream:
        """The job's events from where the client was, as long as its Authorization header is the tenant's.

        Raises:
            ServeError: 404, it does not exist.
        """
        job = self.get(tenant, video_id)
        return EventStream(
            self._watch,
            tenant,
            job,
            Cursor.parse(last_event_id),
            lambda progress: self._forecast.seconds_left(job.request, progress.status, progress.step),
            self.artifacts.read,
            lambda: self.tenants.is_still(tenant, authorization),
        )

    def usage(self, tenant: str, num_days: int) -> TenantUsage:
        """What the tenant has used in the last days, today included, and what its quotas leave."""
        now = self.clock()
        today = datetime.fromtimestamp(now, UTC).date()
        known = self._store.tenant(tenant)
        return usage_view(
            tenant,
            1.0 if known is None else known.weight,
            Quota() if known is None else known.quota,
            self._store.use(tenant, now),
            today.isoformat(),
            self._store.usage(tenant, (today - timedelta(days=num_days - 1)).isoformat()),
        )

    def queue_position(self, job: Job) -> int | None:
        """1 for the job whose turn is next; see ``Forecast.queue_position``."""
        return self._forecast.queue_position(job)

    def seconds_left(self, job: Job) -> float | None:
        """Work that is left on the job; see ``Forecast.seconds_left``."""
        return self._forecast.seconds_left(job.request, job.status, job.step)

    def check_model(self, name: str | None) -> None:
        """Refuse any model but the one that is served; None means that one.

        Raises:
            ServeError: 404.
        """
        check_model(self.model, name)
