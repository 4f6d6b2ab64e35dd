"""Sends a schedule, whatever the service does meanwhile, and writes down what became of every job."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import httpx

from cluster.loadtest.client import FINAL, Created, client, code_of, create, end_of, pause_of
from cluster.loadtest.rows import Outcome, Row
from cluster.loadtest.schedule import Arrival
from cluster.orders import Form

LEAD_S = 1.0
"""Between the beginning and the clock's start, so that the first job is not late for our own preparations."""
_CANCEL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A service, and who asks it."""

    url: str
    keys: Mapping[str, str | None]
    """By tenant; None: the service asks for none."""

    @property
    def accounts(self) -> dict[str, str | None]:
        """Keys by one tenant each: tenants with the same key, or without any, are one to the service."""
        return {tenant: key for key, tenant in {key: tenant for tenant, key in self.keys.items()}.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A schedule with its requests."""

    name: str
    """Part of every prompt and ``Idempotency-Key``."""
    arrivals: Sequence[Arrival]
    forms: Sequence[Form]
    tasks: Mapping[str, str]
    """By job class."""
    job_timeout_s: float
    """After the last arrival is due, for what is then not seen to end; in a closed loop, after each job began."""


@dataclass(frozen=True, slots=True)
class _InHand:
    """What the service has of ours, or may have, with the client to cancel it with."""

    jobs: dict[str, httpx.AsyncClient] = field(default_factory=dict)
    creates: dict[asyncio.Task[Created], httpx.AsyncClient] = field(default_factory=dict)
    """On their way: they are not cut off, since nobody would know of the job then."""


async def drive(target: Target, run: Run, began: float, at_once: int | None = None) -> list[Row]:
    """Send every job when it is due and wait for all ends.

    Args:
        target: of the load.
        run: to be sent.
        began: the instant of ``time.monotonic`` from which the arrivals count.
        at_once: so many jobs at a time, each due when one before it has ended (a closed loop, which measures service
            and not load), until one does not complete; None: whatever has not ended, as the arrivals say.

    Returns:
        Of every job that was sent, by number.
    """
    in_hand, rows = _InHand(), list[Row]()
    async with AsyncExitStack() as stack:
        clients = {
            tenant: await stack.enter_async_context(client(target.url, key)) for tenant, key in target.keys.items()
        }
        places = asyncio.Semaphore(at_once or len(run.arrivals))

        async def one(arrival: Arrival, sent: Form) -> None:
            async with places:
                due, last_at = arrival, run.arrivals[-1].at
                if at_once is not None:
                    if any(row.outcome != "completed" for row in rows):
                        return  # the service may still be busy with that one
                    last_at = time.monotonic() - began
                    due = replace(arrival, at=last_at)
                deadline = began + last_at + run.job_timeout_s
                rows.append(await _one(clients[due.tenant], run, due, sent, began, deadline, in_hand))

        try:
            await asyncio.gather(*(one(arrival, sent) for arrival, sent in zip(run.arrivals, run.forms, strict=True)))
        except asyncio.CancelledError:
            await _cancel(in_hand)
            raise
    return sorted(rows, key=lambda row: row.number)


async def _one(
    http: httpx.AsyncClient,
    run: Run,
    arrival: Arrival,
    sent: Form,
    began: float,
    deadline: float,
    in_hand: _InHand,
) -> Row:
    await asyncio.sleep(began + arrival.at - time.monotonic())
    row = partial(
        Row,
        number=arrival.number,
        tenant=arrival.tenant,
        job_class=arrival.job_class,
        task=run.tasks[arrival.job_class],
        intended_s=arrival.at,
        sent_s=time.monotonic() - began,
    )
    creating = asyncio.create_task(create(http, sent, f"{run.name}-{arrival.number}"))
    in_hand.creates[creating] = http
    created = await asyncio.shield(creating)
    del in_hand.creates[creating]
    answer, now = created.answer, time.monotonic() - began
    row = partial(row, tries=created.tries, http_status=None if answer is None else answer.status_code)
    if answer is None or answer.is_error:
        is_load = answer is not None and answer.status_code == httpx.codes.TOO_MANY_REQUESTS
        return row(ended_s=now, outcome="rejected" if is_load else "error", code=code_of(answer))
    job_id = str(answer.json()["id"])
    row = partial(row, accepted_s=now, job_id=job_id)
    in_hand.jobs[job_id] = http
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
            job = await end_of(http, job_id, pause_of(answer))
    except TimeoutError:
        return row(ended_s=time.monotonic() - began, outcome="timeout", code="not_seen_to_end")
    ended_s = time.monotonic() - began
    del in_hand.jobs[job_id]
    outcomes: dict[str, Outcome] = dict(zip(FINAL, ("completed", "failed", "cancelled"), strict=True))
    return row(
        ended_s=ended_s,
        outcome=outcomes[job["pusa"]["state"]],
        code=(job["error"] or {}).get("code"),
        attempt=job["pusa"]["attempt"],
        stage_seconds=job["pusa"]["stage_seconds"],
    )


async def _cancel(in_hand: _InHand) -> None:
    """Leave nothing running that nobody waits for: the service may be another's."""
    if in_hand.creates:
        done, _ = await asyncio.wait(in_hand.creates, timeout=_CANCEL_S)
        for one in done:
            answer = one.result().answer
            if answer is not None and answer.is_success:
                in_hand.jobs[str(answer.json()["id"])] = in_hand.creates[one]

    async def cancel(job_id: str, http: httpx.AsyncClient) -> None:
        try:
            await http.post(f"/v1/videos/{job_id}/cancel")
        except httpx.TransportError:
            return

    try:
        async with asyncio.timeout(_CANCEL_S):
            await asyncio.gather(*(cancel(*one) for one in list(in_hand.jobs.items())))
    except TimeoutError:
        return
