"""Who is asking: API keys to tenants (the seam for quotas and fair shares).

Keys are kept only as digests, and compared in constant time.
"""

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from pusa_dist.errors import ConfigError
from serve.http.errors import unauthenticated

LOCAL = "local"
MAX_NAME_LENGTH = 128


class Tenants:
    """The tenants of a deployment; with none configured, everyone is ``local``.

    Args:
        digests: SHA-256 of each key to its tenant; empty: keys are not asked for.
    """

    def __init__(self, digests: Mapping[bytes, str]) -> None:
        self._digests = dict(digests)

    @classmethod
    def from_file(cls, path: str | None) -> "Tenants":
        """Read ``tenant key`` pairs, one a line; blank lines and lines that begin with # are skipped.

        Raises:
            ConfigError: the file cannot be read, or a line is not a pair (keys are never shown).
        """
        if path is None:
            return cls({})
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys_file={path} cannot be read: {error}") from error
        digests: dict[bytes, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise ConfigError(f"keys_file={path}, line {number}: write 'tenant key', two words")
            tenant, key = words
            if len(tenant) > MAX_NAME_LENGTH:
                raise ConfigError(
                    f"keys_file={path}, line {number}: a tenant's name has at most {MAX_NAME_LENGTH} letters"
                )
            if digests.setdefault(_digest(key), tenant) != tenant:
                raise ConfigError(f"keys_file={path}, line {number}: this key already belongs to another tenant")
        if not digests:
            raise ConfigError(f"keys_file={path} holds no keys; add a line 'tenant key'")
        return cls(digests)

    def authenticate(self, authorization: str | None) -> str:
        """The tenant of an Authorization header.

        Raises:
            ServeError: 401, keys are required and this is not one.
        """
        if not self._digests:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise unauthenticated()
        given = _digest(key.strip())
        # Every key is looked at, so that the time taken says nothing.
        tenants = [tenant for digest, tenant in self._digests.items() if hmac.compare_digest(given, digest)]
        if not tenants:
            raise unauthenticated()
        return tenants[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
