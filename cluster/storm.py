"""Creates under stress, on the real service: none lost, none doubled, none refused, and none slow.

First many clients whose connections break behind what they sent, and who send it again as the stock
client does or with an ``Idempotency-Key``; then creates at a steady rate, whatever the answers take,
while the gang is busy.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from cluster.local_service import running_service
from cluster.verdicts import Figure, are_met, below, equal, percentile, table, told

MAX_P99_S = 0.25
SETTINGS = {"denoiser": {"num_replicas": 1, "ulysses_degree": 1}}
MAX_TRIES = 30
BREAKS = 0.4
"""Part of the tries whose connection the client closes before it has read the answer."""
ANSWER_S = 60.0
POLL_S = 0.2
_TINY = {"size": "64x64", "pusa": {"num_frames": 5, "num_inference_steps": 1, "seed": 1}}
_LONG = {"size": "288x192", "pusa": {"num_frames": 49, "num_inference_steps": 50, "seed": 1}}


@dataclass(slots=True)
class Storm:
    """What became of the orders."""

    ids: list[str] = field(default_factory=list)
    """What each order's client was told in the end."""
    statuses: Counter[int] = field(default_factory=Counter)
    num_broken: int = 0


def storm_figures(storm: Storm, num_orders: int, num_jobs: int) -> list[Figure]:
    """Judge a storm.

    Args:
        storm: what its clients saw.
        num_orders: different ones that were sent.
        num_jobs: that the service has of them.
    """
    name = f"{num_orders} orders"
    distinct = len(set(storm.ids))
    num_refused = sum(count for status, count in storm.statuses.items() if status >= httpx.codes.INTERNAL_SERVER_ERROR)
    return [
        Figure(name, "connections broken", storm.num_broken, "> 0", storm.num_broken > 0),
        equal(name, "distinct jobs told to clients", distinct, num_orders),
        equal(name, "jobs in the service", num_jobs, num_orders),
        equal(name, "answers 5xx", num_refused, 0),
    ]


def latency_figures(seconds: Sequence[float], num_failed: int, rate: float) -> list[Figure]:
    """Judge creates at a steady rate, measured from when each was due."""
    name = f"{rate:g} creates a second, gang busy"
    return [
        told(name, "p50, seconds", percentile(seconds, 0.5)),
        below(name, "p99, seconds", percentile(seconds, 0.99), MAX_P99_S),
        equal(name, "not accepted", num_failed, 0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 1 when a figure is missed."""
    parser = argparse.ArgumentParser(prog="python -m cluster.storm", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clients", type=int, default=50, help="clients that order at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--orders", type=int, default=1000, help="orders of all clients together (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=20.0, help="creates a second while the gang is busy (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="how long to create at that rate (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(prefix="pusa-storm-") as folder,
        running_service("debug", Path(folder) / "state", settings=SETTINGS) as service,
    ):
        lines = asyncio.run(_busy(service.url, arguments.rate, arguments.seconds))
        lines += asyncio.run(_storm(service.url, arguments.clients, arguments.orders))
    sys.stdout.write(table(lines))
    return 0 if are_met(lines) else 1


async def _busy(url: str, rate: float, seconds: float) -> list[Figure]:
    found: list[float] = []
    num_failed = 0
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=httpx.Limits(max_connections=None)) as client:
        long = await _create(client, {"prompt": "long", **_LONG})
        await _until_running(client, long)

        async def one(number: int, due: float) -> None:
            nonlocal num_failed
            await asyncio.sleep(due - time.monotonic())
            answer = await client.post("/v1/videos", json={"prompt": f"steady {number}", **_LONG})
            found.append(time.monotonic() - due)
            num_failed += answer.is_error

        began = time.monotonic() + 0.5
        await asyncio.gather(*(one(number, began + number / rate) for number in range(int(rate * seconds))))
        await _delete_all(client)
    return latency_figures(found, num_failed, rate)


async def _storm(url: str, num_clients: int, num_orders: int) -> list[Figure]:
    storm = Storm()
    each = num_orders // num_clients

    async def client(number: int) -> None:
        dice = random.Random(number)
        for order in range(each):
            await _persist(url, f"order {number}.{order}", dice, storm)

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S) as http:
        num_jobs = len(await _ids(http))
        await _delete_all(http)
    return storm_figures(storm, each * num_clients, num_jobs)


async def _persist(url: str, prompt: str, dice: random.Random, storm: Storm) -> None:
    """Send an order until an answer to it is read; every second client sets a key, the others retry as the stock one.

    Raises:
        RuntimeError: it was refused, or no answer was read in ``MAX_TRIES``.
    """
    body = json.dumps({"prompt": prompt, **_TINY}).encode()
    with_key = dice.random() < 0.5
    for retry in range(MAX_TRIES):
        headers = {"idempotency-key": prompt} if with_key else {"x-stainless-retry-count": str(retry)}
        if dice.random() < BREAKS:
            await _send_and_go(url, body, headers, dice.uniform(0.0, 0.05))
            storm.num_broken += 1
            continue
        async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S) as client:
            headers |= {"content-type": "application/json"}
            answer = await client.post("/v1/videos", content=body, headers=headers)
        storm.statuses[answer.status_code] += 1
        if answer.is_success:
            storm.ids.append(answer.json()["id"])
            return
        if answer.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
            raise RuntimeError(f"the service refused a job: {answer.status_code} {answer.text}")
    raise RuntimeError(f"no answer to {prompt!r} was read in {MAX_TRIES} tries")


async def _send_and_go(url: str, body: bytes, headers: Mapping[str, str], after_s: float) -> None:
    """Send a whole create and reset the connection, at some moment of the service's work on it."""
    address = urlsplit(url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = {"host": address.netloc, "content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    try:
        writer.write(f"POST /v1/videos HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(after_s)
    finally:
        writer.transport.abort()


async def _create(client: httpx.AsyncClient, order: Mapping[str, object]) -> str:
    created: str = (await client.post("/v1/videos", json=order)).raise_for_status().json()["id"]
    return created


async def _until_running(client: httpx.AsyncClient, job_id: str) -> None:
    for _ in range(int(ANSWER_S / POLL_S)):
        if (await client.get(f"/v1/videos/{job_id}")).raise_for_status().json()["pusa"]["step"] > 0:
            return
        await asyncio.sleep(POLL_S)
    raise RuntimeError(f"job {job_id} made no step within {ANSWER_S:g} s")


async def _ids(client: httpx.AsyncClient) -> list[str]:
    found: list[str] = []
    while True:
        after = {"after": found[-1]} if found else {}
        page = (await client.get("/v1/videos", params={"limit": 100, **after})).raise_for_status().json()
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            return found


async def _delete_all(client: httpx.AsyncClient) -> None:
    for job_id in await _ids(client):
        await client.delete(f"/v1/videos/{job_id}")


if __name__ == "__main__":
    sys.exit(main())
