"""Tenants: who has which share and which limits."""

import base64
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, select, update

from pusa_dist.errors import ConfigError
from serve.policy.quota import Quota
from serve.store.audit import record
from serve.store.database import Database, upsert
from serve.store.tables import tenants

MAX_LIMIT = 2**31 - 1
"""Of every quota: what an integer column takes. SQLite would take more, and PostgreSQL then refuse the backup."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class UnknownTenantError(Exception):
    """The tenant was erased: no job of it is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant's settings and its place in the fair order."""

    name: str
    weight: float
    """Share of the gangs under contention, relative to the other tenants'; above 0."""
    quota: Quota
    webhook_secret: str
    """Signs its webhooks; in Standard Webhooks form, ``whsec_`` and base64."""
    virtual_time: float
    """Delivered cost by weight, in gang-seconds."""
    created_at: float


class Tenants(Database):
    """Rows of tenants. A tenant that nobody has set up has weight 1 and no limits."""

    def tenant(self, name: str) -> Tenant | None:
        """A tenant's settings; None: it has never been set up nor made a job, or was erased."""
        found = select(tenants).where(tenants.c.name == name, tenants.c.erased_at.is_(None))
        with self._engine.connect() as connection:
            row = connection.execute(found).mappings().one_or_none()
        return None if row is None else _from_row(row)

    def tenants(self) -> list[Tenant]:
        """Every tenant, by name."""
        query = select(tenants).where(tenants.c.erased_at.is_(None)).order_by(tenants.c.name)
        with self._engine.connect() as connection:
            return [_from_row(row) for row in connection.execute(query).mappings()]

    def set_tenant(
        self,
        name: str,
        *,
        weight: float | None = None,
        limits: Mapping[str, float | None] | None = None,
        replace_webhook_secret: bool = False,
        actor: str = "operator",
    ) -> Tenant:
        """Set a tenant up, or change what is given.

        Args:
            name: letters, digits, dot, dash and underscore, at most 128.
            weight: above 0.
            limits: those to change, by field of ``Quota``; None: no limit.
            replace_webhook_secret: whether to replace the secret that signs its webhooks.
            actor: who does this, for the audit log.

        Raises:
            ConfigError: a bad name, weight or limit.
        """
        check_name(name)
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"weight={weight:g} of tenant {name}: give a number above 0")
        for limit, value in (limits or {}).items():
            if value is not None and not 0 <= value <= MAX_LIMIT:
                raise ConfigError(f"{limit}={value} of tenant {name}: give 0 to {MAX_LIMIT}, or none for no limit")
        changes: dict[str, Any] = {} if weight is None else {"weight": weight}
        changes |= dict(limits or {})
        # The audit log says that the secret changed, never what to.
        detail = {**changes, **({"webhook_secret": "replaced"} if replace_webhook_secret else {})}
        if replace_webhook_secret:
            changes["webhook_secret"] = new_webhook_secret()
        with self._writing(durably=True) as connection:
            lock_tenant(connection, name, self._clock(), revive=True)
            if changes:
                connection.execute(update(tenants).where(tenants.c.name == name).values(changes))
            record(connection, self._clock(), actor, "tenant.set", name, detail)
        made = self.tenant(name)
        assert made is not None, "only erasure removes a tenant"
        return made


def check_name(name: str) -> None:
    """Refuse what cannot name a tenant.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"tenant {name!r}: use 1 to 128 letters, digits, dots, dashes and underscores, a letter or digit first"
        )


def lock_tenant(connection: Connection, name: str, now: float, *, revive: bool = False) -> None:
    """Make the tenant's row if there is none, and hold it until the transaction ends.

    Args:
        connection: in a transaction.
        name: of the tenant.
        now: Unix seconds.
        revive: whether a tenant that was erased may begin anew.

    Raises:
        UnknownTenantError: it was erased.
    """
    # An UPDATE first: it takes the lock, where an INSERT that finds a row would not.
    kept = update(tenants).where(tenants.c.name == name)
    kept = kept.values(erased_at=None) if revive else kept.values(weight=tenants.c.weight)
    while connection.execute(kept).rowcount == 0:
        new = {
            "name": name,
            "weight": 1.0,
            "webhook_secret": new_webhook_secret(),
            "virtual_time": 0.0,
            "created_at": now,
        }
        connection.execute(upsert(connection, tenants).values(new).on_conflict_do_nothing())
    erased_at = select(tenants.c.erased_at).where(tenants.c.name == name)
    if connection.execute(erased_at).scalar_one() is not None:
        raise UnknownTenantError(name)


def new_webhook_secret() -> str:
    """A random secret in Standard Webhooks form."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def _from_row(row: Mapping[Any, Any]) -> Tenant:
    return Tenant(
        name=row["name"],
        weight=row["weight"],
        quota=Quota(**{limit.name: row[limit.name] for limit in fields(Quota)}),
        webhook_secret=row["webhook_secret"],
        virtual_time=row["virtual_time"],
        created_at=row["created_at"],
    )
