"""What tenants have used, the fair-share ledger that orders them by it, and what a step was seen to take."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, select, update

from serve.policy.cost import StepShape
from serve.policy.fairness import Standing
from serve.policy.quota import day_of, minute_of
from serve.store.database import Database, upsert
from serve.store.tables import jobs, request_counts, step_seconds, tenants, usage
from serve.store.tenants import UnknownTenantError, lock_tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a tenant used on one day."""

    day: str
    """In UTC, as 2026-11-20."""
    requests: int = 0
    """Jobs accepted."""
    completed: int = 0
    """Jobs that ended with a video."""
    cost: float = 0.0
    """Gang-seconds delivered."""
    video_seconds: float = 0.0
    """Length of those videos."""


class UsageLedger(Database):
    """Counters a day and tenant, and the virtual time of every tenant."""

    def usage(self, tenant: str, since_day: str) -> list[Usage]:
        """What the tenant used a day, oldest first; days without any use are left out.

        Args:
            tenant: its name.
            since_day: the first day wanted, as 2026-11-20.
        """
        query = select(usage).where(usage.c.tenant == tenant, usage.c.day >= since_day).order_by(usage.c.day)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [
            Usage(
                day=row.day,
                requests=row.requests,
                completed=row.completed,
                cost=row.cost,
                video_seconds=row.video_seconds,
            )
            for row in rows
        ]

    def standings(self) -> dict[str, Standing]:
        """Weight and virtual time of every tenant, busy or not."""
        known = select(tenants.c.name, tenants.c.weight, tenants.c.virtual_time).where(tenants.c.erased_at.is_(None))
        # A process of the version before accepts jobs without making the tenant's row.
        active = select(jobs.c.tenant).where(jobs.c.status.in_(("queued", "in_progress"))).distinct()
        with self._engine.connect() as connection:
            of_active = {
                tenant: Standing(weight=1.0, virtual_time=0.0) for tenant in connection.execute(active).scalars()
            }
            rows = connection.execute(known).all()
        return of_active | {row.name: Standing(weight=row.weight, virtual_time=row.virtual_time) for row in rows}

    def activate(self, tenant: str, at_least: float) -> None:
        """Move a tenant that was idle up to a virtual time, if it is below."""
        with self._writing() as connection:
            if _still_there(connection, tenant, self._clock()):
                below = (tenants.c.name == tenant) & (tenants.c.virtual_time < at_least)
                connection.execute(update(tenants).where(below).values(virtual_time=at_least))

    def charge(self, tenant: str, cost: float) -> None:
        """Put delivered gang-seconds on a tenant's account; a negative cost gives some back."""
        with self._writing() as connection:
            if _still_there(connection, tenant, self._clock()):
                virtual_time = tenants.c.virtual_time + cost / tenants.c.weight
                connection.execute(update(tenants).where(tenants.c.name == tenant).values(virtual_time=virtual_time))
                count(connection, tenant, self._clock(), cost=cost)

    def step_seconds(self, model: str) -> dict[StepShape, float]:
        """Measured seconds of a step, by shape."""
        query = select(step_seconds).where(step_seconds.c.model == model)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return {StepShape(num_tokens=row.num_tokens, uses_guidance=row.uses_guidance): row.seconds for row in rows}

    def record_step_seconds(self, model: str, seconds: Mapping[StepShape, float]) -> None:
        """Keep what steps of these shapes were measured to take."""
        with self._writing() as connection:
            # In one order everywhere, so that two writers cannot hold what the other waits for.
            for shape in sorted(seconds, key=lambda shape: (shape.num_tokens, shape.uses_guidance)):
                new = upsert(connection, step_seconds).values(
                    model=model,
                    num_tokens=shape.num_tokens,
                    uses_guidance=shape.uses_guidance,
                    seconds=seconds[shape],
                )
                connection.execute(
                    new.on_conflict_do_update(
                        index_elements=["model", "num_tokens", "uses_guidance"],
                        set_={"seconds": new.excluded.seconds},
                    )
                )


def count(
    connection: Connection,
    tenant: str,
    now: float,
    *,
    requests: int = 0,
    completed: int = 0,
    cost: float = 0.0,
    video_seconds: float = 0.0,
) -> None:
    """Add to what the tenant used today, in the transaction of what is counted."""
    new = upsert(connection, usage).values(
        tenant=tenant,
        day=day_of(now),
        requests=requests,
        completed=completed,
        cost=cost,
        video_seconds=video_seconds,
    )
    added = {name: usage.c[name] + new.excluded[name] for name in ("requests", "completed", "cost", "video_seconds")}
    connection.execute(new.on_conflict_do_update(index_elements=["tenant", "day"], set_=added))


def count_request(connection: Connection, tenant: str, now: float) -> None:
    """Count a job that was asked for in its minute, and forget the minutes that no longer matter."""
    minute = minute_of(now)
    old = (request_counts.c.tenant == tenant) & (request_counts.c.minute < minute - 1)
    connection.execute(delete(request_counts).where(old))
    new = upsert(connection, request_counts).values(tenant=tenant, minute=minute, requests=1)
    connection.execute(
        new.on_conflict_do_update(index_elements=["tenant", "minute"], set_={"requests": request_counts.c.requests + 1})
    )


def _still_there(connection: Connection, tenant: str, now: float) -> bool:
    """Lock the tenant; False: it was erased, and nothing of it is written any more."""
    try:
        lock_tenant(connection, tenant, now)
    except UnknownTenantError:
        return False
    return True
