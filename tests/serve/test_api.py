"""The routes, without Ray: the video object, lists, content, cancelling, health, and what peers get wrong."""

import errno
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.serve.api_support import VARIANTS, Service, mp4, open_service, png, pusa

ABSENT = f"video_{'0' * 34}"
JSON = {"content-type": "application/json"}
VIDEO_KEYS = {
    "id",
    "object",
    "model",
    "status",
    "progress",
    "created_at",
    "completed_at",
    "expires_at",
    "prompt",
    "remixed_from_video_id",
    "seconds",
    "size",
    "error",
    "pusa",
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with open_service(tmp_path) as opened:
        yield opened


def error_of(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def test_a_new_video_has_every_key_of_the_contract_and_its_defaults_filled_in(service: Service) -> None:
    video = service.create()
    assert set(video) == VIDEO_KEYS
    assert video["object"] == "video"
    assert (video["status"], video["progress"], video["error"]) == ("queued", 0, None)
    assert (video["model"], video["prompt"], video["size"]) == ("debug", "a cat", "128x96")
    assert video["seconds"] == "2.125"
    assert isinstance(video["created_at"], int)
    facts = video["pusa"]
    assert (facts["state"], facts["step"], facts["num_steps"], facts["queue_position"]) == ("queued", 0, 10, 1)
    assert facts["request"]["seed"] == facts["seed"]
    assert facts["request"]["guidance_scale"] == 5.0
    assert facts["revision"] == "1"


def test_the_job_and_its_inputs_are_stored_before_the_answer(service: Service) -> None:
    data = png()
    answer = service.client.post("/v1/videos", data={"prompt": "a cat"}, files={"input_reference": ("cat", data)})
    job = service.job(answer.json()["id"])
    assert [(one.kind, one.width, one.height) for one in job.inputs] == [("image", 64, 48)]
    assert service.artifacts.read(job.inputs[0].key) == data
    assert [entry.position for entry in job.request.conditioning] == [0]


def test_json_and_multipart_say_the_same_things(service: Service) -> None:
    fields = {
        "conditioning": [
            {"input": 1, "position": "start", "noise_multiplier": 0.0},
            {"input": 0, "position": {"frame": 16}, "source": -1},
        ],
        "num_inference_steps": 4,
        "seed": 7,
        "lora_alpha": 1.2,
        "priority": "batch",
    }
    clip, image = mp4(), png()
    form = service.client.post(
        "/v1/videos",
        data={"prompt": "a cat", "size": "64x64", "seconds": "2.5", "model": "debug", "pusa": json.dumps(fields)},
        files=[("input_reference[]", ("a.mp4", clip)), ("input_reference[]", ("b.png", image))],
    )
    references = [{"image_url": data_url("video/mp4", clip)}, {"image_url": data_url("image/png", image)}]
    common = {"prompt": "a cat", "size": "64x64", "seconds": 2.5, "input_reference": references}
    nested = service.create(**common, pusa=fields)
    as_text = service.create(**common, pusa=json.dumps(fields))
    plain = service.create(**common, **fields)
    requests = [service.job(video["id"]).request for video in (form.json(), nested, as_text, plain)]
    assert requests[0] == requests[1] == requests[2] == requests[3]
    assert requests[0].num_frames == 17
    assert service.job(form.json()["id"]).priority == "batch"
    assert [one.kind for one in service.job(nested["id"]).inputs] == ["clip", "image"]


def test_a_data_url_may_ride_in_a_multipart_text_part_as_the_stock_client_writes_it(service: Service) -> None:
    answer = service.client.post(
        "/v1/videos", data={"prompt": "a", "input_reference[image_url]": data_url("image/png", png())}
    )
    assert answer.status_code == 200
    assert service.job(answer.json()["id"]).inputs[0].kind == "image"


def data_url(content_type: str, data: bytes) -> str:
    import base64

    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


def test_a_drawn_seed_is_reported_and_differs(service: Service) -> None:
    seeds = {service.create()["pusa"]["seed"] for _ in range(4)}
    assert len(seeds) == 4
    assert service.create(seed=7)["pusa"]["seed"] == 7


def test_progress_moves_with_the_steps_and_reaches_100_only_when_there_is_content(service: Service) -> None:
    video_id = service.create(num_inference_steps=4)["id"]
    assert service.store.claim(video_id, "test", 60.0) is not None
    seen = []
    for step in range(5):
        service.store.progress(video_id, 1, "denoise", step, 4)
        video = service.client.get(f"/v1/videos/{video_id}").json()
        assert (video["status"], video["pusa"]["stage"], video["pusa"]["step"]) == ("in_progress", "denoise", step)
        seen.append(video["progress"])
    assert seen == [0, 25, 50, 75, 99]
    service.store.complete(video_id, 1, {}, {"denoise": 2.0})
    video = service.client.get(f"/v1/videos/{video_id}").json()
    assert (video["status"], video["progress"]) == ("completed", 100)
    assert video["expires_at"] > video["completed_at"] >= video["created_at"]
    assert video["pusa"]["stage_seconds"] == {"denoise": 2.0}


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


def test_cancelling_ends_a_queued_job_at_once_and_asks_a_running_one(service: Service) -> None:
    queued, running = service.create()["id"], service.create()["id"]
    service.store.claim(running, "test", 60.0)
    stopped = service.client.post(f"/v1/videos/{queued}/cancel").json()
    assert (stopped["status"], stopped["error"]["code"], stopped["pusa"]["state"]) == (
        "failed",
        "cancelled",
        "cancelled",
    )
    assert service.client.post(f"/v1/videos/{running}/cancel").json()["status"] == "in_progress"
    assert service.store.cancel_requests([running]) == {running}
    assert service.client.post(f"/v1/videos/{queued}/cancel").status_code == 200
    done = service.create()["id"]
    service.finish(done)
    answer = service.client.post(f"/v1/videos/{done}/cancel")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "already_finished")


def test_deleting_removes_the_job_its_inputs_and_its_results(service: Service) -> None:
    image = data_url("image/png", png())
    done, running = (service.create(input_reference={"image_url": image})["id"] for _ in range(2))
    service.finish(done)
    service.store.claim(running, "test", 60.0)
    for video_id in (done, running):
        assert service.client.delete(f"/v1/videos/{video_id}").json()["deleted"] is True
        assert service.client.get(f"/v1/videos/{video_id}").status_code == 404
        assert service.client.get(f"/v1/videos/{video_id}/content").status_code == 404
    assert service.stored_files() == []
    assert service.store.cancel_requests([running]) == {running}
    assert service.client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_join_to_the_whole_list(service: Service, order: str) -> None:
    ids = [service.create()["id"] for _ in range(5)]
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 2, "order": order}
    while True:
        page = service.client.get("/v1/videos", params=params).json()
        assert page["object"] == "list"
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        seen += [video["id"] for video in page["data"]]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    assert seen == (ids if order == "asc" else ids[::-1])


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "x"}, "after"),
    ],
)
def test_a_list_with_impossible_parameters_is_refused(service: Service, params: dict[str, Any], param: str) -> None:
    answer = service.client.get("/v1/videos", params=params)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_a_misspelt_query_parameter_is_refused(service: Service) -> None:
    for url in ("/v1/videos?limt=3", f"/v1/videos/{ABSENT}/content?varient=thumbnail"):
        answer = service.client.get(url)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "unknown_field")


