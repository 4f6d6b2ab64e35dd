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
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from serve.http.fetch import FetchError, PublicClient
from serve.logs import about
from serve.store.deliveries import Delivery
from serve.store.jobs import JobStore

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Between two looks at what is due."""
TIMEOUT_S = 15.0
"""For one try, from the look-up of the name to the answer."""
LEASE_S = 4 * TIMEOUT_S
BACK_OFF_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0)
"""Waits after the first failure, the second, ...; then it is given up, 31 hours after the first try."""
MAX_AT_ONCE, MAX_PER_TENANT = 32, 4


class Client(Protocol):
    """Posts to public addresses; see ``serve.http.fetch.PublicClient``."""

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> int: ...  # noqa: D102


class Webhooks:
    """Delivers what is due.

    Args:
        store: its outbox, and the tenants' secrets.
        client: posts; it must refuse what is not https and public.
        clock: Unix seconds.
        on_try: told how each went: ``delivered``, ``postponed`` or ``given_up``.
    """

    def __init__(
        self,
        store: JobStore,
        client: Client | None = None,
        clock: Callable[[], float] = time.time,
        on_try: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._client = client or PublicClient(timeout_s=TIMEOUT_S)
        self._clock = clock
        self._on_try = on_try
        self._running: dict[asyncio.Task[None], Delivery] = {}

    async def run_once(self, now: float) -> int:
        """Begin what is due at ``now`` and has room; returns how many deliveries were begun.

        They go on in the background, so that a receiver that hangs holds up nobody else's: a tenant has at most
        ``MAX_PER_TENANT`` at a time, and what is due is looked up of every tenant in turn.
        """
        num_running = Counter(one.tenant for one in self._running.values())
        known = {one.id for one in self._running.values()}  # some of them are not claimed yet
        full = [tenant for tenant, number in num_running.items() if number >= MAX_PER_TENANT]
        room = MAX_AT_ONCE - len(self._running)
        due = await asyncio.to_thread(self._store.due_deliveries, now, room, full) if room else []
        num_begun = 0
        for one in due:
            if one.id not in known and num_running[one.tenant] < MAX_PER_TENANT:
                with about(job=one.job_id, tenant=one.tenant):
                    task = asyncio.create_task(self._try(one, now))
                self._running[task] = one
                task.add_done_callback(self._running.pop)
                num_running[one.tenant] += 1
                num_begun += 1
        return num_begun

    async def close(self) -> None:
        """Break off what is under way; it is sent again when its claim runs out."""
        for task in self._running:
            task.cancel()
        await self.idle()

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _try(self, due: Delivery, now: float) -> None:
        try:
            await self._deliver(due, now)
        except Exception as error:  # noqa: BLE001 - nobody awaits this; the claim runs out and it is tried again
            logger.error("webhook %s could not be handled: %s", due.id, type(error).__name__)

    async def _deliver(self, due: Delivery, now: float) -> None:
        delivery = await asyncio.to_thread(self._store.claim_delivery, due.id, now, LEASE_S)
        if delivery is None:
            return  # another dispatcher was faster
        tenant = await asyncio.to_thread(self._store.tenant, delivery.tenant)
        if tenant is None:
            return  # erased meanwhile, and its outbox with it
        body = message(delivery)
        # The time of this try: a receiver refuses what is older than a few minutes.
        headers = signed_headers(tenant.webhook_secret, delivery.id, int(self._clock()), body)
        try:
            status = await self._client.post(delivery.url, headers, body)
            failure = None if 200 <= status < 300 else f"it answered {status}"
        except FetchError as error:
            failure = error.message
        result = await asyncio.to_thread(self._note, delivery, failure, now)
        if self._on_try is not None:
            self._on_try(result)

    def _note(self, delivery: Delivery, failure: str | None, now: float) -> str:
        """Write down how the try went; never where it went, because the URL may carry a secret."""
        if failure is None:
            self._store.delivered(delivery.id, delivery.attempts)
            return "delivered"
        wait = back_off(delivery.attempts)
        outlook = "given up" if wait is None else f"again in {wait:.0f} s"
        logger.warning("webhook %s of tenant %s: %s; %s", delivery.id, delivery.tenant, failure, outlook)
        if wait is None:
            self._store.give_up(delivery.id, delivery.attempts, failure)
            return "given_up"
        self._store.postpone(delivery.id, delivery.attempts, now + wait, failure)
        return "postponed"


async def keep_delivering(webhooks: Webhooks, period_s: float = PERIOD_S) -> None:
    """Deliver what is due again and again until cancelled, whatever fails."""
    try:
        while True:
            try:
                await webhooks.run_once(time.time())
            except Exception as error:  # noqa: BLE001 - the outermost loop: the database may be back the next time
                logger.error("webhooks that are due could not be looked up: %s", type(error).__name__)
            await asyncio.sleep(period_s)
    finally:
        await webhooks.close()


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
