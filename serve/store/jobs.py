"""Jobs as values, and the store that keeps them: the only thing gateways and dispatcher share.

A job is ``queued``, then ``in_progress`` under one *attempt* at a time, then ``completed``, ``failed``
or ``cancelled`` for good. Whoever runs an attempt holds a lease; every write of an attempt is fenced
by its number, so a runner that was thought dead can publish nothing after another has taken over.
"""

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from sqlalchemy import ColumnElement, Row, and_, case, delete, func, insert, select, true, update
from sqlalchemy.exc import IntegrityError

from pusa_dist.request import GenerationRequest
from serve.store import tables
from serve.store.tables import jobs

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Stage = Literal["text", "encode", "denoise", "decode"]
Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredInput:
    """One uploaded image or clip, as kept in the artifact store."""

    key: str
    content_type: str
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
    stage: Stage | None = None
    step: int = 0
    """Denoising steps done, 0..num_steps."""
    started_at: float | None = None
    completed_at: float | None = None
    """When it ended, however it ended."""
    expires_at: float | None = None
    attempt: int = 0
    """Attempts begun; the fencing number of the current one."""
    gang_deaths: int = 0
    cancel_requested: bool = False
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

    @property
    def is_final(self) -> bool:
        """Whether its status can still change."""
        return self.status not in ("queued", "in_progress")


JOB_ID_PATTERN = r"^video_[0-9a-f]{34}$"


class DuplicateKeyError(Exception):
    """The tenant has a job of this idempotency key."""


def new_job_id(created_at: float) -> str:
    """An id that cannot be guessed; ids sort by age, so that one serves as a page's cursor."""
    return f"video_{int(created_at * 1e6):014x}{secrets.token_hex(10)}"


