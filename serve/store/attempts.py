"""Who runs what, and what an attempt reports: the dispatcher's side of the jobs.

Whoever runs an attempt holds a lease; every write of an attempt is fenced by its number, so a runner that
was thought dead can publish nothing after another has taken over.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, ScalarSelect, and_, case, func, literal, select, true, update

from serve.policy.fairness import Waiting
from serve.policy.priority import Priority
from serve.store.database import Database
from serve.store.deliveries import owe_delivery
from serve.store.job import UNREADABLE, Artifact, Job, Stage, Status, job_from_row
from serve.store.tables import jobs, tenants
from serve.store.tenants import UnknownTenantError, lock_tenant
from serve.store.usage import count


class UnreadableJobError(Exception):
    """A job whose row a process of this version cannot read."""

    def __init__(self, attempt: int, created_at: float, priority: Priority) -> None:
        super().__init__(attempt, created_at, priority)
        self.attempt = attempt
        self.created_at = created_at
        self.priority: Priority = priority


class Attempts(Database):
    """Jobs on their way from queued to an end.

    Methods that take an ``attempt`` return False, and change nothing, when that attempt is no longer
    the one in progress: it was cancelled, deleted, or its lease ran out and another took over.
    """

    def queued(self, model: str, limit_per_tenant: int) -> list[Job]:
        """The oldest queued jobs of every tenant and priority class, so that no long queue hides anybody's.

        Args:
            model: jobs of this model only.
            limit_per_tenant: at most this many of each tenant's interactive, and of its batch jobs.

        Returns:
            Oldest first.
        """
        query = select(jobs).where(_oldest(model, limit_per_tenant))
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(jobs.c.created_at, jobs.c.id)).mappings()
            return [job_from_row(row) for row in rows]

    def waiting(self, model: str, limit_per_tenant: int, but_not: Collection[str] = ()) -> list[Waiting]:
        """What the order of the jobs in ``queued`` depends on, without the jobs themselves.

        Args:
            model: see ``queued``.
            limit_per_tenant: see ``queued``.
            but_not: jobs that are looked past.
        """
        query = select(
            jobs.c.id, jobs.c.tenant, jobs.c.priority, jobs.c.created_at, jobs.c.cost, jobs.c.checkpoint_step
        ).where(_oldest(model, limit_per_tenant, but_not))
        with self._engine.connect() as connection:
            return [
                Waiting(
                    id=row.id,
                    tenant=row.tenant,
                    priority=row.priority,
                    created_at=row.created_at,
                    cost=row.cost,
                    is_started=bool(row.checkpoint_step),
                )
                for row in connection.execute(query)
            ]

    def overdue(self, created_before: float, limit: int) -> list[str]:
        """The oldest jobs, of any model, that were created before then and are still queued."""
        query = select(jobs.c.id).where(jobs.c.status == "queued", jobs.c.created_at < created_before)
        with self._engine.connect() as connection:
            return list(connection.execute(query.order_by(jobs.c.created_at).limit(limit)).scalars())

    def room(self) -> dict[str, int]:
        """How many jobs of a tenant may begin beside those in progress, of every tenant with such a limit."""
        limited = select(tenants.c.name, tenants.c.max_running - _num_running(tenants.c.name)).where(
            tenants.c.max_running.is_not(None)
        )
        with self._engine.connect() as connection:
            return {tenant: max(0, num) for tenant, num in connection.execute(limited)}

    def claim(self, job_id: str, owner: str, lease_s: float, *, to_fail: bool = False) -> Job | None:
        """Begin the next attempt at a queued job; None when somebody else was faster, or its tenant runs all it may.

        The attempt continues from the job's checkpoint, if it has one: ``step`` is the checkpoint's.

        Args:
            job_id: of the job.
            owner: who runs the attempt.
            lease_s: for how long without renewing.
            to_fail: the attempt is begun for failing the job, whatever its row says and its tenant runs.

        Raises:
            UnreadableJobError: its row says nothing that this version can run. It stays queued, because another
                version on this store may read it; with ``to_fail`` the attempt has begun.
        """
        now = self._clock()
        claimed = {
            "status": "in_progress",
            "attempt": jobs.c.attempt + 1,
            "owner": owner,
            "lease_until": now + lease_s,
            "started_at": func.coalesce(jobs.c.started_at, now),
        }
        queued = and_(jobs.c.id == job_id, jobs.c.status == "queued")
        with self._writing() as connection:
            if not to_fail and not _has_room(connection, job_id, now):
                return None
            if connection.execute(update(jobs).where(queued).values(claimed)).rowcount == 0:
                return None
            try:
                return job_from_row(connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one())
            except UNREADABLE as error:
                known = select(jobs.c.attempt, jobs.c.created_at, jobs.c.priority).where(jobs.c.id == job_id)
                unreadable = UnreadableJobError(*connection.execute(known).one())
                unreadable.__cause__ = error
                if not to_fail:
                    raise unreadable  # noqa: B904 - it has its cause; the transaction is undone
        raise unreadable

    def renew(self, owner: str, job_ids: Collection[str], lease_s: float) -> None:
        """Extend the owner's leases of these jobs; what else it claimed runs out, and is queued again."""
        held = and_(jobs.c.owner == owner, jobs.c.id.in_(list(job_ids)), jobs.c.status == "in_progress")
        with self._writing() as connection:
            connection.execute(update(jobs).where(held).values(lease_until=self._clock() + lease_s))

    def expired(self, now: float) -> list[str]:
        """Jobs in progress whose lease has run out."""
        query = select(jobs.c.id).where(jobs.c.status == "in_progress", jobs.c.lease_until < now)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def requeue_expired(self, now: float) -> dict[str, Status]:
        """As ``requeue``, for jobs whose lease has run out; returns those that this call moved, and where to."""
        moved = dict[str, Status]()
        for job_id in self.expired(now):
            stale = and_(jobs.c.id == job_id, jobs.c.status == "in_progress", jobs.c.lease_until < now)
            if (status := self._release(job_id, stale, gang_died=False)) is not None:
                moved[job_id] = status
        return moved

    def requeue(self, job_id: str, attempt: int, gang_died: bool) -> Status | None:
        """Give the attempt up and the job back to the queue (or end it, if its cancellation was asked).

        Its checkpoint stays, and is where the next attempt begins.

        Returns:
            ``queued``, ``cancelled``, or None where other methods return False.
        """
        return self._release(job_id, _in_progress(job_id, attempt), gang_died)

    def progress(self, job_id: str, attempt: int, stage: Stage, step: int, num_steps: int) -> bool:
        """Where the attempt is.

        ``step`` only grows, whatever order reports come in, and ``steps_run`` with it; an attempt that continues
        from a checkpoint must not report fewer steps than are done in it.
        """
        reached = _at_least(jobs.c.step, step)
        return self._report(
            job_id,
            attempt,
            stage=stage,
            step=reached,
            num_steps=num_steps,
            steps_run=jobs.c.steps_run + reached - jobs.c.step,
            furthest_step=_at_least(jobs.c.furthest_step, step),
        )

    def checkpoint(self, job_id: str, attempt: int, key: str, step: int) -> bool:
        """Publish a checkpoint: from now on the next attempt begins there."""
        return self._report(job_id, attempt, checkpoint_key=key, checkpoint_step=step)

    def forget_checkpoint(self, job_id: str, attempt: int) -> bool:
        """Withdraw a checkpoint that cannot be continued from: the attempt begins at the first step."""
        return self._report(job_id, attempt, checkpoint_key=None, checkpoint_step=None, step=0)

    def preview(self, job_id: str, attempt: int, step: int, key: str) -> bool:
        """Publish a preview of what there is after ``step`` steps."""
        return self._report(job_id, attempt, preview_step=step, preview_key=key)

    def record_precision(self, job_id: str, attempt: int, precision: str) -> bool:
        """What the attempt computes in."""
        return self._report(job_id, attempt, precision=precision)

    def complete(
        self, job_id: str, attempt: int, results: Mapping[str, Artifact], seconds: Mapping[str, float]
    ) -> bool:
        """Publish the results; they are final."""
        files = {variant: asdict(artifact) for variant, artifact in results.items()}
        return self._end(
            job_id,
            attempt,
            "completed",
            stage=None,
            results=files,
            seconds=dict(seconds),
            step=jobs.c.num_steps,
            steps_run=jobs.c.steps_run + jobs.c.num_steps - jobs.c.step,
            furthest_step=jobs.c.num_steps,
        )

    def fail(self, job_id: str, attempt: int, code: str, message: str) -> bool:
        """Give the job up, with a reason its owner will read."""
        return self._end(job_id, attempt, "failed", error_code=code, error_message=message)

    def cancelled(self, job_id: str, attempt: int) -> bool:
        """Confirm that the attempt has stopped because its owner asked."""
        return self._end(job_id, attempt, "cancelled")

    def cancel_requests(self, job_ids: Collection[str]) -> set[str]:
        """Which of these jobs must stop: their owner asked, or deleted them."""
        wanted = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), jobs.c.cancel_requested.is_not(true()))
        with self._engine.connect() as connection:
            return set(job_ids) - set(connection.execute(wanted).scalars())

    def _report(self, job_id: str, attempt: int, **values: Any) -> bool:
        with self._writing() as connection:
            result = connection.execute(update(jobs).where(_in_progress(job_id, attempt)).values(values))
            return result.rowcount == 1

    def _end(self, job_id: str, attempt: int, status: Status, **values: Any) -> bool:
        now = self._clock()
        ended = {"status": status, "completed_at": now, "owner": None, "lease_until": None, **values}
        with self._writing(durably=True) as connection:
            if connection.execute(update(jobs).where(_in_progress(job_id, attempt)).values(ended)).rowcount == 0:
                return False
            owe_delivery(connection, job_id, now)
            if status == "completed":
                _count_video(connection, job_id, now)
        return True

    def _release(self, job_id: str, which: ColumnElement[bool], gang_died: bool) -> Status | None:
        now = self._clock()
        asked_to_stop = jobs.c.cancel_requested.is_(true())
        released = {
            "status": case((asked_to_stop, "cancelled"), else_="queued"),
            "completed_at": case((asked_to_stop, now), else_=None),
            "gang_deaths": jobs.c.gang_deaths + int(gang_died),
            "stage": None,
            "step": func.coalesce(jobs.c.checkpoint_step, 0),
            "owner": None,
            "lease_until": None,
        }
        with self._writing(durably=True) as connection:
            if connection.execute(update(jobs).where(which).values(released)).rowcount == 0:
                return None
            status: Status = connection.execute(select(jobs.c.status).where(jobs.c.id == job_id)).scalar_one()
            if status == "cancelled":
                owe_delivery(connection, job_id, now)
        return status


