"""Who changed keys, tenants and quotas, when, and to what: written with the change, or neither is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select

from serve.store.database import Database
from serve.store.tables import audit


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change."""

    at: float
    """Unix seconds."""
    actor: str
    action: str
    tenant: str | None
    detail: Mapping[str, Any]


class AuditLog(Database):
    """The changes, kept for good: erasing a tenant leaves that it was erased."""

    def audit(self, tenant: str | None = None, limit: int = 1000) -> list[AuditEntry]:
        """The newest changes, of one tenant or of all, oldest first."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(audit.c.tenant == tenant)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [
            AuditEntry(at=row.at, actor=row.actor, action=row.action, tenant=row.tenant, detail=row.detail)
            for row in reversed(rows)
        ]

    def record(self, actor: str, action: str, tenant: str | None, detail: Mapping[str, Any]) -> None:
        """Write down a change that is none of a row here."""
        with self._writing(durably=True) as connection:
            record(connection, self._clock(), actor, action, tenant, detail)


def record(
    connection: Connection, now: float, actor: str, action: str, tenant: str | None, detail: Mapping[str, Any]
) -> None:
    """Write a change down in the transaction that makes it."""
    values = {"at": now, "actor": actor, "action": action, "tenant": tenant, "detail": dict(detail)}
    connection.execute(insert(audit).values(values))
