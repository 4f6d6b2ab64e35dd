"""What a gateway, the webhooks and moderation tell whoever measures."""

import asyncio
import time

import pytest

from pusa_dist.errors import RequestError
from serve.http.gateway import Gateway
from serve.moderation import Moderation, ModerationUnavailableError
from serve.webhooks import BACK_OFF_S, Webhooks
from tests.serve import api_support
from tests.serve.api_support import open_service, png


class Measured:
    def __init__(self):
        self.told = []

    def accepted(self, priority):
        self.told.append(("accepted", priority))

    def rejected(self, code, status):
        self.told.append((code, status))

    def moderated(self, subject, result):
        self.told.append((subject, result))

    def decoder_failed(self):
        self.told.append("decoder")


@pytest.fixture
def measured(monkeypatch):
    measures = Measured()
    monkeypatch.setattr(api_support, "Gateway", lambda *arguments: Gateway(*arguments, measures=measures))
    return measures


def test_every_answer_that_is_an_error_is_counted_by_its_code(tmp_path, measured):
    with open_service(tmp_path, require_keys=True) as service:
        key = service.key("tenant")
        service.client.post("/v1/videos", headers=key, json={"prompt": "a", "pusa": {"priority": "batch"}})
        service.client.post("/v1/videos", headers=key, json={"prompt": "a", "size": "13x13"})
        service.client.post("/v1/videos", headers=key, json={"prompt": "a" * 3_000_000})
        service.client.post("/v1/videos", json={"prompt": "a"})
        service.client.get("/v1/videos/video_0", headers=key)
        service.client.get("/nowhere", headers=key)
        service.client.delete("/v1/models", headers=key)
        service.client.get("/v1/videos?limit=x", headers=key)
        service.client.get("/v1/models", headers=key)
    codes = [told[0] for told in measured.told]
    assert codes == [
        "accepted", "invalid_size", "body_too_large", "invalid_api_key", "video_not_found", "unknown_route",
        "method_not_allowed", "invalid_value",
    ]  # fmt: skip
    assert measured.told[0] == ("accepted", "batch")
    assert measured.told[2:4] == [("body_too_large", 413), ("invalid_api_key", 401)]


def test_what_breaks_unexpectedly_is_counted_too(tmp_path, measured, monkeypatch):
    with open_service(tmp_path) as service:
        monkeypatch.setattr(service.gateway, "page", None)
        assert service.client.get("/v1/videos").status_code == 500
    assert measured.told == [("internal_error", 500)]


def test_moderation_is_counted_wherever_it_is_asked(tmp_path, measured):
    with open_service(tmp_path, moderation="serve.moderation_example:refuse_listed") as service:
        service.client.post("/v1/videos", data={"prompt": "a king"}, files={"input_reference": ("a", png())})
        service.client.post("/v1/videos", json={"prompt": "a deepfake"})
    assert measured.told == [
        ("request", "passed"), ("accepted", "interactive"), ("request", "refused"), ("moderation_refused", 400)
    ]  # fmt: skip


def test_a_hook_that_fails_is_counted():
    told = []

    def broken(subject):
        raise RuntimeError

    with pytest.raises(ModerationUnavailableError):
        Moderation(broken, lambda *verdict: told.append(verdict)).check_submission("local", None, [])
    with pytest.raises(RequestError):
        Moderation(lambda _: "no", lambda *verdict: told.append(verdict)).check_submission("local", None, [])
    assert told == [("request", "failed"), ("request", "refused")]


def test_every_try_of_a_webhook_is_counted(tmp_path):
    told = []
    answers = [500] * (len(BACK_OFF_S) + 1) + [200]

    class Receiver:
        async def post(self, url, headers, content):
            return answers.pop(0)

    async def deliver(now):
        webhooks = Webhooks(service.store, Receiver(), on_try=told.append)
        await webhooks.run_once(now)
        await webhooks.idle()

    with open_service(tmp_path) as service:
        service.finish(service.create(webhook="https://hooks.test/a")["id"])
        now = time.time()
        for number in range(len(BACK_OFF_S) + 1):
            asyncio.run(deliver(now + number * 100_000.0))
        service.finish(service.create(webhook="https://hooks.test/b")["id"])
        asyncio.run(deliver(time.time() + 1))
    assert told == ["postponed"] * len(BACK_OFF_S) + ["given_up", "delivered"]