class JobStore:
    """Jobs in a SQL database; safe to use from several threads, processes and machines.

    Methods that take an ``attempt`` return False, and change nothing, when that attempt is no longer
    the one in progress: it was cancelled, deleted, or its lease ran out and another took over.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._engine = tables.open_database(url, synchronous="NORMAL")
        # An acknowledged job must survive a power cut; progress need not.
        self._durable = tables.open_database(url, synchronous="FULL")
        self._clock = clock

    def create_tables(self) -> None:
        """Create what is missing; every process that opens the store may call it."""
        tables.create_tables(self._engine)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()
        self._durable.dispose()

    # Gateway: what a tenant sees and asks.

    def create(self, job: Job) -> None:
        """Keep a new job; when this returns it is on disk.

        Raises:
            DuplicateKeyError: another job of the tenant has its idempotency key.
        """
        try:
            with self._durable.begin() as connection:
                connection.execute(insert(jobs).values(asdict(job)))
        except IntegrityError as error:
            raise DuplicateKeyError(job.idempotency_key) from error

    def get(self, tenant: str, job_id: str) -> Job | None:
        """A tenant's job, or None: another tenant's job does not exist."""
        with self._engine.connect() as connection:
            row = connection.execute(select(jobs).where(_owned(tenant, job_id))).one_or_none()
        return None if row is None else _from_row(row)

    def find_by_key(self, tenant: str, idempotency_key: str) -> Job | None:
        """The tenant's job of this idempotency key."""
        return self._newest(jobs.c.tenant == tenant, jobs.c.idempotency_key == idempotency_key)

    def find_repeat(self, tenant: str, fingerprint: str, since: float) -> Job | None:
        """The tenant's newest job of this fingerprint, created at ``since`` or later."""
        return self._newest(jobs.c.tenant == tenant, jobs.c.fingerprint == fingerprint, jobs.c.created_at >= since)

    def page(self, tenant: str, after: str | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """Up to ``limit`` jobs beyond the id ``after`` by age, and whether there are more.

        The job ``after`` need not exist (any more).
        """
        query = select(jobs).where(jobs.c.tenant == tenant)
        if after is not None:
            query = query.where(jobs.c.id > after if order == "asc" else jobs.c.id < after)
        by_age = jobs.c.id.asc() if order == "asc" else jobs.c.id.desc()
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(by_age).limit(limit + 1)).all()
        return [_from_row(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, tenant: str, job_id: str) -> Job | None:
        """Forget a job; one in progress is thereby cancelled. Its artifacts are the caller's to delete."""
        job = self.get(tenant, job_id)
        with self._durable.begin() as connection:
            found = connection.execute(delete(jobs).where(_owned(tenant, job_id))).rowcount == 1
        return job if found else None

    def request_cancel(self, tenant: str, job_id: str) -> Job | None:
        """Cancel a queued job at once; ask for one in progress; leave a finished one as it is."""
        cancel_now = and_(_owned(tenant, job_id), jobs.c.status == "queued")
        cancel_soon = and_(_owned(tenant, job_id), jobs.c.status == "in_progress")
        with self._durable.begin() as connection:
            now = {"status": "cancelled", "completed_at": self._clock(), "cancel_requested": True}
            if connection.execute(update(jobs).where(cancel_now).values(now)).rowcount == 0:
                connection.execute(update(jobs).where(cancel_soon).values(cancel_requested=True))
        return self.get(tenant, job_id)

    def num_queued_before(self, job: Job) -> int:
        """Queued jobs, of any tenant, that are older than this one."""
        older = select(func.count()).where(jobs.c.status == "queued", jobs.c.created_at < job.created_at)
        with self._engine.connect() as connection:
            return connection.execute(older).scalar_one()

    def counts(self) -> dict[Status, int]:
        """Jobs by status; statuses that no job has are left out."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(jobs.c.status, func.count().label("num")).group_by(jobs.c.status)).all()
        return {row.status: row.num for row in rows}

    # Dispatcher: who runs what.

    def queued(self, limit: int) -> list[Job]:
        """The oldest queued jobs of every tenant."""
        query = select(jobs).where(jobs.c.status == "queued").order_by(jobs.c.created_at, jobs.c.id).limit(limit)
        with self._engine.connect() as connection:
            return [_from_row(row) for row in connection.execute(query)]

    def claim(self, job_id: str, owner: str, lease_s: float) -> Job | None:
        """Begin the next attempt at a queued job; None when somebody else was faster."""
        now = self._clock()
        claimed = {
            "status": "in_progress",
            "attempt": jobs.c.attempt + 1,
            "owner": owner,
            "lease_until": now + lease_s,
            "started_at": func.coalesce(jobs.c.started_at, now),
        }
        queued = and_(jobs.c.id == job_id, jobs.c.status == "queued")
        with self._engine.begin() as connection:
            if connection.execute(update(jobs).where(queued).values(claimed)).rowcount == 0:
                return None
            return _from_row(connection.execute(select(jobs).where(jobs.c.id == job_id)).one())

    def renew(self, owner: str, job_ids: Collection[str], lease_s: float) -> None:
        """Extend the owner's leases of these jobs; what else it claimed runs out, and is queued again."""
        held = and_(jobs.c.owner == owner, jobs.c.id.in_(list(job_ids)), jobs.c.status == "in_progress")
        with self._engine.begin() as connection:
            connection.execute(update(jobs).where(held).values(lease_until=self._clock() + lease_s))

    def expired(self, now: float) -> list[str]:
        """Jobs in progress whose lease has run out."""
        query = select(jobs.c.id).where(jobs.c.status == "in_progress", jobs.c.lease_until < now)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def requeue_expired(self, now: float) -> list[str]:
        """Put jobs whose lease has run out back into the queue; returns those that this call moved."""
        moved = []
        for job_id in self.expired(now):
            stale = and_(jobs.c.id == job_id, jobs.c.status == "in_progress", jobs.c.lease_until < now)
            if self._release(stale, gang_died=False):
                moved.append(job_id)
        return moved

    # Dispatcher: what an attempt reports.

    def progress(self, job_id: str, attempt: int, stage: Stage, step: int, num_steps: int) -> bool:
        """Where the attempt is."""
        return self._report(job_id, attempt, stage=stage, step=step, num_steps=num_steps)

    def complete(
        self, job_id: str, attempt: int, results: Mapping[str, Artifact], seconds: Mapping[str, float]
    ) -> bool:
        """Publish the results; they are final."""
        files = {variant: asdict(artifact) for variant, artifact in results.items()}
        return self._end(job_id, attempt, "completed", stage=None, results=files, seconds=dict(seconds))

    def fail(self, job_id: str, attempt: int, code: str, message: str) -> bool:
        """Give the job up, with a reason its owner will read."""
        return self._end(job_id, attempt, "failed", error_code=code, error_message=message)

    def cancelled(self, job_id: str, attempt: int) -> bool:
        """Confirm that the attempt has stopped because its owner asked."""
        return self._end(job_id, attempt, "cancelled")

    def requeue(self, job_id: str, attempt: int, gang_died: bool) -> bool:
        """Give the attempt up and the job back to the queue (or end it, if its cancellation was asked)."""
        return self._release(_in_progress(job_id, attempt), gang_died)

    def record_precision(self, job_id: str, attempt: int, precision: str) -> bool:
        """What the attempt computes in."""
        return self._report(job_id, attempt, precision=precision)

    def cancel_requests(self, job_ids: Collection[str]) -> set[str]:
        """Which of these jobs must stop: their owner asked, or deleted them."""
        wanted = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), jobs.c.cancel_requested.is_not(true()))
        with self._engine.connect() as connection:
            return set(job_ids) - set(connection.execute(wanted).scalars())

    def _newest(self, *conditions: ColumnElement[bool]) -> Job | None:
        query = select(jobs).where(*conditions).order_by(jobs.c.id.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _from_row(row)

    def _report(self, job_id: str, attempt: int, **values: Any) -> bool:
        with self._engine.begin() as connection:
            result = connection.execute(update(jobs).where(_in_progress(job_id, attempt)).values(values))
            return result.rowcount == 1

    def _end(self, job_id: str, attempt: int, status: Status, **values: Any) -> bool:
        ended = {"status": status, "completed_at": self._clock(), "owner": None, "lease_until": None, **values}
        with self._durable.begin() as connection:
            result = connection.execute(update(jobs).where(_in_progress(job_id, attempt)).values(ended))
            return result.rowcount == 1

    def _release(self, which: ColumnElement[bool], gang_died: bool) -> bool:
        asked_to_stop = jobs.c.cancel_requested.is_(true())
        released = {
            "status": case((asked_to_stop, "cancelled"), else_="queued"),
            "completed_at": case((asked_to_stop, self._clock()), else_=None),
            "gang_deaths": jobs.c.gang_deaths + int(gang_died),
            "stage": None,
            "step": 0,
            "owner": None,
            "lease_until": None,
        }
        with self._durable.begin() as connection:
            return connection.execute(update(jobs).where(which).values(released)).rowcount == 1


def _owned(tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _in_progress(job_id: str, attempt: int) -> ColumnElement[bool]:
    return and_(jobs.c.id == job_id, jobs.c.attempt == attempt, jobs.c.status == "in_progress")


def _from_row(row: Row[Any]) -> Job:
    values = {item.name: getattr(row, item.name) for item in fields(Job)}
    values["request"] = GenerationRequest.from_dict(values["request"])
    values["inputs"] = tuple(StoredInput(**one) for one in values["inputs"])
    values["results"] = {variant: Artifact(**one) for variant, one in values["results"].items()}
    return Job(**values)
