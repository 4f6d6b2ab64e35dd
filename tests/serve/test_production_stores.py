"""The same gateway over PostgreSQL and a bucket: nothing of a job is on the machine that accepted it."""

from pathlib import Path

import httpx
import pytest

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
