"""A create that arrives twice makes one job.

The stock client retries a POST by itself and sends no idempotency key, so a lost answer would be paid
twice. A key, if there is one, decides; without one, only a request that says it is a retry
(``x-stainless-retry-count`` above 0) is looked up by what it holds. A deliberate second order has
retry count 0 and is a job of its own, unless it is refused at first (429, 503): what the client then
sends again by itself cannot be told from a retry of the order before, and is answered with that one's
job. Whoever wants several videos of one text gives each a seed or a key.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from pusa_dist.errors import RequestError
from serve.http.errors import ServeError
from serve.http.uploads import IncomingBody
from serve.store.jobs import Job, JobStore

RETRY_WINDOW_S = 900.0
"""How long before a retry the attempt before it may have come: the stock client waits ten minutes for an answer to
each attempt by default, and then up to one more before the next."""
MAX_COUNTED_RETRIES = 10
MAX_KEY_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Origin:
    """What identifies a create across retries."""

    fingerprint: str
    idempotency_key: str | None
    num_retries: int
    """Attempts before this one that the sender tells of, of which ``MAX_COUNTED_RETRIES`` count."""
    arrived_at: float
    """When its first byte came in, Unix seconds."""

    @classmethod
    def of(cls, route: str, headers: Mapping[str, str], body: IncomingBody, arrived_at: float) -> "Origin":
        """Read it from a request.

        Raises:
            RequestError: the idempotency key is too long.
        """
        key = headers.get("idempotency-key") or None
        if key is not None and len(key) > MAX_KEY_LENGTH:
            raise RequestError(
                f"Idempotency-Key has {len(key)} characters; use at most {MAX_KEY_LENGTH}",
                "Idempotency-Key",
                "invalid_idempotency_key",
            )
        return cls(_fingerprint(route, body), key, _num_retries(headers), arrived_at)

    @property
    def is_retry(self) -> bool:
        """Whether the sender says that it was sent before."""
        return self.num_retries > 0

    @property
    def repeats_since(self) -> float:
        """From when on a job of this fingerprint is the job of this request: since its first attempt."""
        return self.arrived_at - RETRY_WINDOW_S * self.num_retries

    def earlier_job(self, store: JobStore, tenant: str) -> Job | None:
        """The job this request has already made, if it has.

        Raises:
            ServeError: 409, the idempotency key was used for something else.
        """
        if self.idempotency_key is None:
            return store.find_repeat(tenant, self.fingerprint, self.repeats_since, only_retries=not self.is_retry)
        job = store.find_by_key(tenant, self.idempotency_key)
        if job is not None and job.fingerprint != self.fingerprint:
            raise ServeError(
                409,
                "idempotency_key_reused",
                f"this Idempotency-Key made {job.id} from a different request; use a new key",
                "Idempotency-Key",
            )
        return job


def _num_retries(headers: Mapping[str, str]) -> int:
    text = headers.get("x-stainless-retry-count", "0").lstrip("0")
    is_number = text.isascii() and text.isdecimal()
    return min(int(text[:3]), MAX_COUNTED_RETRIES) if is_number else 0  # of a number, three digits say enough


def _fingerprint(route: str, body: IncomingBody) -> str:
    """Digest of the parsed request: the multipart boundary changes with every retry, this does not."""
    digest = hashlib.sha256(json.dumps([route, body.fields], sort_keys=True).encode())
    for one in body.media:
        digest.update(hashlib.sha256(one.identity).digest())
    return digest.hexdigest()
