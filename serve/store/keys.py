"""API keys: random, shown once, kept as digests, revoked at any time.

A key is 32 random bytes. Nobody can try 2**256 of them, so a plain SHA-256 keeps it as safe as a slow
hash would; slow hashes protect what people choose, and would only make every request slower.
"""

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from pusa_dist.errors import ConfigError
from serve.store.audit import record
from serve.store.database import Database
from serve.store.tables import keys
from serve.store.tenants import check_name, lock_tenant

PREFIX = "pusa_"
MAX_LABEL_LENGTH = 255
"""What the column takes; SQLite would take more, and PostgreSQL would then refuse the backup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a key; not what it is."""

    id: str
    tenant: str
    label: str
    created_at: float
    revoked_at: float | None


class Keys(Database):
    """Rows of keys."""

    def create_key(self, tenant: str, label: str = "", *, actor: str = "operator") -> tuple[str, str]:
        """A new key of a tenant, which is set up if it was not.

        Returns:
            Its id, and the key itself: nobody can read it again.

        Raises:
            ConfigError: a bad name of a tenant, or a bad label.
        """
        check_name(tenant)
        if len(label) > MAX_LABEL_LENGTH or not label.isprintable():
            raise ConfigError(
                f"label {label[:40]!r} of {len(label)} characters: use at most {MAX_LABEL_LENGTH}, all printable"
            )
        key_id, secret = f"key_{secrets.token_hex(6)}", PREFIX + secrets.token_urlsafe(32)
        values = {"id": key_id, "tenant": tenant, "digest": _digest(secret), "label": label}
        with self._writing(durably=True) as connection:
            lock_tenant(connection, tenant, self._clock(), revive=True)
            connection.execute(insert(keys).values(created_at=self._clock(), **values))
            record(connection, self._clock(), actor, "key.create", tenant, {"key": key_id, "label": label})
        return key_id, secret

    def keys(self, tenant: str | None = None) -> list[Key]:
        """Every key, or a tenant's, oldest first; revoked ones too."""
        query = select(keys).order_by(keys.c.created_at, keys.c.id)
        if tenant is not None:
            query = query.where(keys.c.tenant == tenant)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [
            Key(id=row.id, tenant=row.tenant, label=row.label, created_at=row.created_at, revoked_at=row.revoked_at)
            for row in rows
        ]

    def revoke_key(self, key_id: str, *, actor: str = "operator") -> bool:
        """End a key for good; False: there is none of this id that is still valid."""
        valid = (keys.c.id == key_id) & keys.c.revoked_at.is_(None)
        with self._writing(durably=True) as connection:
            if connection.execute(update(keys).where(valid).values(revoked_at=self._clock())).rowcount == 0:
                return False
            tenant = connection.execute(select(keys.c.tenant).where(keys.c.id == key_id)).scalar_one()
            record(connection, self._clock(), actor, "key.revoke", tenant, {"key": key_id})
        return True

    def tenant_of_key(self, secret: str) -> str | None:
        """Whose key this is; None: nobody's, or no longer."""
        # Found by digest: what the index's timing says of a digest says nothing of the key.
        query = select(keys.c.tenant).where(keys.c.digest == _digest(secret), keys.c.revoked_at.is_(None))
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one_or_none()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", errors="surrogateescape")).hexdigest()