def test_an_unknown_variant_is_refused_with_those_that_exist(service: Service) -> None:
    answer = service.client.get(f"/v1/videos/{ABSENT}/content?variant=gif")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "variant")
    assert "spritesheet" in error_of(answer)["message"]


# Extension.


def given_frames(service: Service, video: dict[str, Any]) -> list[tuple[int, int | None, float]]:
    request = service.job(video["id"]).request
    return [(one.position, one.source, one.noise_multiplier) for one in request.conditioning]


@pytest.mark.parametrize(
    ("clip_frames", "seconds", "expected"),
    [
        (33, "2.125", [(0, -4, 0.0), (1, -3, 0.3), (2, -2, 0.4), (3, -1, 0.5)]),
        (9, "2.125", [(0, -3, 0.0), (1, -2, 0.3), (2, -1, 0.4)]),
        (33, "1.125", [(0, -2, 0.0), (1, -1, 0.3)]),
    ],
)
def test_an_extension_continues_from_the_last_frames_of_an_uploaded_clip(
    service: Service, clip_frames: int, seconds: str, expected: list[tuple[int, int, float]]
) -> None:
    answer = service.client.post(
        "/v1/videos/extensions",
        data={"prompt": "on", "seconds": seconds, "pusa": pusa(num_inference_steps=3)},
        files={"video": ("clip.mp4", mp4(clip_frames))},
    )
    assert answer.status_code == 200, answer.text
    assert given_frames(service, answer.json()) == expected
    assert answer.json()["pusa"]["num_steps"] == 3


@pytest.mark.parametrize("body", ["form", "json"])
def test_an_extension_of_a_finished_video_copies_it_and_keeps_its_format(service: Service, body: str) -> None:
    source = service.create(size="64x80", fps=4)["id"]
    clip = mp4(17)
    service.finish(source, video=clip)
    url = "/v1/videos/extensions"
    extended = (
        service.client.post(url, data={"prompt": "on", "video[id]": source, "seconds": "3"})
        if body == "form"
        else service.client.post(url, json={"prompt": "on", "video": {"id": source}, "seconds": "3"})
    )
    assert extended.status_code == 200, extended.text
    job = service.job(extended.json()["id"])
    assert extended.json()["size"] == "64x80"
    assert (job.request.fps, job.request.num_frames) == (4, 9)
    assert service.artifacts.read(job.inputs[0].key) == clip
    assert [one.source for one in job.request.conditioning] == [-2, -1]


