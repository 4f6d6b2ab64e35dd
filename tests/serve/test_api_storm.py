"""Creates in a storm: connections that break at every point, clients that send again, and exactly one job for each."""

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy.exc import OperationalError
from starlette.types import Message

from pusa_dist.request import GenerationRequest
from serve.config import ServeConfig
from serve.moderation import Finished, Moderation, Submission
from tests.serve.api_support import Service, png
from tests.serve.test_openai_client import running_server

RETRY = {"x-stainless-retry-count": "1"}


class Hold:
    """A moderation hook that holds up the first request it sees until ``release`` is set."""

    def __init__(self) -> None:
        self.held, self.release = threading.Event(), threading.Event()

    def __call__(self, _: Submission | Finished) -> None:
        if not self.held.is_set():
            self.held.set()
            assert self.release.wait(30)


def overtaken(service: Service, first: dict[str, str], second: dict[str, str]) -> tuple[str, str]:
    """Ids that two equal requests get, of which the second passes the first on its way."""
    hold = Hold()
    service.gateway._intake._moderation = Moderation(hold)

    def send(headers: dict[str, str]) -> str:
        return service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers).json()["id"]

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(send, first)
        assert hold.held.wait(30)
        passed = send(second)
        hold.release.set()
        return answer.result(), passed


def test_a_job_whose_commit_was_not_answered_keeps_its_inputs(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = service.gateway._store.create

    def lost(*arguments: Any, **options: Any) -> None:
        create(*arguments, **options)
        raise OperationalError("COMMIT", {}, Exception("server closed"), connection_invalidated=True)

    order = {"files": {"input_reference": ("a.png", png(), "image/png")}, "data": {"prompt": "a"}}
    with monkeypatch.context() as failing:
        failing.setattr(service.gateway._store, "create", lost)
        assert service.client.post("/v1/videos", **order).status_code == 503
    answer = service.client.post("/v1/videos", **order, headers=RETRY)
    (stored,) = service.job(answer.json()["id"]).inputs
    assert service.artifacts.read(stored.key) == png()
    assert service.store.counts() == {"queued": 1}


def test_a_retry_that_overtakes_the_request_it_repeats_makes_no_second_job(service: Service) -> None:
    first, second = overtaken(service, {}, RETRY)
    assert first == second
    assert service.store.counts() == {"queued": 1}


def test_two_retries_at_the_same_time_make_one_job(service: Service) -> None:
    first, second = overtaken(service, RETRY, {"x-stainless-retry-count": "2"})
    assert first == second
    assert service.store.counts() == {"queued": 1}


def test_two_deliberate_orders_at_the_same_time_are_two_jobs(service: Service) -> None:
    first, second = overtaken(service, {}, {})
    assert first != second
    assert service.store.counts() == {"queued": 2}


def test_an_order_after_a_retry_was_accepted_is_a_job_of_its_own(service: Service) -> None:
    ids = [
        service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers).json()["id"]
        for headers in ({}, RETRY, {})
    ]
    assert ids[0] == ids[1] != ids[2]


def test_two_requests_with_one_key_at_the_same_time_make_one_job(service: Service) -> None:
    key = {"Idempotency-Key": "k"}
    first, second = overtaken(service, key, key)
    assert first == second
    assert service.store.counts() == {"queued": 1}


@asynccontextmanager
async def breaking_proxy(host: str, port: int, breaks: Counter[str]) -> AsyncIterator[str]:
    """A way to the server on which connections break: before, in and after the request, and in the answer."""
    dice = random.Random(0)

    async def relay(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(host, port)

        async def upstream() -> None:
            while data := await client.read(65536):
                how = dice.choices(("whole", "nothing", "half", "and gone"), (85, 3, 4, 8))[0]
                if how == "nothing":
                    raise ConnectionError("request lost")
                if how == "half":
                    to_server.write(data[: len(data) // 2])
                    await to_server.drain()
                    raise ConnectionError("request cut off")
                to_server.write(data)
                await to_server.drain()
                if how == "and gone":  # the server goes on working for a client that sends again
                    to_client.transport.abort()
                    await asyncio.sleep(2)
                    raise ConnectionError("client gone")

        async def downstream() -> None:
            while data := await server.read(65536):
                if dice.random() < 0.12:
                    to_client.write(data[: dice.randrange(len(data))])
                    raise ConnectionError("answer lost")
                to_client.write(data)
                await to_client.drain()

        ways = [asyncio.ensure_future(upstream()), asyncio.ensure_future(downstream())]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                error = one.exception()
                if isinstance(error, ConnectionError):
                    breaks[str(error)] += 1
        finally:  # also when the storm is over: a server that waits for half a request does not end
            for way in ways:
                way.cancel()
            for writer in (to_client, to_server):
                writer.transport.abort()

    proxy = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with proxy:
        yield f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/v1"


async def storm(base_url: str, num_clients: int, num_each: int, breaks: Counter[str]) -> list[str]:
    """Ids that the stock client was given for ``num_clients * num_each`` orders, no two alike."""
    host, port = base_url.removeprefix("http://").split(":")

    async def orders(client: openai.AsyncOpenAI, number: int) -> list[str]:
        return [(await client.videos.create(prompt=f"cat {number}.{each}")).id for each in range(num_each)]

    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(breaking_proxy(host, int(port), breaks))
        clients = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=30, timeout=60)
            )
            for _ in range(num_clients)
        ]
        found = await asyncio.gather(*(orders(client, number) for number, client in enumerate(clients)))
    return [one for ids in found for one in ids]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("num_clients", "num_each"), [(20, 5), pytest.param(50, 20, marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_exactly_one_job_for_every_order_however_often_connections_break(
    tmp_path: Path, num_clients: int, num_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: Counter[int] = Counter()
    count_answers(monkeypatch, statuses)
    breaks: Counter[str] = Counter()
    with running_server(ServeConfig(model="debug", state_dir=str(tmp_path))) as (url, gateway):
        ids = asyncio.run(storm(url, num_clients, num_each, breaks))
        num_jobs = gateway._store.counts()
        jobs = [gateway.get("local", one) for one in ids]
    num_orders = num_clients * num_each
    assert num_jobs == {"queued": num_orders}
    assert len(set(ids)) == num_orders
    prompts = {job.request.prompt for job in jobs}
    assert len(prompts) == num_orders
    assert all(isinstance(job.request, GenerationRequest) for job in jobs)
    assert {status for status in statuses if status >= 500} == set(), statuses
    assert statuses[200] > num_orders  # some answers were lost, and given again
    assert set(breaks) >= {"request lost", "request cut off", "client gone", "answer lost"}, breaks


def count_answers(monkeypatch: pytest.MonkeyPatch, statuses: Counter[int]) -> None:
    from serve.http import middleware

    plain = middleware.RequestIds.__call__

    async def counted(self: Any, scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses[message["status"]] += 1
            await send(message)

        await plain(self, scope, receive, noted)

    monkeypatch.setattr(middleware.RequestIds, "__call__", counted)
