"""Keys: who is asked for one, how soon a revoked one ends, and that tenants do not see each other on any route."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.routing import Route

from serve.http.errors import ServeError
from serve.http.tenants import LOCAL, MAX_REMEMBERED, MEMORY_S, Tenants
from tests.serve.api_support import ABSENT, Service, open_service

KEY = "pusa_" + "k" * 43


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with open_service(tmp_path / "state", require_keys=True) as opened:
        yield opened


class Keys:
    """A table of keys that counts how often it is asked."""

    def __init__(self, **tenants: str) -> None:
        self.tenants = tenants
        self.num_asked = 0

    def __call__(self, key: str) -> str | None:
        self.num_asked += 1
        return self.tenants.get(key)


def tenant_of(tenants: Tenants, header: str | None) -> str:
    return asyncio.run(tenants.authenticate(header))


def refused(tenants: Tenants, header: str | None) -> bool:
    try:
        tenant_of(tenants, header)
    except ServeError as error:
        return error.status == 401
    return False


def test_without_keys_everyone_is_local() -> None:
    tenants = Tenants(None)
    assert tenant_of(tenants, None) == tenant_of(tenants, "Bearer anything") == LOCAL


def test_a_key_names_its_tenant_and_is_looked_up_once_in_a_while() -> None:
    now, keys = [0.0], Keys(**{KEY: "red"})
    tenants = Tenants(keys, lambda: now[0])
    assert [tenant_of(tenants, f"{scheme} {KEY} ") for scheme in ("Bearer", "bearer", "BEARER")] == ["red"] * 3
    assert keys.num_asked == 1
    now[0] = MEMORY_S + 0.1
    assert tenant_of(tenants, f"Bearer {KEY}") == "red"
    assert keys.num_asked == 2


def test_a_revoked_key_is_refused_when_the_memory_ends_and_a_new_one_works_at_once() -> None:
    now, keys = [0.0], Keys(**{KEY: "red"})
    tenants = Tenants(keys, lambda: now[0])
    other = KEY.replace("k", "x")
    assert refused(tenants, f"Bearer {other}")
    keys.tenants = {other: "red"}
    assert tenant_of(tenants, f"Bearer {other}") == "red"
    assert tenant_of(tenants, f"Bearer {other}") == "red"
    keys.tenants = {}
    now[0] = MEMORY_S + 0.1
    assert refused(tenants, f"Bearer {other}")


def test_the_memory_of_keys_is_bounded() -> None:
    class Everybody:
        def __call__(self, key: str) -> str:
            return key[-5:]

    tenants = Tenants(Everybody())

    async def everybody_comes() -> None:
        for number in range(3 * MAX_REMEMBERED):
            assert await tenants.authenticate(f"Bearer {KEY[:-5]}{number:05}") == f"{number:05}"

    asyncio.run(everybody_comes())
    assert len(tenants._known) == MAX_REMEMBERED


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer key", f"Basic {KEY}", KEY, f"Bearer {KEY} {KEY}",
     "Bearer pusa_\u00ff\u00fe", "Bearer pusa_\x00", f"Bearer {KEY}{'k' * 10_000}"],
)  # fmt: skip
def test_anything_else_is_refused(header: str | None) -> None:
    assert refused(Tenants(Keys(**{KEY: "red"})), header)


@pytest.mark.parametrize(
    "header", [b"Bearer \xff\xfe\x80", b"\xe2\x98\x83", b"Bearer pusa_\xc3\xa9", b"Bearer " + b"\x80" * 5000]
)
def test_garbage_in_the_header_is_a_clean_401(service: Service, header: bytes) -> None:
    answer = service.client.get("/v1/videos", headers=[(b"authorization", header)])
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_that_the_operator_revokes_ends_without_a_restart(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, secret = service.store.create_key("red")
    headers = {"Authorization": f"Bearer {secret}"}
    assert service.client.get("/v1/videos", headers=headers).status_code == 200
    service.store.revoke_key(key_id)
    service.gateway.tenants._known.clear()  # as after MEMORY_S seconds
    assert service.client.get("/v1/videos", headers=headers).status_code == 401


def test_a_database_that_does_not_answer_is_a_503_and_not_a_wrong_key(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def locked(_: str) -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    headers = service.key("red")
    monkeypatch.setattr(service.gateway.tenants, "_tenant_of_key", locked)
    with caplog.at_level(logging.ERROR):
        answer = service.client.get("/v1/videos", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
    assert headers["Authorization"] not in caplog.text


def routes(service: Service) -> list[tuple[str, str]]:
    """Every method and path template of the API."""
    app: Any = service.client.app
    paths = app.openapi()["paths"]
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    served = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    return sorted(documented | served)


def test_every_route_needs_a_key_when_keys_are_required(service: Service) -> None:
    headers = service.key("red")
    everything = [*routes(service), ("GET", "/nowhere")]
    assert ("GET", "/v1/videos/{video_id}/events") in everything
    for method, path in everything:
        url = path.replace("{video_id}", ABSENT)
        answer = service.client.request(method, url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), url
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert service.client.request(method, url, headers=headers).status_code != 401


@pytest.mark.parametrize("state", ["queued", "in_progress", "completed", "failed", "cancelled"])
def test_on_every_route_anothers_video_answers_exactly_as_one_that_never_was(service: Service, state: str) -> None:
    red, blue = service.key("red"), service.key("blue")
    video_id = service.client.post("/v1/videos", json={"prompt": "a"}, headers=red).json()["id"]
    if state == "completed":
        service.finish(video_id)
    elif state == "cancelled":
        service.client.post(f"/v1/videos/{video_id}/cancel", headers=red)
    elif state != "queued":
        service.store.claim(video_id, "test", 60.0)
    if state == "failed":
        service.store.fail(video_id, 1, "x", "y")
    before = service.job(video_id, "red")

    with_id = [(method, path) for method, path in routes(service) if "{video_id}" in path]
    assert len(with_id) >= 6
    for method, path in with_id:
        answers = [
            told(service.client.request(method, path.replace("{video_id}", one), headers=blue), one)
            for one in (video_id, ABSENT)
        ]
        assert answers[0] == answers[1], (method, path)
        assert answers[0][0] == (400 if path.endswith("/remix") else 404)
    extensions = [
        told(
            service.client.post("/v1/videos/extensions", json={"prompt": "a", "video": {"id": one}}, headers=blue), one
        )
        for one in (video_id, ABSENT)
    ]
    assert extensions[0] == extensions[1]
    assert extensions[0][0] == 404
    pages = [service.client.get("/v1/videos", params={"after": one}, headers=blue).json() for one in (video_id, ABSENT)]
    assert pages[0]["data"] == pages[1]["data"] == []
    assert service.job(video_id, "red") == before


def told(answer: Any, video_id: str) -> tuple[Any, ...]:
    """All that an answer says, with the id that was asked for blotted out."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}
    return answer.status_code, headers, answer.text.replace(video_id, "ID")


def test_a_tenant_sees_its_jobs_with_each_of_its_keys(service: Service) -> None:
    one, other = service.key("red"), service.key("red")
    video_id = service.client.post("/v1/videos", json={"prompt": "a"}, headers=one).json()["id"]
    assert [video["id"] for video in service.client.get("/v1/videos", headers=other).json()["data"]] == [video_id]


def test_one_tenants_idempotency_key_is_nothing_to_another(service: Service) -> None:
    one, other = service.key("red"), service.key("red")
    ids = {
        service.client.post("/v1/videos", json={"prompt": "a"}, headers={**key, "Idempotency-Key": "k"}).json()["id"]
        for key in (one, service.key("blue"), other)
    }
    assert len(ids) == 2


def test_an_erased_tenant_makes_no_jobs(service: Service) -> None:
    headers = service.key("red")
    assert service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers).status_code == 200
    service.store.erase_tenant("red")
    answer = service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "tenant_erased")
    service.gateway.tenants._known.clear()
    assert service.client.get("/v1/videos", headers=headers).status_code == 401
