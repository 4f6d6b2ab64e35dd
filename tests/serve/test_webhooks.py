"""Webhooks: the form that the official client verifies, and that a tenant is told at least once, whatever fails."""

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.http.fetch import FetchError, PublicClient
from serve.store.jobs import JobStore
from serve.webhooks import (
    BACK_OFF_S,
    LEASE_S,
    MAX_AT_ONCE,
    MAX_PER_TENANT,
    Client,
    Webhooks,
    back_off,
    signed_headers,
)
from tests.serve.api_support import Service, open_service

URL = "https://hooks.example.com/done?token=hush-hush"


class Receiver:
    """A client of ours that reaches one receiver: it keeps what comes, and answers as it is told."""

    def __init__(self, *answers: int | FetchError, else_: int | FetchError = 200) -> None:
        self.answers = list(answers)
        self.else_ = else_
        self.received: list[tuple[str, dict[str, str], bytes]] = []

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> int:
        self.received.append((url, dict(headers), content))
        answer = self.answers.pop(0) if self.answers else self.else_
        if isinstance(answer, FetchError):
            raise answer
        return answer


def order(service: Service) -> str:
    return service.create(webhook=URL)["id"]


def run_once(service: Service, receiver: Client, now: float | None = None, store: JobStore | None = None) -> int:
    """Deliver what is due; returns how many tries were made."""

    async def run() -> int:
        webhooks = Webhooks(store or service.store, receiver)
        num_begun = await webhooks.run_once(time.time() if now is None else now)
        await webhooks.idle()
        return num_begun

    return asyncio.run(run())


def secret_of(service: Service) -> str:
    tenant = service.store.tenant("local")
    assert tenant is not None
    return tenant.webhook_secret


@pytest.mark.parametrize(
    ("end", "kind", "state"),
    [
        ("complete", "video.completed", "completed"),
        ("fail", "video.failed", "failed"),
        ("cancel", "video.failed", "cancelled"),
        ("cancel while it runs", "video.failed", "cancelled"),
    ],
)
def test_the_official_client_unwraps_what_is_sent_when_a_job_ends(
    service: Service, end: str, kind: str, state: str
) -> None:
    video_id = order(service)
    receiver = Receiver()
    assert run_once(service, receiver) == 0  # nothing has ended yet
    if end == "complete":
        service.finish(video_id)
    elif end == "cancel":
        service.client.post(f"/v1/videos/{video_id}/cancel")
    else:
        service.store.claim(video_id, "test", 60.0)
        assert service.store.fail(video_id, 1, "x", "y") if end == "fail" else service.store.cancelled(video_id, 1)
    assert run_once(service, receiver) == 1
    ((url, headers, body),) = receiver.received
    assert url == URL
    client = openai.OpenAI(api_key="unused", webhook_secret=secret_of(service))
    event: Any = client.webhooks.unwrap(body, headers)
    assert (event.type, event.object, event.data.id) == (kind, "event", video_id)
    assert event.id == headers["webhook-id"]
    assert json.loads(body)["data"] == {"id": video_id, "state": state}
    assert run_once(service, receiver) == 0


def test_what_another_secret_signed_or_somebody_changed_is_refused_by_the_client(service: Service) -> None:
    order(service)
    headers = signed_headers(secret_of(service), "evt_1", int(time.time()), b"{}")
    client = openai.OpenAI(api_key="unused")
    client.webhooks.verify_signature(b"{}", headers, secret=secret_of(service))
    service.store.set_tenant("local", replace_webhook_secret=True)
    for body, secret in ((b"{}", secret_of(service)), (b"{ }", secret_of(service))):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body, headers, secret=secret)
    old = {**headers, "webhook-timestamp": str(int(time.time()) - 3600)}
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(b"{}", old, secret=secret_of(service))


def test_a_job_without_a_webhook_tells_nobody(service: Service) -> None:
    service.finish(service.create()["id"])
    assert run_once(service, Receiver()) == 0


def test_what_fails_is_sent_again_later_and_later_under_the_same_id_and_freshly_signed(service: Service) -> None:
    service.finish(order(service))
    failures: list[int | FetchError] = [
        500,
        302,
        410,
        FetchError("unreachable", "no public https server answers there"),
    ]
    receiver = Receiver(*failures)
    now = time.time() + 1
    waits = []
    for _ in failures:
        assert run_once(service, receiver, now) == 1
        (due,) = service.store.due_deliveries(now + 1e6, 10)
        assert run_once(service, receiver, due.next_at - 0.1) == 0
        waits.append(due.next_at - now)
        now = due.next_at
    assert run_once(service, receiver, now) == 1
    assert service.store.due_deliveries(now + 1e6, 10) == []
    assert all(wanted <= wait <= 1.1 * wanted for wanted, wait in zip(BACK_OFF_S, waits, strict=False))
    assert len({headers["webhook-id"] for _, headers, _ in receiver.received}) == 1
    assert len({body for _, _, body in receiver.received}) == 1


