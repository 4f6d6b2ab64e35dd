"""The same gateway over PostgreSQL and a bucket: nothing of a job is on the machine that accepted it."""

import errno
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest

from serve.store.artifacts import ArtifactStore, StorageError
from tests.serve.api_support import open_service, png

pytestmark = [
    # aiobotocore and moto's server close their sockets when collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_a_job_goes_through_postgres_and_a_bucket(tmp_path: Path, postgres_url: str, bucket: str) -> None:
    with open_service(tmp_path, database_url=postgres_url, artifacts_url=bucket) as service:
        client = service.client
        prompt = "a cat \u732b with a NUL \x00"
        answer = client.post("/v1/videos", data={"prompt": prompt}, files={"input_reference": ("a", png())})
        assert answer.status_code == 200, answer.text
        video_id = answer.json()["id"]
        assert client.get(f"/v1/videos/{video_id}").json()["prompt"] == prompt
        assert service.artifacts.read(service.job(video_id).inputs[0].key) == png()
        service.finish(video_id)
        found = client.get(f"/v1/videos/{video_id}/content?variant=video", follow_redirects=False)
        assert found.status_code == 302
        content = httpx.get(found.headers["location"])
        assert (content.content, content.headers["content-type"]) == (b"0123456789", "video/mp4")
        assert client.delete(f"/v1/videos/{video_id}").status_code == 200
        assert httpx.get(found.headers["location"]).status_code >= 400
        assert list(tmp_path.rglob("*")) == []


def error_code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_bucket_that_is_away_is_a_503_for_as_long_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="away")
    image = {"input_reference": ("a", png())}
    with open_service(tmp_path, artifacts_url="s3://away/prefix") as service:

        def ask() -> Any:
            return service.client.post("/v1/videos", data={"prompt": "a"}, files=image)

        kept = ask().json()["id"]
        server.stop()
        refused = ask()
        assert error_code(refused) == (503, "storage_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert service.store.counts() == {"queued": 1}
        # What needs no file goes on; a deletion is promised, and kept by the sweeper.
        assert service.client.get(f"/v1/videos/{kept}").status_code == 200
        assert service.client.delete(f"/v1/videos/{kept}").status_code == 200
        assert service.client.get(f"/v1/videos/{kept}").status_code == 404
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
        server.start()
        client.create_bucket(Bucket="away")
        assert ask().status_code == 200
    server.stop()
    client.close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_full_disk_is_a_503_that_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ArtifactStore, key: str, data: bytes) -> None:
        raise StorageError(errno.ENOSPC, "No space left on device")

    with open_service(tmp_path) as service:
        with monkeypatch.context() as disk:
            disk.setattr(ArtifactStore, "put", full)
            refused = service.client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a", png())})
        assert error_code(refused) == (503, "storage_unavailable")
        assert "x-should-retry" not in refused.headers or refused.headers["x-should-retry"] == "true"
        assert service.store.counts() == {}
        assert service.stored_files() == []


def test_content_that_cannot_be_read_is_a_503_and_no_half_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: ArtifactStore, key: str) -> int:
        raise StorageError(errno.EIO, "Input/output error")

    with open_service(tmp_path) as service:
        video_id = service.create()["id"]
        service.finish(video_id)
        with monkeypatch.context() as disk:
            disk.setattr(ArtifactStore, "size", failing)
            assert error_code(service.client.get(f"/v1/videos/{video_id}/content")) == (503, "storage_unavailable")
        assert service.client.get(f"/v1/videos/{video_id}/content").status_code == 200