def _oldest(model: str, limit_per_tenant: int, but_not: Collection[str] = ()) -> ColumnElement[bool]:
    place = func.row_number().over(
        partition_by=(jobs.c.tenant, jobs.c.priority), order_by=(jobs.c.created_at, jobs.c.id)
    )
    ranked = select(jobs.c.id, place.label("place")).where(
        jobs.c.status == "queued", jobs.c.model == model, jobs.c.id.not_in(list(but_not))
    )
    places = ranked.subquery()
    return jobs.c.id.in_(select(places.c.id).where(places.c.place <= limit_per_tenant))


def _at_least(column: ColumnElement[int], value: int) -> ColumnElement[int]:
    return case((column < value, value), else_=column)


def _num_running(tenant: ColumnElement[str]) -> ScalarSelect[int]:
    return (
        select(func.count()).where(jobs.c.tenant == tenant, jobs.c.status == "in_progress").correlate(tenants)
    ).scalar_subquery()


def _has_room(connection: Connection, job_id: str, now: float) -> bool:
    """Whether one more job of this one's tenant may be in progress; if it may, until the transaction ends."""
    limit = select(tenants.c.name, tenants.c.max_running).join(jobs, jobs.c.tenant == tenants.c.name)
    row = connection.execute(limit.where(jobs.c.id == job_id, tenants.c.max_running.is_not(None))).one_or_none()
    if row is None:
        return True
    try:
        lock_tenant(connection, row.name, now)
    except UnknownTenantError:
        return False
    return connection.execute(select(_num_running(literal(row.name)))).scalar_one() < row.max_running


def _in_progress(job_id: str, attempt: int) -> ColumnElement[bool]:
    return and_(jobs.c.id == job_id, jobs.c.attempt == attempt, jobs.c.status == "in_progress")


def _count_video(connection: Connection, job_id: str, now: float) -> None:
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
    job = job_from_row(row)
    count(connection, job.tenant, now, completed=1, video_seconds=job.request.num_frames / job.request.fps)
