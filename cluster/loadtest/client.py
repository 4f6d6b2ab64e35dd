"""One job, from the moment it is due to its end, through the public API."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.orders import DEFAULT_POLL_MS, Form

TRIES = 4
"""How often a create is sent when no answer, or a proxy's, comes back: the stock client does three."""
_REQUEST_S = 30.0
_BUSY = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
FINAL = ("completed", "failed", "cancelled")


def client(url: str, key: str | None) -> httpx.AsyncClient:
    """A tenant's client, which never waits for a connection of its own."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=httpx.Timeout(_REQUEST_S),
        limits=httpx.Limits(max_connections=None),
    )


@dataclass(frozen=True, slots=True)
class Created:
    """What came back of a create."""

    answer: httpx.Response | None
    """None: nothing did."""
    tries: int


async def create(http: httpx.AsyncClient, sent: Form, key: str) -> Created:
    """Send a job; again, under the same ``Idempotency-Key``, where no answer of the service's own came back."""
    answer = None
    for number in range(1, TRIES + 1):
        try:
            answer = await http.post(
                sent.route,
                data=dict(sent.fields),
                files=list(sent.files) or None,
                headers={"Idempotency-Key": key},
            )
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code not in _BUSY:
            return Created(answer, number)
        await asyncio.sleep(0.5 * number)
    return Created(answer, TRIES)


async def end_of(http: httpx.AsyncClient, job_id: str, pause_s: float) -> dict[str, Any]:
    """Wait until a job has ended; returns it. The caller bounds the wait.

    The job's events tell at once; where they are refused or break off, the job is asked for as often as the
    service wishes.
    """
    while True:
        await _follow_events(http, job_id)
        job = await _read(http, job_id)
        if job is not None and job["pusa"]["state"] in FINAL:
            return job
        await asyncio.sleep(pause_s)


def pause_of(answer: httpx.Response) -> float:
    """Seconds that the service wants between two questions."""
    return int(answer.headers.get("openai-poll-after-ms", DEFAULT_POLL_MS)) / 1000


def code_of(answer: httpx.Response | None) -> str:
    """Of a refusal, in the service's words if they are its own."""
    if answer is None:
        return "no_answer"
    try:
        error: Mapping[str, Any] = answer.json()["error"]
        return str(error["code"])
    except (ValueError, KeyError, TypeError):
        return f"http_{answer.status_code}"


async def _follow_events(http: httpx.AsyncClient, job_id: str) -> None:
    """Return when the events of a job say that it has ended, or there are none."""
    timeout = httpx.Timeout(_REQUEST_S, read=None)
    try:
        async with http.stream("GET", f"/v1/videos/{job_id}/events", timeout=timeout) as events:
            if events.is_error:
                return
            async for line in events.aiter_lines():
                if line.startswith("data:") and json.loads(line[5:]).get("state") in FINAL:
                    return
    except httpx.TransportError:
        return


async def _read(http: httpx.AsyncClient, job_id: str) -> dict[str, Any] | None:
    try:
        answer = await http.get(f"/v1/videos/{job_id}")
    except httpx.TransportError:
        return None
    found: dict[str, Any] | None = answer.json() if answer.is_success else None
    return found
