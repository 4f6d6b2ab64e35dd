"""The outbox of webhooks: a delivery is written in the transaction that ends its job, or neither is.

Whoever delivers claims first. A claim holds for a while and counts an attempt, whose number fences what
is written afterwards, so that several processes may deliver and a dead one's delivery is tried again:
at least once, always under the same id.
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, Row, and_, func, insert, select, update

from serve.store.database import Database
from serve.store.job import Status
from serve.store.tables import deliveries, jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message that is owed to a tenant."""

    id: str
    """Sent as ``webhook-id``, the same at every attempt."""
    job_id: str
    tenant: str
    url: str
    outcome: Status
    """How the job ended."""
    created_at: float
    """When it ended, in Unix seconds."""
    attempts: int
    """Attempts begun; the fencing number of the current one."""
    next_at: float
    """When it may be claimed (again)."""


class Deliveries(Database):
    """Rows of deliveries."""

    def due_deliveries(self, now: float, limit: int, but_not: Collection[str] = ()) -> list[Delivery]:
        """What may be delivered now, but not to these tenants: of each the longest due, then of each the next."""
        due = and_(
            deliveries.c.state == "waiting", deliveries.c.next_at <= now, deliveries.c.tenant.not_in(list(but_not))
        )
        by_age = deliveries.c.next_at, deliveries.c.id
        place = func.row_number().over(partition_by=deliveries.c.tenant, order_by=by_age)
        query = select(deliveries).where(due).order_by(place, *by_age).limit(limit)
        with self._engine.connect() as connection:
            return [_from_row(row) for row in connection.execute(query)]

    def claim_delivery(self, delivery_id: str, now: float, lease_s: float) -> Delivery | None:
        """Begin the next attempt; None: somebody else was faster, or it is not due."""
        due = and_(deliveries.c.id == delivery_id, deliveries.c.state == "waiting", deliveries.c.next_at <= now)
        begun = {"attempts": deliveries.c.attempts + 1, "next_at": now + lease_s}
        with self._writing() as connection:
            if connection.execute(update(deliveries).where(due).values(begun)).rowcount == 0:
                return None
            return _from_row(connection.execute(select(deliveries).where(deliveries.c.id == delivery_id)).one())

    def delivered(self, delivery_id: str, attempt: int) -> bool:
        """The receiver has it. False, here and below: another attempt has begun, or the tenant is gone."""
        return self._set(delivery_id, attempt, state="delivered", ended_at=self._clock(), last_error=None)

    def postpone(self, delivery_id: str, attempt: int, next_at: float, error: str) -> bool:
        """The attempt failed; try again at ``next_at``."""
        return self._set(delivery_id, attempt, next_at=next_at, last_error=error)

    def give_up(self, delivery_id: str, attempt: int, error: str) -> bool:
        """The attempt failed, and there will be no other."""
        return self._set(delivery_id, attempt, state="given_up", ended_at=self._clock(), last_error=error)

    def _set(self, delivery_id: str, attempt: int, **values: object) -> bool:
        current = and_(
            deliveries.c.id == delivery_id, deliveries.c.attempts == attempt, deliveries.c.state == "waiting"
        )
        with self._writing() as connection:
            return connection.execute(update(deliveries).where(current).values(values)).rowcount == 1


def owe_delivery(connection: Connection, job_id: str, now: float) -> None:
    """Write the delivery of a job that this transaction has ended, if anybody asked to be told."""
    ended = select(jobs.c.tenant, jobs.c.webhook_url, jobs.c.status).where(
        jobs.c.id == job_id, jobs.c.webhook_url.is_not(None)
    )
    row = connection.execute(ended).one_or_none()
    if row is None:
        return
    values = {
        "id": f"evt_{secrets.token_hex(16)}",
        "job_id": job_id,
        "tenant": row.tenant,
        "url": row.webhook_url,
        "outcome": row.status,
        "created_at": now,
        "attempts": 0,
        "next_at": now,
        "state": "waiting",
    }
    connection.execute(insert(deliveries).values(values))


def _from_row(row: Row[tuple[object, ...]]) -> Delivery:
    return Delivery(
        id=row.id,
        job_id=row.job_id,
        tenant=row.tenant,
        url=row.url,
        outcome=row.outcome,
        created_at=row.created_at,
        attempts=row.attempts,
        next_at=row.next_at,
    )