def test_what_cannot_be_extended_is_refused(service: Service) -> None:
    unfinished = service.create()["id"]

    def refusal(**request: Any) -> tuple[int, str]:
        answer = service.client.post("/v1/videos/extensions", **request)
        return answer.status_code, error_of(answer)["code"]

    image, clip = {"video": ("a", png())}, {"video": ("a", mp4())}
    assert refusal(json={"prompt": "on", "video": {"id": unfinished}}) == (409, "video_not_ready")
    assert refusal(json={"prompt": "on", "video": {"id": ABSENT}}) == (404, "video_not_found")
    half_a_pair = {"content": r'{"prompt": "on", "video": {"id": "\ud800"}}', "headers": JSON}
    assert refusal(**half_a_pair) == (404, "video_not_found")
    assert refusal(json={"prompt": "on"}) == (400, "one_video")
    assert refusal(data={"prompt": "on"}, files=image) == (400, "not_a_clip")
    assert refusal(data={"prompt": "on", "pusa": pusa(num_frames=1)}, files=clip) == (400, "too_short")
    given = pusa(conditioning=[{"position": 0}])
    assert refusal(data={"prompt": "on", "pusa": given}, files=clip) == (400, "conflict")
    assert len(service.client.get("/v1/videos").json()["data"]) == 1


# Models and health.


def test_the_model_is_listed_with_limits_defaults_and_tasks(service: Service) -> None:
    listed = service.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"]) == ("debug", "model")
    assert model["pusa"]["limits"]["max_prompt_tokens"] == 512
    assert model["pusa"]["limits"]["max_steps"] == 50
    assert model["pusa"]["defaults"]["lora_alpha"] == {"main": 1.4}
    assert "extension" in model["pusa"]["tasks"]
    assert service.client.get("/v1/models/debug").json() == model
    assert error_of(service.client.get("/v1/models/gpt"))["code"] == "model_not_found"


def test_health_tells_ready_from_starting(service: Service) -> None:
    answer = service.client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    service.ready["Denoiser"] = False
    answer = service.client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")
    assert answer.json()["deployments"] == {"Gateway": True, "Denoiser": False}


# Errors that are nobody's field.


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/videos", 404, "unknown_route"),
        ("GET", "/v1/videos/", 404, "unknown_route"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("GET", f"/v1/videos/{ABSENT}", 404, "video_not_found"),
        ("GET", "/v1/videos/video_0", 404, "video_not_found"),
        ("GET", "/v1/videos/%00", 404, "video_not_found"),
        ("DELETE", f"/v1/videos/{ABSENT}", 404, "video_not_found"),
        ("POST", f"/v1/videos/{ABSENT}/cancel", 404, "video_not_found"),
        ("GET", f"/v1/videos/{ABSENT}/content", 404, "video_not_found"),
        ("POST", "/v1/videos/edits", 400, "not_supported"),
        ("POST", "/v1/videos/characters", 400, "not_supported"),
        ("GET", "/v1/videos/characters/c1", 400, "not_supported"),
        ("POST", f"/v1/videos/{ABSENT}/remix", 400, "not_supported"),
    ],
)
def test_refusals_have_the_openai_shape_and_say_what_to_use(
    service: Service, method: str, path: str, status: int, code: str
) -> None:
    answer = service.client.request(method, path)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert answer.headers["x-request-id"].startswith("req_")
    assert any(word in error_of(answer)["message"] for word in ("use ", "GET ", "listed at"))


def test_what_nobody_expected_is_logged_with_its_id_and_shows_nothing_inside(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service.gateway, "get", broken)
    with caplog.at_level(logging.ERROR):
        answer = service.client.get(f"/v1/videos/{ABSENT}")
    assert (answer.status_code, error_of(answer)["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    request_id = answer.headers["x-request-id"]
    assert request_id in error_of(answer)["message"]
    assert request_id in caplog.text
    assert "RuntimeError at" in caplog.text
    assert "test_api.py" in caplog.text
    assert "secret" not in caplog.text


def test_inputs_are_removed_when_the_job_cannot_be_written(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(service.gateway._store, "create", broken)
    answer = service.client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a", png())})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_unavailable")
    assert service.stored_files() == []


def test_an_upload_that_finds_the_disk_full_is_refused_and_leaves_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serve.store.artifacts.os.fsync", full)
    answer = service.client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a", png())})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_unavailable")
    assert (service.stored_files(), service.store.counts()) == ([], {})


def test_a_database_that_does_not_answer_is_a_503_and_the_service_goes_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    with monkeypatch.context() as patch:
        patch.setattr(service.gateway._store, "page", locked)
        answer = service.client.get("/v1/videos")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_unavailable")
    assert service.client.get("/v1/videos").status_code == 200


# The faults of peers, as numbered in the contract; each is a test for us.


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
