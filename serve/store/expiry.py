"""What is to be forgotten: jobs past their time, leftovers of ended jobs, and tenants who leave.

Files go before the row that names them: a removal that stops half way is found again by its row. Only the
columns that this needs are read, so that what another version wrote is forgotten like everything else.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import and_, delete, or_, select, update

from serve.policy.quota import Quota
from serve.store.audit import record
from serve.store.database import Database
from serve.store.job import UNREADABLE
from serve.store.tables import deliveries, identity, jobs, keys, request_counts, tenants, usage
from serve.store.tenants import lock_tenant, new_webhook_secret

FINAL = ("completed", "failed", "cancelled")
NOBODY = ""
"""Whose the jobs of erased tenants are until their files are gone: no tenant can have this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedJob:
    """A job that has ended, as far as its files go."""

    id: str
    published: frozenset[str] | None
    """Keys of what is kept until it expires: what it was given, and what it made. None: its row does not say."""


class Expiry(Database):
    """What the sweeper and the command that erases a tenant ask of the database."""

    def expired_jobs(self, now: float, limit: int, but_not: Collection[str] = ()) -> list[str]:
        """Ended jobs whose time is over, or whose tenant was erased, but not these; longest over first."""
        over = or_(jobs.c.expires_at < now, jobs.c.tenant == NOBODY)
        wanted = and_(jobs.c.status.in_(FINAL), over, jobs.c.id.not_in(list(but_not)))
        query = select(jobs.c.id).where(wanted).order_by(jobs.c.expires_at, jobs.c.id).limit(limit)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def erased_jobs(self, limit: int) -> list[str]:
        """Jobs of erased tenants; all of them have ended."""
        query = select(jobs.c.id).where(jobs.c.tenant == NOBODY, jobs.c.status.in_(FINAL)).limit(limit)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def unswept_jobs(self, ended_before: float, limit: int, but_not: Collection[str] = ()) -> list[EndedJob]:
        """Ended jobs, but not these, whose dead attempts' files nobody has removed yet; longest ended first."""
        ended = and_(jobs.c.status.in_(FINAL), jobs.c.completed_at < ended_before)
        unswept = and_(ended, jobs.c.is_swept.is_(False), jobs.c.id.not_in(list(but_not)))
        query = select(jobs.c.id, jobs.c.inputs, jobs.c.results, jobs.c.preview_key).where(unswept)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(jobs.c.completed_at, jobs.c.id).limit(limit)).mappings().all()
        return [EndedJob(id=row["id"], published=_published(row)) for row in rows]

    def mark_swept(self, job_id: str) -> None:
        """Only what the job publishes is left of its files."""
        with self._writing() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(is_swept=True, checkpoint_key=None))

    def forget(self, job_id: str) -> bool:
        """Remove the row of an ended job; its files are gone already."""
        with self._writing() as connection:
            ended = and_(jobs.c.id == job_id, jobs.c.status.in_(FINAL))
            return connection.execute(delete(jobs).where(ended)).rowcount == 1

    def forget_deliveries(self, ended_before: float) -> int:
        """Remove deliveries that ended before this; returns how many."""
        with self._writing() as connection:
            return connection.execute(delete(deliveries).where(deliveries.c.ended_at < ended_before)).rowcount

    def known(self, job_ids: Collection[str]) -> set[str]:
        """Which of these jobs exist."""
        query = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)))
        with self._engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def identity(self) -> str:
        """The name of this database, the same for ever, backups included."""
        with self._engine.connect() as connection:
            return connection.execute(select(identity.c.id)).scalar_one()

    def erase_tenant(self, name: str, *, actor: str = "operator") -> None:
        """End everything of a tenant, and for good: its keys, usage, deliveries, quotas and secret are gone.

        Its jobs are ended and are ``NOBODY``'s, so that no later tenant of that name sees them;
        ``expired_jobs`` names them until their files are removed and ``forget`` is called. No further job of
        it is accepted, whoever is in the middle of sending one.

        Args:
            name: of the tenant; one that does not exist is erased, too.
            actor: who does this, for the audit log.
        """
        now = self._clock()
        with self._writing(durably=True) as connection:
            lock_tenant(connection, name, now, revive=True)
            unfinished = and_(jobs.c.tenant == name, jobs.c.status.not_in(FINAL))
            ended = {"status": "cancelled", "cancel_requested": True, "completed_at": now, "owner": None}
            num_stopped = connection.execute(update(jobs).where(unfinished).values(ended)).rowcount
            nobodys = {"tenant": NOBODY, "idempotency_key": None, "fingerprint": None, "webhook_url": None}
            connection.execute(update(jobs).where(jobs.c.tenant == name).values(nobodys))
            for table in (keys, usage, request_counts, deliveries):
                connection.execute(delete(table).where(table.c.tenant == name))
            anew = {"weight": 1.0, "virtual_time": 0.0, "webhook_secret": new_webhook_secret(), **asdict(Quota())}
            connection.execute(update(tenants).where(tenants.c.name == name).values(erased_at=now, **anew))
            record(connection, now, actor, "tenant.erase", name, {"jobs_stopped": num_stopped})


def _published(row: Mapping[Any, Any]) -> frozenset[str] | None:
    try:
        keys = {one["key"] for one in [*row["inputs"], *row["results"].values()]}
    except UNREADABLE:  # another version's
        return None
    return frozenset(keys if row["preview_key"] is None else keys | {row["preview_key"]})
