"""Who is asking: an API key to its tenant.

The database knows a key by its SHA-256, and so does the memory here. A key is random, so a look-up by
digest needs no comparison in constant time: what the timing of a look-up could tell is how much of a
digest is right, and nobody can choose a key for the digest it has.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable

from serve.http.errors import ServeError, unauthenticated
from serve.store.database import DATABASE_AWAY
from serve.store.keys import PREFIX

LOCAL = "local"
"""The tenant of everybody, where keys are not asked for."""
MEMORY_S = 3.0
"""A key that is revoked is refused this much later, at the latest."""
MAX_REMEMBERED = 1000
_MAX_KEY_LENGTH = 128


class Tenants:
    """Finds the tenant of a request.

    Args:
        tenant_of_key: whose key it is, or None; blocks. None: keys are not asked for, and everybody is ``local``.
        clock: seconds, monotonic.
    """

    def __init__(
        self, tenant_of_key: Callable[[str], str | None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tenant_of_key = tenant_of_key
        self._clock = clock
        self._known: dict[bytes, tuple[str, float]] = {}

    async def is_still(self, tenant: str, authorization: str | None) -> bool:
        """Whether an Authorization header that was the tenant's still is; yes while the database cannot say."""
        try:
            return await self.authenticate(authorization) == tenant
        except ServeError:
            return False
        except DATABASE_AWAY:  # nor is there anything new to tell
            return True

    async def authenticate(self, authorization: str | None) -> str:
        """The tenant of an Authorization header.

        Raises:
            ServeError: 401, keys are required and this is not one.
        """
        if self._tenant_of_key is None:
            return LOCAL
        scheme, _, given = (authorization or "").partition(" ")
        key = given.strip()
        # What cannot be a key is no reason to ask the database.
        if scheme.lower() != "bearer" or not key.startswith(PREFIX) or len(key) > _MAX_KEY_LENGTH or not key.isascii():
            raise unauthenticated()
        digest = hashlib.sha256(key.encode()).digest()
        tenant, until = self._known.get(digest, ("", 0.0))
        now = self._clock()
        if now < until:
            return tenant
        found = await asyncio.to_thread(self._tenant_of_key, key)
        self._known.pop(digest, None)
        # Only what is valid is remembered, so a new key works at once, and guesses take no room.
        if found is None:
            raise unauthenticated()
        if len(self._known) >= MAX_REMEMBERED:
            self._known.pop(next(iter(self._known)))
        self._known[digest] = (found, now + MEMORY_S)
        return found
