"""What the tenants do: keep a few jobs in the service until all are done, and fetch every result."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from cluster.chaos.patience import PatientTransport
from cluster.chaos.workload import TENANTS
from cluster.orders import Order, download, submit

PATIENCE_S = 150.0
POLL_S = 0.5
NUM_OPEN = 4
"""Jobs that a tenant has in the service at once: creates and downloads go on through every fault."""

VARIANTS = ("video", "frames")
Results = Mapping[str, bytes]
"""Every variant of a job, as its tenant has fetched it; none of a job that failed."""


class Tenants:
    """Clients at work, each on a thread of its own.

    Args:
        url: of the service.
        keys: API keys by tenant.
        orders: jobs by number.
        name: of the run; part of every ``Idempotency-Key``.
    """

    def __init__(self, url: str, keys: Mapping[str, str], orders: Mapping[int, Order], name: str) -> None:
        self._url = url
        self._name = name
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(len(TENANTS), "tenant")
        self._working = [
            self._threads.submit(
                self._work, keys[tenant], {n: one for n, one in orders.items() if n % len(TENANTS) == index}
            )
            for index, tenant in enumerate(TENANTS)
        ]

    @property
    def is_done(self) -> bool:
        """Whether every job has ended and was fetched, or a client has given up."""
        return all(one.done() for one in self._working)

    def answers(self) -> dict[int, Results]:
        """What was fetched of every job, by number; to be asked when ``is_done``.

        Raises:
            RuntimeError: a client was refused, or gave up.
        """
        merged: dict[int, Results] = {}
        for one in self._working:
            merged |= one.result()
        return merged

    def close(self) -> None:
        """Stop within seconds, wherever they are."""
        self._stop.set()
        self._threads.shutdown()

    def _work(self, key: str, orders: Mapping[int, Order]) -> dict[int, Results]:
        waiting = deque(orders.items())
        open_jobs: dict[int, str] = {}
        answers: dict[int, Results] = {}
        transport = PatientTransport(self._stop, PATIENCE_S)
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=self._url, headers=headers, transport=transport, timeout=20) as client:
            while waiting or open_jobs:
                while waiting and len(open_jobs) < NUM_OPEN:
                    number, order = waiting.popleft()
                    created = submit(client, order, {"Idempotency-Key": job_key(self._name, number)})
                    open_jobs[number] = created.json()["id"]
                self._stop.wait(POLL_S)
                for number, video_id in list(open_jobs.items()):
                    video = client.get(f"/v1/videos/{video_id}").raise_for_status().json()
                    if video["status"] in ("completed", "failed"):
                        del open_jobs[number]
                        answers[number] = _fetched(client, video)
        return answers


def job_key(run: str, number: int) -> str:
    """The ``Idempotency-Key`` of a run's job."""
    return f"{run}-{number:02d}"


@contextmanager
def tenants_at_work(url: str, keys: Mapping[str, str], orders: Mapping[int, Order], name: str) -> Iterator[Tenants]:
    """Clients for as long as a ``with`` block lasts; see ``Tenants``."""
    tenants = Tenants(url, keys, orders, name)
    try:
        yield tenants
    finally:
        tenants.close()


def _fetched(client: httpx.Client, video: Mapping[str, str]) -> Results:
    if video["status"] != "completed":
        return {}
    return {variant: download(client, video["id"], variant) for variant in VARIANTS}
