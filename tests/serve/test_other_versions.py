"""Jobs that another version of the service wrote, on a store that both use: what this one answers, and still does."""

from pathlib import Path

import pytest

from serve.commands.tenants import remove_erased
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Job, JobStore, UnreadableRowError
from serve.sweeper import sweep
from tests.serve.api_support import Service, error_of
from tests.serve.store_support import Clock, created, made_by_another_version


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


@pytest.mark.parametrize(
    ("method", "rest"), [("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel")]
)
def test_what_this_version_cannot_read_is_a_503_with_a_code_and_a_remedy(
    service: Service, method: str, rest: str
) -> None:
    video_id = service.create()["id"]
    made_by_another_version(service.store, video_id)
    answer = service.client.request(method, f"/v1/videos/{video_id}{rest}")
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (503, "unreadable_job", "video_id")
    assert "DELETE" in error["message"]
    assert answer.headers["retry-after"]
    assert service.store.progress_of([video_id])[video_id].status == ("cancelled" if method == "POST" else "queued")


def test_a_job_that_cannot_be_read_is_deleted_and_its_place_in_a_list_is_left_out(service: Service) -> None:
    first, foreign, last = (service.create()["id"] for _ in range(3))
    made_by_another_version(service.store, foreign)
    listed = service.client.get("/v1/videos").json()
    assert [video["id"] for video in listed["data"]] == [last, first]
    assert service.client.delete(f"/v1/videos/{foreign}").status_code == 200
    assert service.client.delete(f"/v1/videos/{foreign}").status_code == 404
    assert not [path for path in service.stored_files() if foreign in path.as_posix()]


def test_a_retry_of_what_cannot_be_read_makes_no_second_job(service: Service) -> None:
    made_by_another_version(service.store, service.create()["id"])
    again = service.client.post("/v1/videos", json={"prompt": "a cat"}, headers={"x-stainless-retry-count": "1"})
    assert (again.status_code, error_of(again)["code"]) == (503, "unreadable_job")
    assert service.store.counts() == {"queued": 1}


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("readable", [{0, 5, 9}, {4}, {0, 1, 2, 3}, {6, 7, 8, 9}, set(), set(range(10))])
def test_pages_join_to_every_job_that_can_be_read(store: JobStore, order: str, readable: set[int]) -> None:
    made = [created(store, created_at=1_000.0 + index) for index in range(10)]
    for index in set(range(10)) - readable:
        made_by_another_version(store, made[index].id)
    seen: list[Job] = []
    has_more = True
    while has_more:
        page, has_more = store.page("a", seen[-1].id if seen else None, 2, order)  # type: ignore[arg-type]
        assert len(page) == 2 or not has_more
        seen += page
    expected = [made[index].id for index in sorted(readable, reverse=order == "desc")]
    assert [job.id for job in seen] == expected


def test_an_unreadable_job_is_said_to_be_one(store: JobStore) -> None:
    job = created(store)
    made_by_another_version(store, job.id)
    with pytest.raises(UnreadableRowError) as caught:
        store.get("a", job.id)
    assert caught.value.job_id == job.id
    assert store.delete("a", job.id)


def test_any_number_of_jobs_that_cannot_be_read_keep_no_other_from_being_forgotten(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.sweeper._PAGE", 3)
    made = [created(store, expires_at=clock.now - 10 + index) for index in range(5)]
    for job in made:
        store.request_cancel("a", job.id)
    for job in made[:4]:
        made_by_another_version(store, job.id, inputs=None if job is made[0] else [])
    assert [sweep(store, artifacts, clock.now + 1).forgotten for _ in range(2)] == [3, 2]


def test_a_tenant_is_erased_with_what_cannot_be_read(store: JobStore, artifacts: ArtifactStore) -> None:
    made = [created(store) for _ in range(3)]
    for job in made:
        artifacts.put(job.inputs[0].key, b"private")
    made_by_another_version(store, made[1].id)
    store.erase_tenant("a")
    assert remove_erased(store, artifacts) == 3
    assert (artifacts.jobs(), store.counts()) == ([], {})
