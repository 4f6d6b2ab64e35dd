"""The faults of peers, as numbered in the contract: each is a test for us. Requests sent again are among them."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serve.config import ServeConfig
from serve.http.api import create_api
from serve.http.gateway import Gateway
from serve.http.idempotency import Origin
from serve.http.uploads import IncomingBody
from tests.serve.api_support import Service, error_of, open_service, png, pusa


def test_peer_fault_1_no_state_of_a_job_shows_as_a_fifth_status(service: Service) -> None:
    seen = set()
    for end in ("queued", "running", "completed", "failed", "cancelled", "stopped"):
        video_id = service.create()["id"]
        if end == "cancelled":
            service.store.request_cancel("local", video_id)
        elif end != "queued":
            service.store.claim(video_id, "test", 60.0)
        if end == "completed":
            service.store.complete(video_id, 1, {}, {})
        if end == "failed":
            service.store.fail(video_id, 1, "x", "y")
        if end == "stopped":
            service.store.cancelled(video_id, 1)
        seen.add(service.client.get(f"/v1/videos/{video_id}").json()["status"])
    assert seen == {"queued", "in_progress", "completed", "failed"}


def test_peer_fault_2_delete_answers_with_a_deletion(service: Service) -> None:
    video_id = service.create()["id"]
    answer = service.client.delete(f"/v1/videos/{video_id}").json()
    assert answer == {"id": video_id, "object": "video.deleted", "deleted": True}


def test_peer_fault_3_an_empty_list_ends_the_paging(service: Service) -> None:
    assert service.client.get("/v1/videos").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_peer_fault_4_no_error_has_a_detail(service: Service) -> None:
    answers = [
        service.client.get("/nowhere"),
        service.client.get("/v1/videos?limit=0"),
        service.client.post("/v1/videos", content=b"x"),
        service.client.post("/v1/videos", json={}),
        service.client.post("/v1/videos", content=b"x", headers={"content-type": "multipart/form-data"}),
        service.client.post("/v1/videos", content=b"x", headers={"content-type": "multipart/form-data; boundary=b"}),
    ]
    assert all(400 <= answer.status_code < 500 and error_of(answer) for answer in answers)


@pytest.mark.parametrize("name", ["input_reference", "input_reference[]"])
def test_peer_fault_5_several_files_may_have_either_name(service: Service, name: str) -> None:
    answer = service.client.post(
        "/v1/videos",
        data={"prompt": "a", "pusa": pusa(conditioning=[{"position": "start"}, {"position": "end"}])},
        files=[(name, ("a.png", png(64, 48))), (name, ("b.png", png(48, 64)))],
    )
    assert answer.status_code == 200, answer.text
    assert [one.width for one in service.job(answer.json()["id"]).inputs] == [64, 48]


def test_peer_fault_6_seconds_is_a_string(service: Service) -> None:
    assert service.create(seconds=1, fps=5)["seconds"] == "1"
    assert service.create(seconds="3", fps=3)["seconds"] == "3"


def test_peer_fault_7_content_of_an_unfinished_job_is_a_409_with_a_code(service: Service) -> None:
    video_id = service.create()["id"]
    answer = service.client.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "video_not_ready")
    assert answer.headers["x-should-retry"] == "false"


def test_peer_fault_8_any_replica_answers_for_any_job(service: Service) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    with open_service(service.folder) as other:
        assert other.client.get(f"/v1/videos/{video_id}").json()["status"] == "completed"
        assert other.client.get(f"/v1/videos/{video_id}/content").content == b"0123456789"
        assert [video["id"] for video in other.client.get("/v1/videos").json()["data"]] == [video_id]


def test_peer_fault_9_clients_are_told_how_often_to_poll(service: Service) -> None:
    created = service.client.post("/v1/videos", json={"prompt": "a"})
    polled = service.client.get(f"/v1/videos/{created.json()['id']}")
    assert [one.headers["openai-poll-after-ms"] for one in (created, polled)] == ["500", "500"]


def test_peer_fault_10_a_retry_of_the_client_makes_no_second_job(service: Service) -> None:
    def send(retry: str, prompt: str = "a") -> str:
        files = {"input_reference": ("a", png())}
        headers = {"x-stainless-retry-count": retry}
        return service.client.post("/v1/videos", data={"prompt": prompt}, files=files, headers=headers).json()["id"]

    first = send("0")
    assert send("1") == first
    assert send("2") == first
    assert send("9" * 5000) == first
    assert send("0") != first
    assert send("1", prompt="another") != first


def test_the_last_retry_of_a_client_that_waited_for_each_answer_makes_no_second_job(tmp_path: Path) -> None:
    now = 1_800_000_000.0

    async def ready() -> dict[str, bool]:
        return {}

    gateway = Gateway(ServeConfig(state_dir=str(tmp_path)), ready, clock=lambda: now)
    with TestClient(create_api(gateway)) as client:

        def send(at: float, retries: int) -> str:
            nonlocal now
            now = 1_800_000_000.0 + at
            headers = {"x-stainless-retry-count": str(retries)}
            return client.post("/v1/videos", json={"prompt": "a"}, headers=headers).json()["id"]

        first = send(0, 0)
        # Ten minutes for each answer, and a pause before the next attempt.
        assert [send(601, 1), send(1202, 2)] == [first, first]
        assert send(4000, 1) != first
    gateway.close()


@pytest.mark.parametrize(
    ("text", "counted"), [("", 0), ("0", 0), ("-1", 0), ("1x", 0), ("02", 2), ("11", 10), ("9" * 5000, 10)]
)
def test_how_far_back_a_retry_looks_is_bounded(text: str, counted: int) -> None:
    origin = Origin.of("create", {"x-stainless-retry-count": text}, IncomingBody({}, ()), 10_000.0)
    assert (origin.num_retries, origin.is_retry) == (counted, counted > 0)
    assert origin.repeats_since == 10_000.0 - 900.0 * counted


def test_an_idempotency_key_makes_one_job_and_cannot_be_used_for_another(service: Service) -> None:
    headers = {"Idempotency-Key": "k1"}
    answers = [service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers) for _ in range(2)]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    other = service.client.post("/v1/videos", json={"prompt": "b"}, headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")
    long = service.client.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": "k" * 256})
    assert (long.status_code, error_of(long)["param"]) == (400, "Idempotency-Key")


def test_equal_requests_with_one_key_at_the_same_moment_make_one_job(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers).json()["id"]
    # The second looked before the first was written: only the database can tell.
    lookups = iter([None])
    find = service.gateway._store.find_by_key
    monkeypatch.setattr(service.gateway._store, "find_by_key", lambda *args: next(lookups, find(*args)))
    second = service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)
    assert second.json()["id"] == first
    assert len(service.client.get("/v1/videos").json()["data"]) == 1
