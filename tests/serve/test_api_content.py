"""What a finished job is served as: its variants, ranges of them, and why there may be none."""

import pytest

from tests.serve.api_support import ABSENT, VARIANTS, Service, error_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_served_with_its_type(service: Service, variant: str) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    answer = service.client.get(f"/v1/videos/{video_id}/content", params={"variant": variant})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == VARIANTS[variant][1]
    assert answer.content == (b"0123456789" if variant == "video" else variant.encode())


@pytest.mark.parametrize(
    ("header", "status", "content", "content_range"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=4-2", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        (f"bytes={'9' * 5000}-", 200, b"0123456789", None),
    ],
)
def test_a_range_of_the_content_is_served(
    service: Service, header: str, status: int, content: bytes, content_range: str | None
) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    answer = service.client.get(f"/v1/videos/{video_id}/content", headers={"Range": header})
    assert (answer.status_code, answer.content) == (status, content)
    assert answer.headers.get("content-range") == content_range
    assert answer.headers["content-length"] == str(len(content))


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=99-100", "bytes=-0"])
def test_a_range_outside_the_content_is_refused(service: Service, header: str) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    answer = service.client.get(f"/v1/videos/{video_id}/content", headers={"Range": header})
    assert (answer.status_code, error_of(answer)["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */10"


def test_a_head_says_what_a_get_would(service: Service) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    url = f"/v1/videos/{video_id}/content"
    head, got = service.client.head(url), service.client.get(url)
    names = ("content-length", "content-type", "accept-ranges", "etag", "content-disposition")
    assert (head.status_code, head.content) == (200, b"")
    assert [head.headers[name] for name in names] == [got.headers[name] for name in names]
    assert service.client.head(f"/v1/videos/{ABSENT}/content").status_code == 404


def test_a_range_of_content_that_has_changed_gives_the_whole(service: Service) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    url = f"/v1/videos/{video_id}/content"
    etag = service.client.get(url).headers["etag"]
    same = service.client.get(url, headers={"Range": "bytes=0-1", "If-Range": etag})
    other = service.client.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert (same.status_code, other.status_code) == (206, 200)


def test_content_of_a_job_that_did_not_end_well_says_why(service: Service) -> None:
    failed, cancelled = service.create()["id"], service.create()["id"]
    service.store.claim(failed, "test", 60.0)
    service.store.fail(failed, 1, "gang_died", "its gang died twice")
    service.client.post(f"/v1/videos/{cancelled}/cancel")
    for video_id, code, reason in ((failed, "gang_died", "died twice"), (cancelled, "cancelled", "cancelled")):
        answer = service.client.get(f"/v1/videos/{video_id}/content")
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        assert error_of(answer)["code"] == code
        assert reason in error_of(answer)["message"]
    assert service.client.get(f"/v1/videos/{failed}").json()["error"] == {
        "code": "gang_died",
        "message": "its gang died twice",
    }


def test_content_that_is_no_longer_kept_is_a_404(service: Service) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    service.artifacts.delete(f"jobs/{video_id}")
    answer = service.client.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "content_expired")


def test_a_bucket_serves_content_by_redirect(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    video_id = service.create()["id"]
    service.finish(video_id)
    link = f"https://bucket.test/{video_id}?signature=x"
    monkeypatch.setattr(service.gateway.artifacts, "redirect_url", lambda *_: link)
    answer = service.client.get(f"/v1/videos/{video_id}/content", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (302, link)


def test_an_unknown_variant_is_refused_with_those_that_exist(service: Service) -> None:
    answer = service.client.get(f"/v1/videos/{ABSENT}/content?variant=gif")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "variant")
    assert "spritesheet" in error_of(answer)["message"]
