"""Quotas: what is refused and how a client is told, that no two take the last place, and what is left."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve.http.intake import Intake
from serve.policy.quota import Quota
from tests.serve.api_support import Service, open_service, png

SECONDS_A_STEP = 2.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    from serve.policy.cost import StepShape

    with open_service(tmp_path) as opened:
        # 160 tokens, 10 steps: a job of the defaults costs 20 s of a gang, and every other in proportion.
        request = opened.job(opened.create()["id"]).request
        shape = StepShape(num_tokens=request.num_tokens, uses_guidance=request.uses_guidance)
        opened.store.record_step_seconds("debug", {shape: SECONDS_A_STEP})
        opened.client.delete(f"/v1/videos/{opened.client.get('/v1/videos').json()['data'][0]['id']}")
        opened.forget_estimates()
        yield opened


def post(service: Service, **fields: Any) -> Any:
    return service.client.post("/v1/videos", json={"prompt": "a", **fields})


def refusal(answer: Any) -> tuple[str, str | None, bool, int | None]:
    """(code, param, whether the stock client tries again, Retry-After)."""
    assert answer.status_code == 429, answer.text
    error = answer.json()["error"]
    assert error["type"] == "rate_limit_error"
    wait = answer.headers.get("retry-after")
    retries = answer.headers.get("x-should-retry") != "false"
    return error["code"], error["param"], retries, None if wait is None else int(wait)


def test_a_queue_that_is_full_says_to_come_back_soon(service: Service) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(max_queued=2)))
    first = post(service).json()["id"]
    assert post(service).status_code == 200
    assert refusal(post(service)) == ("too_many_queued", None, True, 10)
    service.client.post(f"/v1/videos/{first}/cancel")
    assert post(service).status_code == 200


def test_too_many_requests_a_minute_say_when_the_next_minute_begins(service: Service) -> None:
    if time.time() % 60 > 50:
        time.sleep(11)
    used = service.store.use("local", time.time()).requests
    service.store.set_tenant("local", limits=asdict(Quota(requests_per_minute=used + 1)))
    assert post(service).status_code == 200
    code, param, retries, wait = refusal(post(service))
    assert (code, param, retries) == ("rate_limit_exceeded", None, True)
    assert wait is not None
    assert 0 < wait <= 60
    assert abs((time.time() + wait) % 60 - 0.5) <= 1.5


def test_what_is_refused_for_what_it_says_or_holds_is_a_request_of_its_minute_too(service: Service) -> None:
    if time.time() % 60 > 50:
        time.sleep(11)
    service.store.set_tenant("local", limits=asdict(Quota(requests_per_minute=3)))
    assert post(service, size="odd").status_code == 400
    damaged = {"input_reference": ("a.png", png()[:-2000])}
    assert service.client.post("/v1/videos", data={"prompt": "a"}, files=damaged).status_code == 400
    first = post(service)
    assert first.status_code == 200
    assert refusal(post(service))[0] == "rate_limit_exceeded"
    # A repetition is no request of its own.
    again = service.client.post("/v1/videos", json={"prompt": "a"}, headers={"x-stainless-retry-count": "1"})
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


def test_a_day_that_is_used_up_is_not_retried_by_itself_but_says_when_it_ends(service: Service) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(cost_per_day=50.0)))
    assert [post(service).status_code for _ in range(2)] == [200, 200]
    code, param, retries, wait = refusal(post(service))
    assert (code, param, retries) == ("daily_cost_exceeded", None, False)
    assert wait is not None
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    assert abs(time.time() + wait - midnight.timestamp()) <= 2
    assert post(service, num_inference_steps=4).status_code == 200


def test_what_can_never_be_is_refused_for_good(service: Service) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(cost_per_day=15.0, max_tokens=10_000)))
    assert refusal(post(service)) == ("cost_over_quota", "pusa.num_inference_steps", False, None)
    service.store.set_tenant("local", limits=asdict(Quota(max_tokens=100)))
    assert refusal(post(service)) == ("shape_over_quota", "size", False, None)
    assert post(service, size="64x64", num_frames=5).status_code == 200


def test_running_jobs_are_not_refused_they_wait(service: Service) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(max_running=1)))
    assert [post(service).status_code for _ in range(3)] == [200] * 3


def test_a_refused_job_leaves_nothing_behind_and_its_media_are_not_even_looked_at(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(max_queued=0)))

    def upload() -> Any:
        return service.client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a", png())})

    looked_at: list[Any] = []
    probe = service.gateway.media.probe
    monkeypatch.setattr(service.gateway.media, "probe", lambda *args: looked_at.append(args) or probe(*args))
    assert refusal(upload())[0] == "too_many_queued"
    assert looked_at == []
    # A place may be taken between the first look and the transaction: that refusal, too, leaves no file.
    monkeypatch.setattr(Intake, "_check_room", lambda *_: None)
    assert refusal(upload())[0] == "too_many_queued"
    assert len(looked_at) == 1
    assert service.stored_files() == []
    assert service.store.counts() == {}


@pytest.mark.parametrize(
    ("quota", "code"), [({"max_queued": 7}, "too_many_queued"), ({"cost_per_day": 150.0}, "daily_cost_exceeded")]
)
def test_fifty_creates_at_once_take_no_place_twice(service: Service, quota: dict[str, Any], code: str) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(**quota)))
    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda number: post(service, prompt=f"cat {number}"), range(50)))
    assert Counter(answer.status_code for answer in answers) == {200: 7, 429: 43}
    assert {refusal(answer)[0] for answer in answers if answer.status_code == 429} == {code}
    assert service.store.counts() == {"queued": 7}


def test_a_repetition_is_told_of_its_job_and_not_of_a_limit(service: Service) -> None:
    service.store.set_tenant("local", limits=asdict(Quota(max_queued=1)))
    first = post(service).json()["id"]
    again = service.client.post("/v1/videos", json={"prompt": "a"}, headers={"x-stainless-retry-count": "1"})
    assert (again.status_code, again.json()["id"]) == (200, first)


def test_usage_tells_what_was_used_today_and_on_other_days_and_what_is_left(service: Service) -> None:
    service.store.set_tenant(
        "local",
        weight=2.0,
        limits=asdict(Quota(requests_per_minute=1000, max_queued=5, max_running=3, cost_per_day=100.0)),
    )
    done, _ = (post(service, seconds="1", fps=5).json()["id"] for _ in range(2))
    service.finish(done)
    service.store.charge("local", 12.5)
    usage = service.client.get("/v1/usage").json()
    today = datetime.now(UTC).date().isoformat()
    assert usage["object"] == "usage"
    assert (usage["tenant"], usage["weight"]) == ("local", 2.0)
    assert usage["today"] == {
        "day": today,
        "requests": 3,  # the fixture made one
        "completed": 1,
        "gang_seconds": 12.5,
        "video_seconds": 1.0,
    }
    assert usage["days"] == [usage["today"]]
    assert usage["limits"] == {
        "requests_per_minute": 1000,
        "max_queued": 5,
        "max_running": 3,
        "gang_seconds_per_day": 100.0,
        "max_tokens": None,
    }
    assert usage["left"]["queued"] == 4
    assert 990 <= usage["left"]["requests_this_minute"] <= 1000
    cost_left = service.job(service.client.get("/v1/videos").json()["data"][0]["id"]).cost
    assert usage["left"]["gang_seconds_today"] == pytest.approx(100 - 12.5 - cost_left)


def test_usage_without_quotas_is_unlimited_and_of_the_asker_alone(tmp_path: Path) -> None:
    with open_service(tmp_path, require_keys=True) as service:
        red, blue = service.key("red"), service.key("blue")
        service.client.post("/v1/videos", json={"prompt": "a"}, headers=red)
        assert service.client.get("/v1/usage", headers=red).json()["today"]["requests"] == 1
        usage = service.client.get("/v1/usage", headers=blue).json()
    assert (usage["tenant"], usage["today"]["requests"], usage["days"]) == ("blue", 0, [])
    assert set(usage["left"].values()) == {None}


@pytest.mark.parametrize(("days", "status"), [(1, 200), (366, 200), (0, 400), (367, 400), ("x", 400)])
def test_usage_goes_back_a_bounded_number_of_days(service: Service, days: Any, status: int) -> None:
    answer = service.client.get("/v1/usage", params={"days": days})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["param"] == "days"


def test_the_place_in_the_queue_follows_the_fair_order(tmp_path: Path) -> None:
    with open_service(tmp_path, require_keys=True) as service:
        red, blue = service.key("red"), service.key("blue")

        def ordered(headers: dict[str, str], **fields: Any) -> str:
            return service.client.post("/v1/videos", json={"prompt": "a", **fields}, headers=headers).json()["id"]

        reds = [ordered(red, priority="batch"), *(ordered(red) for _ in range(3))]
        blues = [ordered(blue) for _ in range(2)]
        service.forget_estimates()
        places = {
            one: service.client.get(f"/v1/videos/{one}", headers=headers).json()["pusa"]["queue_position"]
            for headers, ids in ((red, reds), (blue, blues))
            for one in ids
        }
        # Blue came later and does not wait for all of red's; red's batch job gives way to its interactive ones.
        assert sorted(places.values()) == [1, 2, 3, 4, 5, 6]
        assert max(places[one] for one in blues) <= 4
        assert places[reds[0]] == 6
        service.store.claim(reds[1], "test", 60.0)
        service.forget_estimates()
        running = service.client.get(f"/v1/videos/{reds[1]}", headers=red).json()["pusa"]
        assert running["queue_position"] is None
