"""The job store, the only thing that gateways and dispatcher share; here, what a tenant sees and asks of it.

A job is ``queued``, then ``in_progress`` under one *attempt* at a time, then ``completed``, ``failed``
or ``cancelled`` for good.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields, replace
from typing import Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, case, delete, func, insert, select, true, update
from sqlalchemy.exc import IntegrityError

from serve.policy.cost import Backlog
from serve.policy.quota import Quota, Refusal, Use, check, day_of, minute_of
from serve.store.attempts import Attempts
from serve.store.audit import AuditLog
from serve.store.deliveries import Deliveries, owe_delivery
from serve.store.expiry import Expiry
from serve.store.job import (
    JOB_ID_PATTERN,
    Artifact,
    Job,
    JobProgress,
    Stage,
    Status,
    StoredInput,
    UnreadableRowError,
    job_from_row,
    new_job_id,
)
from serve.store.keys import Keys
from serve.store.tables import jobs, request_counts, usage
from serve.store.tenants import Tenants, UnknownTenantError, lock_tenant
from serve.store.usage import UsageLedger, count, count_request

__all__ = [
    "JOB_ID_PATTERN",
    "Artifact",
    "DuplicateKeyError",
    "Job",
    "JobProgress",
    "JobStore",
    "QuotaExceededError",
    "Stage",
    "Status",
    "StoredInput",
    "UnknownTenantError",
    "UnreadableRowError",
    "new_job_id",
]

logger = logging.getLogger(__name__)

_UNLIMITED = Quota()


class DuplicateKeyError(Exception):
    """The tenant has a job of this idempotency key, or the request has made its job already."""


class QuotaExceededError(Exception):
    """The tenant may not have this job, or not now; ``refusal`` says what to answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class JobStore(Attempts, Tenants, Keys, UsageLedger, Deliveries, Expiry, AuditLog):
    """Jobs, and all that is kept with them, in a SQL database.

    Safe to use from several threads, processes and machines. What is not here is in the bases, one
    concern each.
    """

    def ask(self, tenant: str, quota: Quota) -> None:
        """Count that a tenant asks for a job, whatever becomes of it, and refuse what is over quota as it stands.

        For before anything expensive is done for the job; ``create`` has the last word. A tenant without limits
        is not counted.

        Raises:
            QuotaExceededError: over quota, whatever the job holds.
            UnknownTenantError: the tenant was erased.
        """
        if quota == _UNLIMITED:
            return
        now = self._clock()
        with self._writing() as connection:
            lock_tenant(connection, tenant, now)
            use = _use(connection, tenant, now)
            count_request(connection, tenant, now)
        refusal = check(quota, use, cost=0.0, num_tokens=0, now=now)
        if refusal is not None:
            raise QuotaExceededError(refusal)

    def create(self, job: Job, quota: Quota = _UNLIMITED, *, repeats_since: float | None = None) -> None:
        """Keep a new job, if the tenant may have it; when this returns it is on disk.

        Jobs of a tenant are accepted one after the other, so that no two take the last place, and a
        request that is sent again while the first is still being looked at makes one job.

        Args:
            job: new, its tenant's.
            quota: the tenant's limits.
            repeats_since: refuse the job if ``find_repeat`` finds one since then; None: do not look. A job that
                has an idempotency key is compared by that alone.

        Raises:
            DuplicateKeyError: another job of the tenant has its idempotency key, or is the same request's.
            QuotaExceededError: over quota; nothing was kept. The requests of a minute are ``ask``'s to look at.
            UnknownTenantError: the tenant was erased.
        """
        now = self._clock()
        with self._writing(durably=True) as connection:
            lock_tenant(connection, job.tenant, now)
            # Before the quota is looked at: a request that came twice is told of its job, not of a limit.
            _refuse_repeat(connection, job, repeats_since)
            refusal = None
            if quota != _UNLIMITED:
                use = _use(connection, job.tenant, now)
                others = replace(quota, requests_per_minute=None)
                refusal = check(others, use, cost=job.cost, num_tokens=job.request.num_tokens, now=now)
            if refusal is None:
                _insert(connection, job)
                count(connection, job.tenant, now, requests=1)
        if refusal is not None:
            raise QuotaExceededError(refusal)

    def get(self, tenant: str, job_id: str) -> Job | None:
        """A tenant's job, or None: another tenant's job does not exist.

        Raises:
            UnreadableRowError: another version wrote it.
        """
        with self._engine.connect() as connection:
            row = connection.execute(select(jobs).where(_owned(tenant, job_id))).mappings().one_or_none()
        return None if row is None else job_from_row(row)

    def progress_of(self, job_ids: Collection[str]) -> dict[str, JobProgress]:
        """How far these jobs are, by id; those that do not exist (any more) are left out."""
        columns = [jobs.c[item.name] for item in fields(JobProgress)]
        with self._engine.connect() as connection:
            rows = connection.execute(select(*columns).where(jobs.c.id.in_(list(job_ids)))).mappings()
            return {row["id"]: JobProgress(**row) for row in rows}

    def find_by_key(self, tenant: str, idempotency_key: str) -> Job | None:
        """The tenant's job of this idempotency key."""
        return self._newest(jobs.c.tenant == tenant, jobs.c.idempotency_key == idempotency_key)

    def find_repeat(self, tenant: str, fingerprint: str, since: float, *, only_retries: bool = False) -> Job | None:
        """The tenant's newest job of this fingerprint, created at ``since`` or later.

        Args:
            tenant: whose.
            fingerprint: of the request.
            since: Unix seconds.
            only_retries: whether to look only among jobs that a request made which had been sent again. That is
                how a first request, overtaken by its own repetition, finds the job it has already made.
        """
        return self._newest(_repeats(tenant, fingerprint, since, only_retries=only_retries))

    def use(self, tenant: str, now: float) -> Use:
        """What the tenant uses of its quota."""
        with self._engine.connect() as connection:
            return _use(connection, tenant, now)

    def page(self, tenant: str, after: str | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """Up to ``limit`` jobs beyond the id ``after`` by age, and whether there are more.

        The job ``after`` need not exist (any more). Jobs that another version wrote, and this one cannot read,
        are left out.
        """
        found: list[Job] = []
        with self._engine.connect() as connection:
            for row in _by_age(connection, tenant, after, limit + 1, order):
                try:
                    found.append(job_from_row(row))
                except UnreadableRowError:
                    logger.warning("job %s: its row cannot be read, and it is left out of a list", row["id"])
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def delete(self, tenant: str, job_id: str) -> bool:
        """Forget a job, if there is one, whichever version wrote it; its artifacts are the caller's to delete.

        One in progress is thereby cancelled.
        """
        with self._writing(durably=True) as connection:
            return connection.execute(delete(jobs).where(_owned(tenant, job_id))).rowcount == 1

    def request_cancel(self, tenant: str, job_id: str) -> Job | None:
        """Cancel a queued job at once; ask for one in progress; leave a finished one as it is.

        Raises:
            UnreadableRowError: another version wrote it; its cancellation is asked for all the same.
        """
        now = self._clock()
        live = and_(_owned(tenant, job_id), jobs.c.status.in_(("queued", "in_progress")))
        # One statement for both: between two, a job may be put back in the queue, and neither would find it.
        is_queued = jobs.c.status == "queued"
        stopped = {
            "status": case((is_queued, "cancelled"), else_=jobs.c.status),
            "completed_at": case((is_queued, now), else_=jobs.c.completed_at),
            "cancel_requested": True,
        }
        with self._writing(durably=True) as connection:
            if connection.execute(update(jobs).where(live).values(stopped)).rowcount == 1:
                status = connection.execute(select(jobs.c.status).where(jobs.c.id == job_id)).scalar_one()
                if status == "cancelled":
                    owe_delivery(connection, job_id, now)
        return self.get(tenant, job_id)

    def counts(self) -> dict[Status, int]:
        """Jobs by status; statuses that no job has are left out."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(jobs.c.status, func.count().label("num")).group_by(jobs.c.status)).all()
        return {row.status: row.num for row in rows}

    def backlog(self, model: str) -> list[Backlog]:
        """What every tenant has unfinished of a model, by status and class; jobs that have ended cost nothing."""
        query = (
            select(
                jobs.c.tenant,
                jobs.c.status,
                jobs.c.priority,
                func.count().label("num"),
                func.sum(_cost_left()).label("cost"),
                func.sum(jobs.c.cost).label("whole"),
                func.min(jobs.c.created_at).label("oldest"),
            )
            .where(jobs.c.status.in_(("queued", "in_progress")), jobs.c.model == model)
            .group_by(jobs.c.tenant, jobs.c.status, jobs.c.priority)
        )
        now = self._clock()
        with self._engine.connect() as connection:
            return [
                Backlog(
                    tenant=row.tenant,
                    status=row.status,
                    priority=row.priority,
                    num=row.num,
                    cost=row.cost,
                    whole=row.whole,
                    oldest_s=now - row.oldest,
                )
                for row in connection.execute(query)
            ]

    def _newest(self, *conditions: ColumnElement[bool]) -> Job | None:
        query = select(jobs).where(*conditions).order_by(jobs.c.id.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else job_from_row(row)


def _by_age(
    connection: Connection, tenant: str, after: str | None, num_rows: int, order: Literal["asc", "desc"]
) -> Iterator[RowMapping]:
    """Rows of the tenant's jobs beyond ``after``, read ``num_rows`` at a time as far as they are wanted."""
    query = select(jobs).where(jobs.c.tenant == tenant)
    query = query.order_by(jobs.c.id.asc() if order == "asc" else jobs.c.id.desc()).limit(num_rows)
    while True:
        beyond = true() if after is None else jobs.c.id > after if order == "asc" else jobs.c.id < after
        rows = connection.execute(query.where(beyond)).mappings().all()
        yield from rows
        if len(rows) < num_rows:
            return
        after = rows[-1]["id"]


def _cost_left() -> ColumnElement[float]:
    return jobs.c.cost * (1.0 - 1.0 * jobs.c.step / jobs.c.num_steps)


def _owned(tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _repeats(tenant: str, fingerprint: str, since: float, *, only_retries: bool) -> ColumnElement[bool]:
    same = and_(jobs.c.tenant == tenant, jobs.c.fingerprint == fingerprint, jobs.c.created_at >= since)
    return and_(same, jobs.c.is_retry.is_(true())) if only_retries else same


def _refuse_repeat(connection: Connection, job: Job, since: float | None) -> None:
    if job.idempotency_key is not None:
        same = and_(jobs.c.tenant == job.tenant, jobs.c.idempotency_key == job.idempotency_key)
    elif since is not None and job.fingerprint is not None:
        same = _repeats(job.tenant, job.fingerprint, since, only_retries=not job.is_retry)
    else:
        return
    if connection.execute(select(jobs.c.id).where(same)).first() is not None:
        raise DuplicateKeyError(job.idempotency_key)


def _insert(connection: Connection, job: Job) -> None:
    try:
        connection.execute(insert(jobs).values(asdict(job)))
    except IntegrityError as error:  # by a process of the version before, which does not lock the tenant
        raise DuplicateKeyError(job.idempotency_key) from error


def _use(connection: Connection, tenant: str, now: float) -> Use:
    requests = select(request_counts.c.requests).where(
        request_counts.c.tenant == tenant, request_counts.c.minute == minute_of(now)
    )
    num_queued = select(func.count()).where(jobs.c.tenant == tenant, jobs.c.status == "queued")
    cost_left = select(func.sum(_cost_left())).where(
        jobs.c.tenant == tenant, jobs.c.status.in_(("queued", "in_progress"))
    )
    cost_today = select(usage.c.cost).where(usage.c.tenant == tenant, usage.c.day == day_of(now))
    return Use(
        requests=connection.execute(requests).scalar() or 0,
        queued=connection.execute(num_queued).scalar_one(),
        cost=(connection.execute(cost_today).scalar() or 0.0) + (connection.execute(cost_left).scalar() or 0.0),
    )
