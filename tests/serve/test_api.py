"""The routes, without Ray: the video object, progress, lists, cancelling, models, health and refusals."""

import errno
import json
import logging
from typing import Any

import pytest
from sqlalchemy.exc import InternalError, OperationalError

from tests.serve.api_support import ABSENT, Service, data_url, error_of, mp4, png

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


def test_cancelling_ends_a_queued_job_at_once_and_asks_a_running_one(service: Service) -> None:
    queued, running = service.create()["id"], service.create()["id"]
    service.store.claim(running, "test", 60.0)
    assert service.store.claim(queued, "test", 60.0)
    for name in ("inputs/0", "attempts/1/preview-2.webp", "checkpoints/1-2"):
        service.gateway.artifacts.put(f"jobs/{queued}/{name}", b"x")
    assert service.store.checkpoint(queued, 1, f"jobs/{queued}/checkpoints/1-2", 2)
    assert service.store.requeue(queued, 1, gang_died=False)
    stopped = service.client.post(f"/v1/videos/{queued}/cancel").json()
    assert [path.name for path in service.stored_files()] == ["0"]
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


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT", {}, Exception("database is locked")),
        InternalError("SELECT", {}, Exception("cannot execute UPDATE in a read-only transaction")),
    ],
)
def test_a_database_that_does_not_answer_is_a_503_and_the_service_goes_on(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def away(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(service.gateway._store, "page", away)
        answer = service.client.get("/v1/videos")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_unavailable")
    assert service.client.get("/v1/videos").status_code == 200
