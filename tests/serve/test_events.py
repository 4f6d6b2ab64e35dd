"""A job's events: what is told and when, where a client that was cut off goes on, and what a stream costs."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError
from starlette.types import Message

from serve.config import ServeConfig
from serve.http import events as events_module
from serve.http.errors import ServeError
from serve.http.events import Cursor
from serve.http.gateway import Gateway
from serve.http.watch import Watch
from tests.serve.api_support import ABSENT, Service, open_service
from tests.serve.test_openai_client import running_server


def parsed(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(event, id, data) of every event; comments and the reconnection time left out."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in lines:
            found.append((lines["event"], lines["id"], json.loads(lines["data"])))
    return found


Event = tuple[str, str, dict[str, Any]]


def streamed(gateway: Gateway, video_id: str, *story: Callable[[], Any], last: str | None = None) -> str:
    """What a stream sends; after each event, one more thing happens to the job."""
    steps, text = iter(story), []

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError("the stream did not end")

    async def send(message: Message) -> None:
        chunk = message.get("body", b"").decode()
        text.append(chunk)
        if "event: " in chunk:
            next(steps, lambda: None)()

    stream = gateway.events("local", video_id, last)
    asyncio.run(stream({"type": "http", "method": "GET", "path": "/"}, receive, send))
    return "".join(text)


def told(gateway: Gateway, video_id: str, *story: Callable[[], Any], last: str | None = None) -> list[Event]:
    return parsed(streamed(gateway, video_id, *story, last=last))


def test_a_stream_tells_every_stage_and_step_and_ends_with_the_job(service: Service) -> None:
    video_id = service.create(num_inference_steps=4)["id"]
    store = service.store
    events = told(
        service.gateway,
        video_id,
        lambda: store.claim(video_id, "test", 60.0),
        lambda: store.progress(video_id, 1, "text", 0, 4),
        lambda: store.progress(video_id, 1, "denoise", 1, 4),
        lambda: store.progress(video_id, 1, "denoise", 3, 4),
        lambda: store.progress(video_id, 1, "decode", 4, 4),
        lambda: store.complete(video_id, 1, {}, {}),
    )
    assert [(name, data["state"], data["stage"], data["step"]) for name, _, data in events] == [
        ("progress", "queued", None, 0),
        ("progress", "in_progress", None, 0),
        ("progress", "in_progress", "text", 0),
        ("progress", "in_progress", "denoise", 1),
        ("progress", "in_progress", "denoise", 3),
        ("progress", "in_progress", "decode", 4),
        ("completed", "completed", None, 4),
    ]
    assert len({event_id for _, event_id, _ in events}) == 7
    assert all((data["id"], data["num_steps"], data["error"]) == (video_id, 4, None) for _, _, data in events)


def test_over_http_it_is_an_event_stream(service: Service) -> None:
    video_id = service.create()["id"]
    service.client.post(f"/v1/videos/{video_id}/cancel")
    answer = service.client.get(f"/v1/videos/{video_id}/events")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.text.startswith("retry: 2000\n\nid: 0-cancelled-0-0\nevent: cancelled\ndata: {")


@pytest.mark.parametrize(
    ("end", "name", "code"), [("fail", "failed", "gang_died_twice"), ("cancel", "cancelled", "cancelled")]
)
def test_a_job_that_does_not_end_well_says_why(service: Service, end: str, name: str, code: str) -> None:
    video_id = service.create()["id"]
    if end == "fail":
        service.store.claim(video_id, "test", 60.0)
        service.store.fail(video_id, 1, code, "its gang died twice")
    else:
        service.client.post(f"/v1/videos/{video_id}/cancel")
    ((event, _, data),) = told(service.gateway, video_id)
    assert (event, data["error"]["code"]) == (name, code)


def test_a_job_that_is_deleted_ends_its_stream(service: Service) -> None:
    video_id = service.create()["id"]
    events = told(service.gateway, video_id, lambda: service.client.delete(f"/v1/videos/{video_id}"))
    assert [(name, data["id"]) for name, _, data in events] == [("progress", video_id), ("deleted", video_id)]


def test_a_client_goes_on_from_its_last_event_at_any_gateway(service: Service) -> None:
    video_id = service.create(num_inference_steps=4)["id"]
    service.store.claim(video_id, "test", 60.0)
    service.store.progress(video_id, 1, "denoise", 2, 4)
    seen = str(Cursor(attempt=1, phase="denoise", step=2))
    with open_service(service.folder) as other:
        events = told(
            other.gateway,
            video_id,
            lambda: service.store.complete(video_id, 1, {}, {}),
            last=str(Cursor(attempt=1, phase="denoise", step=1)),
        )
    assert [(name, data["step"]) for name, _, data in events] == [("progress", 2), ("completed", 4)]
    again = told(service.gateway, video_id, last=seen)
    assert [name for name, _, _ in again] == ["completed"]
    # An EventSource comes back when a stream ends; 204 tells it not to.
    answer = service.client.get(f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": again[-1][1]})
    assert (answer.status_code, answer.content) == (204, b"")


def test_a_client_that_saw_an_attempt_which_died_is_told_of_the_next(service: Service) -> None:
    video_id = service.create()["id"]
    for attempt in (1, 2):
        service.store.claim(video_id, "test", 60.0)
        service.store.progress(video_id, attempt, "denoise", 1, 10)
        if attempt == 1:
            service.store.requeue(video_id, 1, gang_died=True)
    service.store.fail(video_id, 2, "x", "y")
    seen = str(Cursor(attempt=1, phase="denoise", step=1))
    assert [data["attempt"] for _, _, data in told(service.gateway, video_id, last=seen)] == [2]


@pytest.mark.parametrize(
    "text", ["", "nonsense", "1-denoise-1", "-1-denoise-1-0", "1-denoise-1-0 ", "\u0661-denoise-1-0"]
)
def test_an_id_that_is_none_of_ours_has_seen_nothing(text: str) -> None:
    assert Cursor.parse(text) == Cursor()


def test_a_cursor_reads_what_it_writes() -> None:
    for cursor in (Cursor(), Cursor(3, "denoise", 12, 10), Cursor(1, "completed", 10, 0)):
        assert Cursor.parse(str(cursor)) == cursor


def test_previews_come_as_pictures_once_each_and_before_the_end(service: Service) -> None:
    video_id = service.create(num_inference_steps=4, preview_every=2)["id"]
    store = service.store
    store.claim(video_id, "test", 60.0)

    def preview(step: int) -> None:
        key = f"jobs/{video_id}/attempts/1/preview-{step}.webp"
        service.artifacts.put(key, f"picture {step}".encode())
        store.preview(video_id, 1, step, key)
        store.progress(video_id, 1, "denoise", step, 4)

    preview(2)
    events = told(
        service.gateway,
        video_id,
        lambda: None,
        lambda: preview(4),
        lambda: None,
        lambda: store.complete(video_id, 1, {}, {}),
    )
    assert [name for name, _, _ in events] == ["preview", "progress", "preview", "progress", "completed"]
    pictures = [data for name, _, data in events if name == "preview"]
    assert [(one["step"], one["image"].partition(",")[0]) for one in pictures] == [
        (2, "data:image/webp;base64"),
        (4, "data:image/webp;base64"),
    ]
    assert base64.b64decode(pictures[1]["image"].partition(",")[2]) == b"picture 4"
    seen = next(event_id for name, event_id, data in events if name == "preview" and data["step"] == 4)
    assert [name for name, _, _ in told(service.gateway, video_id, last=seen)] == ["completed"]


def test_a_preview_that_is_gone_already_is_passed_over(service: Service) -> None:
    video_id = service.create(preview_every=2)["id"]
    service.store.claim(video_id, "test", 60.0)
    service.store.preview(video_id, 1, 2, f"jobs/{video_id}/attempts/1/preview-2.webp")
    service.store.fail(video_id, 1, "x", "y")
    assert [name for name, _, _ in told(service.gateway, video_id)] == ["failed"]


def test_the_time_that_is_left_is_estimated_from_measured_steps(service: Service) -> None:
    from serve.policy.cost import StepShape

    first = service.create(num_inference_steps=10)["id"]
    assert service.client.get(f"/v1/videos/{first}").json()["pusa"]["estimated_seconds_left"] is None
    request = service.job(first).request
    shape = StepShape(num_tokens=request.num_tokens, uses_guidance=request.uses_guidance)
    service.store.record_step_seconds("debug", {shape: 2.0})
    service.forget_estimates()
    assert service.client.get(f"/v1/videos/{first}").json()["pusa"]["estimated_seconds_left"] == 20.0
    service.store.claim(first, "test", 60.0)
    service.store.progress(first, 1, "denoise", 7, 10)
    assert service.client.get(f"/v1/videos/{first}").json()["pusa"]["estimated_seconds_left"] == 6.0
    assert service.job(service.create()["id"]).cost == 20.0
    service.store.complete(first, 1, {}, {})
    ((_, _, data),) = told(service.gateway, first)
    assert data["estimated_seconds_left"] == 0.0


def test_anothers_and_unknown_videos_have_no_events(service: Service) -> None:
    answer = service.client.get(f"/v1/videos/{ABSENT}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")


@pytest.mark.parametrize("notices", ["at the next change", "at the next sign of life"])
def test_a_key_that_is_revoked_ends_the_streams_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: str
) -> None:
    monkeypatch.setattr("serve.http.tenants.MEMORY_S", 0.0)
    if notices == "at the next sign of life":
        monkeypatch.setattr(events_module, "KEEP_ALIVE_S", 0.2)
    with open_service(tmp_path, require_keys=True) as service:
        key_id, secret = service.store.create_key("red")
        headers = {"Authorization": f"Bearer {secret}"}
        video_id = service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers).json()["id"]

        def revoke() -> None:
            service.store.revoke_key(key_id)
            if notices == "at the next change":
                service.store.claim(video_id, "test", 60.0)

        with service.client.stream("GET", f"/v1/videos/{video_id}/events", headers=headers) as answer:
            text = ""
            for chunk in answer.iter_text():
                text += chunk
                if "event: progress" in chunk:
                    revoke()
        assert [data["state"] for _, _, data in parsed(text)] == ["queued"]
        assert service.client.get(f"/v1/videos/{video_id}/events", headers=headers).status_code == 401


# What a stream costs.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    config = ServeConfig(model="debug", state_dir=str(tmp_path), max_event_streams=5)
    with running_server(config) as (url, gateway):
        yield url, gateway


def create(url: str) -> str:
    return httpx.post(f"{url}/v1/videos", json={"prompt": "a"}).json()["id"]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_tenant_has_a_bounded_number_of_streams_and_a_vanished_client_frees_its_own(server: tuple[str, Any]) -> None:
    url, gateway = server
    stream = f"GET /v1/videos/{create(url)}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    host, port = url.removeprefix("http://").split(":")
    clients = [socket.create_connection((host, int(port)), timeout=10) for _ in range(5)]
    for client in clients:
        client.sendall(stream)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert gateway._watch.num_watchers == 5
    refused = httpx.get(f"{url}/v1/videos/{create(url)}/events")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
    assert refused.headers["x-should-retry"] == "false"
    for client in clients:
        client.close()
    until(lambda: gateway._watch.num_watchers == 0)


def test_idle_streams_hold_no_thread_and_no_connection_and_share_one_query() -> None:
    readings: list[set[str]] = []

    def read(job_ids: Collection[str]) -> dict[str, int]:
        readings.append(set(job_ids))
        return dict.fromkeys(job_ids, 1)

    async def many() -> None:
        watch: Watch[int] = Watch(read, 0.02, 10_000, 10_000)
        num_threads = threading.active_count()
        num_told = 0

        async def stream(number: int) -> None:
            nonlocal num_told
            with watch.watch("red", f"job {number % 100}") as watcher:
                await watcher.next()
                num_told += 1
                await watcher.next()

        streams = [asyncio.ensure_future(stream(number)) for number in range(2000)]
        while num_told < 2000 or len(readings) < 5:  # noqa: ASYNC110 - a thread counts
            await asyncio.sleep(0.01)
        assert watch.num_watchers == 2000
        assert threading.active_count() <= num_threads + len(readings)  # of asyncio's pool, one reading at a time
        for task in streams:
            task.cancel()
        await asyncio.wait(streams)
        assert watch.num_watchers == 0
        assert watch._loop is not None
        await watch._loop  # nobody watches: nothing is read any more

    asyncio.run(many())
    assert all(reading == {f"job {number}" for number in range(100)} for reading in readings)


def test_a_database_that_is_away_for_a_moment_ends_no_stream() -> None:
    answers: Iterator[Any] = iter([OperationalError("SELECT", {}, Exception("down")), {"a": 1}, {"a": 2}])

    def read(_: Collection[str]) -> dict[str, int]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def watch_it() -> list[int | None]:
        watch: Watch[int] = Watch(read, 0.01, 10, 10)
        with watch.watch("red", "a") as watcher:
            return [await watcher.next(), await watcher.next()]

    assert asyncio.run(watch_it()) == [1, 2]


def test_who_comes_while_the_jobs_are_read_is_not_told_that_its_job_is_gone() -> None:
    is_reading, go_on = threading.Event(), threading.Event()

    def read(ids: Collection[str]) -> dict[str, int]:
        is_reading.set()
        assert go_on.wait(10)
        return dict.fromkeys(ids, 1)

    async def scenario() -> None:
        watch: Watch[int] = Watch(read, 0.01, 10, 10)
        with watch.watch("a", "first") as first:
            await asyncio.to_thread(is_reading.wait, 10)
            with watch.watch("a", "second") as second:
                go_on.set()
                assert await asyncio.wait_for(first.next(), 10) == 1
                assert await asyncio.wait_for(second.next(), 10) == 1

    asyncio.run(scenario())


def test_one_gateway_keeps_a_bounded_number_of_streams_in_all() -> None:
    async def too_many() -> None:
        watch: Watch[int] = Watch(lambda ids: dict.fromkeys(ids, 1), 0.01, 2, 10)
        with watch.watch("red", "a"), watch.watch("blue", "b"), pytest.raises(ServeError) as refusal:
            watch.watch("green", "c").__enter__()
        assert (refusal.value.status, refusal.value.code) == (503, "too_many_streams")

    asyncio.run(too_many())


def test_a_silent_stream_is_kept_alive(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "KEEP_ALIVE_S", 0.1)
    video_id = service.create()["id"]
    cancel = threading.Timer(1.0, service.client.post, (f"/v1/videos/{video_id}/cancel",))
    text = streamed(service.gateway, video_id, cancel.start)
    cancel.join()  # the stream may end before the answer to the cancel has come, and the client with it
    assert [name for name, _, _ in parsed(text)] == ["progress", "cancelled"]
    assert ": still here\n\n" in text
