"""Keys: who is asked for one, what a bad file of them says, and that tenants do not see each other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pusa_dist.errors import ConfigError
from serve.http.errors import ServeError
from serve.http.tenants import LOCAL, Tenants
from tests.serve.api_support import Service, open_service

KEYS = "# teams\nred key-red\n\nblue key-blue\nred key-red-2\n"


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text(KEYS)
    return str(path)


@pytest.fixture
def service(tmp_path: Path, keys_file: str) -> Iterator[Service]:
    with open_service(tmp_path / "state", keys_file=keys_file) as opened:
        yield opened


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def test_without_keys_everyone_is_local() -> None:
    tenants = Tenants.from_file(None)
    assert tenants.authenticate(None) == tenants.authenticate("Bearer anything") == LOCAL


def test_a_key_names_its_tenant_and_a_tenant_may_have_several(keys_file: str) -> None:
    tenants = Tenants.from_file(keys_file)
    assert [tenants.authenticate(f"Bearer {name}") for name in ("key-red", "key-blue", "key-red-2")] == [
        "red",
        "blue",
        "red",
    ]
    assert tenants.authenticate("bearer  key-blue ") == "blue"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer key", "Basic key-red", "key-red", "Bearer key-red key-blue"]
)
def test_anything_else_is_refused(keys_file: str, header: str | None) -> None:
    with pytest.raises(ServeError) as refusal:
        Tenants.from_file(keys_file).authenticate(header)
    assert refusal.value.status == 401


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no keys"),
        ("# only a comment\n", "holds no keys"),
        ("red key-red\nsecret-alone\n", "line 2: write 'tenant key'"),
        ("red key-red\nblue key-red\n", "line 2: this key already belongs"),
        (f"{'r' * 129} key-red\n", "line 1: a tenant's name"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_keys_is_refused_without_showing_any(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as refusal:
        Tenants.from_file(str(path))
    assert "key-red" not in str(refusal.value)
    assert "secret-alone" not in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/videos"),
        ("POST", "/v1/videos"),
        ("POST", "/v1/videos/extensions"),
        ("GET", "/v1/videos/x"),
        ("DELETE", "/v1/videos/x"),
        ("POST", "/v1/videos/x/cancel"),
        ("GET", "/v1/videos/x/content"),
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ],
)
def test_every_route_needs_a_key_when_keys_are_configured(service: Service, method: str, path: str) -> None:
    answer = service.client.request(method, path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert service.client.request(method, path, headers=key("key-red")).status_code != 401


def test_a_tenant_cannot_see_stop_read_extend_or_delete_anothers_job(service: Service) -> None:
    client = service.client
    video_id = client.post("/v1/videos", json={"prompt": "a"}, headers=key("key-red")).json()["id"]
    service.finish(video_id)
    blue = key("key-blue")
    refusals = [
        client.get(f"/v1/videos/{video_id}", headers=blue),
        client.get(f"/v1/videos/{video_id}/content", headers=blue),
        client.post(f"/v1/videos/{video_id}/cancel", headers=blue),
        client.delete(f"/v1/videos/{video_id}", headers=blue),
        client.post("/v1/videos/extensions", json={"prompt": "a", "video": {"id": video_id}}, headers=blue),
    ]
    assert [(one.status_code, one.json()["error"]["code"]) for one in refusals] == [(404, "video_not_found")] * 5
    assert client.get("/v1/videos", headers=blue).json()["data"] == []
    mine = client.get("/v1/videos", headers=key("key-red-2")).json()["data"]
    assert [video["id"] for video in mine] == [video_id]


def test_one_tenants_idempotency_key_is_nothing_to_another(service: Service) -> None:
    ids = {
        service.client.post("/v1/videos", json={"prompt": "a"}, headers={**key(name), "Idempotency-Key": "k"}).json()[
            "id"
        ]
        for name in ("key-red", "key-blue", "key-red-2")
    }
    assert len(ids) == 2