def test_it_is_given_up_after_more_than_a_day(service: Service) -> None:
    service.finish(order(service))
    receiver = Receiver(else_=503)
    now = started = time.time() + 1
    while run_once(service, receiver, now):
        now += LEASE_S + max(BACK_OFF_S) * 1.1
    assert len(receiver.received) == len(BACK_OFF_S) + 1
    assert now > started
    assert sum(BACK_OFF_S) > 86_400
    assert back_off(len(BACK_OFF_S)) is not None
    assert back_off(len(BACK_OFF_S) + 1) is None


def test_a_restart_forgets_nothing(service: Service) -> None:
    service.finish(order(service))
    service.store.close()
    reopened = JobStore(service.gateway.config.resolved_database_url)
    assert run_once(service, Receiver(), store=reopened) == 1
    reopened.close()


def test_a_dispatcher_that_dies_while_it_delivers_leaves_it_to_be_delivered_again(service: Service) -> None:
    class Silent(Receiver):
        async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> int:
            await super().post(url, headers, content)
            await asyncio.sleep(60)
            raise AssertionError("it was not broken off")

    async def die(now: float) -> None:
        webhooks = Webhooks(service.store, silent)
        await webhooks.run_once(now)
        while not silent.received:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await webhooks.close()

    service.finish(order(service))
    silent, heir = Silent(), Receiver()
    now = time.time() + 1
    asyncio.run(die(now))
    assert run_once(service, heir, now + LEASE_S - 1) == 0  # the other may still be alive
    assert run_once(service, heir, now + LEASE_S + 1) == 1
    assert silent.received[0][1]["webhook-id"] == heir.received[0][1]["webhook-id"]


def test_two_dispatchers_do_not_both_deliver(service: Service) -> None:
    for _ in range(MAX_PER_TENANT):
        service.finish(order(service))
    receiver, now = Receiver(), time.time() + 1
    stores = [JobStore(service.gateway.config.resolved_database_url) for _ in range(2)]

    async def both() -> None:
        dispatchers = [Webhooks(store, receiver) for store in stores]
        await asyncio.gather(*(one.run_once(now) for one in dispatchers))
        await asyncio.gather(*(one.idle() for one in dispatchers))

    asyncio.run(both())
    for store in stores:
        store.close()
    ids = [headers["webhook-id"] for _, headers, _ in receiver.received]
    assert (len(ids), len(set(ids))) == (MAX_PER_TENANT, MAX_PER_TENANT)


def test_a_long_backlog_of_one_tenant_does_not_delay_the_others(tmp_path: Path) -> None:
    with open_service(tmp_path, require_keys=True) as service:
        for tenant, number in (("red", MAX_AT_ONCE + 8), ("blue", 1)):
            headers = service.key(tenant)
            for _ in range(number):
                body = {"prompt": "a", "webhook": f"https://{tenant}.example/"}
                video_id = service.client.post("/v1/videos", json=body, headers=headers).json()["id"]
                service.client.post(f"/v1/videos/{video_id}/cancel", headers=headers)
        receiver = Receiver()
        run_once(service, receiver, time.time() + 1)
    urls = [url for url, _, _ in receiver.received]
    assert urls.count("https://blue.example/") == 1
    assert urls.count("https://red.example/") == MAX_PER_TENANT


def test_receivers_that_hang_hold_up_only_their_own_tenant(tmp_path: Path) -> None:
    class Mixed(Receiver):
        async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> int:
            if "slow" in url:
                await asyncio.sleep(60)
            return await super().post(url, headers, content)

    async def three_rounds(store: JobStore, receiver: Receiver) -> list[int]:
        webhooks, now = Webhooks(store, receiver), time.time() + 1
        begun = [await webhooks.run_once(now) for _ in range(3)]
        while not receiver.received:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await webhooks.close()
        return begun

    with open_service(tmp_path, require_keys=True) as service:
        for tenant, number in (("red", MAX_AT_ONCE + 2), ("blue", 1)):
            headers = service.key(tenant)
            for _ in range(number):
                body = {"prompt": "a", "webhook": "https://slow.example/" if tenant == "red" else URL}
                video_id = service.client.post("/v1/videos", json=body, headers=headers).json()["id"]
                service.client.post(f"/v1/videos/{video_id}/cancel", headers=headers)
        receiver = Mixed()
        assert asyncio.run(three_rounds(service.store, receiver)) == [MAX_PER_TENANT + 1, 0, 0]
    assert [url for url, _, _ in receiver.received] == [URL]


def test_nothing_is_sent_into_the_house_whatever_the_name_resolves_to(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    async def at_home(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.7", "169.254.169.254"]

    service.finish(order(service))
    with caplog.at_level(logging.DEBUG):
        client = PublicClient(timeout_s=5, resolve=at_home)
        run_once(service, client, time.time() + 1)
        client.close()
    (due,) = service.store.due_deliveries(time.time() + 1e6, 10)
    assert due.attempts == 1
    assert "no public https server answers there" in caplog.text
    assert "hush-hush" not in caplog.text
    assert secret_of(service) not in caplog.text


def test_an_erased_tenant_is_told_nothing_more(service: Service) -> None:
    service.finish(order(service))
    service.store.erase_tenant("local")
    receiver = Receiver()
    run_once(service, receiver)
    assert receiver.received == []
