"""Telling tenants that a job has ended: signed, at least once, to public https addresses only.

What is to be told is written in the transaction that ends the job (the store's outbox), so neither a
crash nor a restart loses it. A delivery is claimed for as long as one try may take, so that two
dispatchers on one store do not both make it; one that dies in between leaves it to be made again, with
the same ``webhook-id``.

The form is Standard Webhooks, which the ``openai`` client verifies with ``webhooks.unwrap``.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from serve.http.fetch import FetchError, PublicClient
from serve.store.deliveries import Delivery
from serve.store.jobs import JobStore

logger = logging.getLogger(__name__)

TIMEOUT_S = 15.0
"""For one try, from the look-up of the name to the answer."""
LEASE_S = 4 * TIMEOUT_S
BACK_OFF_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0)
"""Waits after the first failure, the second, ...; then it is given up, 31 hours after the first try."""
MAX_AT_ONCE = 16


class Client(Protocol):
    """Posts to public addresses; see ``serve.http.fetch.PublicClient``."""

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> int: ...  # noqa: D102


class Webhooks:
    """Delivers what is due.

    Args:
        store: its outbox, and the tenants' secrets.
        client: posts; it must refuse what is not https and public.
        clock: Unix seconds.
    """

    def __init__(self, store: JobStore, client: Client | None = None, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._client = client or PublicClient(timeout_s=TIMEOUT_S)
        self._clock = clock

    async def run_once(self, now: float) -> int:
        """Try every delivery that is due at ``now``, several at once; returns how many were tried."""
        due = await asyncio.to_thread(self._store.due_deliveries, now, MAX_AT_ONCE)
        tried = await asyncio.gather(*(self._deliver(one, now) for one in due))
        return sum(tried)

    async def _deliver(self, due: Delivery, now: float) -> bool:
        delivery = await asyncio.to_thread(self._store.claim_delivery, due.id, now, LEASE_S)
        if delivery is None:
            return False  # another dispatcher was faster
        tenant = await asyncio.to_thread(self._store.tenant, delivery.tenant)
        if tenant is None:
            return False  # erased meanwhile, and its outbox with it
        body = message(delivery)
        # The time of this try: a receiver refuses what is older than a few minutes.
        headers = signed_headers(tenant.webhook_secret, delivery.id, int(self._clock()), body)
        try:
            status = await self._client.post(delivery.url, headers, body)
            failure = None if 200 <= status < 300 else f"it answered {status}"
        except FetchError as error:
            failure = error.message
        await asyncio.to_thread(self._note, delivery, failure, now)
        return True

    def _note(self, delivery: Delivery, failure: str | None, now: float) -> None:
        """Write down how the try went; never where it went, because the URL may carry a secret."""
        if failure is None:
            self._store.delivered(delivery.id, delivery.attempts)
            return
        wait = back_off(delivery.attempts)
        outlook = "given up" if wait is None else f"again in {wait:.0f} s"
        logger.warning("webhook %s of tenant %s: %s; %s", delivery.id, delivery.tenant, failure, outlook)
        if wait is None:
            self._store.give_up(delivery.id, delivery.attempts, failure)
        else:
            self._store.postpone(delivery.id, delivery.attempts, now + wait, failure)


def message(delivery: Delivery) -> bytes:
    """The body: OpenAI's event envelope. A receiver fetches the video itself, with its key."""
    kind = "video.completed" if delivery.outcome == "completed" else "video.failed"
    data = {"id": delivery.job_id, "state": delivery.outcome}
    envelope: dict[str, Any] = {
        "id": delivery.id,
        "object": "event",
        "created_at": int(delivery.created_at),
        "type": kind,
        "data": data,
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def signed_headers(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """What proves to the receiver who sent a body, and when.

    Args:
        secret: ``whsec_`` and the base64 of the key.
        message_id: the same on every try.
        timestamp: of this try, Unix seconds.
        body: as sent.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def back_off(attempts: int, jitter: Callable[[], float] = random.random) -> float | None:
    """Seconds until a delivery is tried again; None: never.

    Args:
        attempts: tries that have failed, 1 or more.
        jitter: 0 to 1; spreads what failed together over a tenth of the wait.
    """
    if attempts > len(BACK_OFF_S):
        return None
    return BACK_OFF_S[attempts - 1] * (1 + 0.1 * jitter())
