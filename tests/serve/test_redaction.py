"""What is secret stays so: no prompt, key, path or URL's credential in any log line or refusal, even at DEBUG."""

import base64
import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pusa_dist.errors import GangError
from serve.http.fetch import FetchError
from serve.http.views import error_view
from serve.stages import ReplicaLostError
from tests.serve.api_support import mp4, open_service, png
from tests.serve.dispatcher_support import run

PROMPT, NEGATIVE = "prompt-5ecret", "negative-5ecret"
URL = "https://user5ecret:pass5ecret@media.test/path5ecret/a.png?token=query5ecret"
WEBHOOK = "https://hooks.test/hook5ecret?token=hooktoken5ecret"
FILE_NAME = "../../name5ecret.png"
IDEMPOTENCY = "idempotency-5ecret"
SECRET = "5ecret"


@pytest.fixture
def service(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.INFO)
    with open_service(tmp_path / "state-5ecret", require_keys=True) as opened:
        yield opened


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def bodies():
    """Orders that are taken and orders that are refused, each with secrets wherever there is room for one."""
    ours = {"negative_prompt": NEGATIVE, "webhook": WEBHOOK}
    good = {"prompt": PROMPT, "pusa": ours}
    yield {"json": good}
    yield {"json": {**good, "input_reference": {"image_url": data_url(png())}}}
    yield {"json": {**good, "input_reference": {"image_url": URL}}}
    yield {"json": {**good, "input_reference": {"image_url": URL.replace("https", "http")}}}
    yield {"json": {**good, "input_reference": {"image_url": f"ftp://{URL}"}}}
    yield {"json": {**good, "input_reference": {"image_url": data_url(b"no picture") + SECRET}}}
    yield {"json": {**good, "input_reference": {"image_url": data_url(b"no picture " + SECRET.encode())}}}
    yield {"json": {**good, "input_reference": {"image_url": data_url(png()[:99])}}}
    yield {"json": {"prompt": [PROMPT]}}
    yield {"json": {"prompt": {"text": PROMPT}}}
    yield {"json": {"prompt": PROMPT, "pusa": {"negative_prompt": [NEGATIVE]}}}
    yield {"json": {"prompt": PROMPT, "pusa": {**ours, "webhook": WEBHOOK.replace("https", "http")}}}
    yield {"json": {"prompt": PROMPT, "pusa": {**ours, "webhook": [WEBHOOK]}}}
    yield {"json": {"prompt": PROMPT, "pusa": json.dumps(ours) + "{"}}
    yield {"json": {"prompt": PROMPT * 3000}}
    yield {"json": {"prompt": PROMPT, "size": "13x13"}}
    yield {
        "content": f'{{"prompt": "{PROMPT}", "prompt": "{PROMPT}"}}',
        "headers": {"content-type": "application/json"},
    }
    yield {"content": f'{{"prompt": "{PROMPT}', "headers": {"content-type": "application/json"}}
    yield {"content": PROMPT, "headers": {"content-type": "text/plain"}}
    form = {"prompt": PROMPT, "pusa": json.dumps(ours)}
    yield {"data": form, "files": {"input_reference": (FILE_NAME, png())}}
    yield {"data": form, "files": {"input_reference": (FILE_NAME, mp4()[:500])}}
    yield {"data": form, "files": {"input_reference": (FILE_NAME, b"text " + SECRET.encode())}}
    yield {"data": {**form, "input_reference[image_url]": URL}}
    yield {"data": {**form, "input_reference": URL}, "files": {"x": ("", b"")}}
    yield {
        "content": b"--b\r\nbroken " + PROMPT.encode(),
        "headers": {"content-type": "multipart/form-data; boundary=b"},
    }


def test_nothing_secret_is_logged_or_told(service, caplog):
    key = service.key("tenant")
    secret_of_key = key["Authorization"].removeprefix("Bearer ")
    statuses, told = [], []
    for number, body in enumerate(bodies()):
        headers = {**key, **body.pop("headers", {}), "Idempotency-Key": f"{IDEMPOTENCY}-{number}"}
        answer = service.client.post("/v1/videos", headers=headers, **body)
        statuses.append(answer.status_code)
        if answer.status_code >= 400:
            told.append(answer.text)
    # The same key for something else.
    reused = {**key, "Idempotency-Key": f"{IDEMPOTENCY}-0"}
    told.append(service.client.post("/v1/videos", headers=reused, json={"prompt": "other"}).text)
    for wrong in ("Bearer wrong5ecret", "Basic dXNlcjo1ZWNyZXQ=", "wrong5ecret"):
        told.append(service.client.get("/v1/videos", headers={"Authorization": wrong}).text)
    assert statuses.count(200) >= 3
    assert all(status in (200, 400, 413, 415) for status in statuses)
    assert [SECRET in text for text in told] == [False] * len(told), [text for text in told if SECRET in text]
    logged = [line for line in caplog.text.splitlines() if SECRET in line or secret_of_key in line]
    assert logged == []
    assert (len(told) > 20, "accepted with 1 inputs" in caplog.text) == (True, True)  # there was something to leak


def test_a_url_that_fails_to_be_fetched_is_told_to_nobody(tmp_path, caplog):
    class Unreachable:
        async def get(self, url, max_bytes):
            raise FetchError("unreachable", "no public https server answers there")

        def close(self):
            pass

    caplog.set_level(logging.DEBUG)
    with open_service(tmp_path) as service:
        service.gateway.media._client = Unreachable()
        body = {"prompt": PROMPT, "input_reference": {"image_url": URL}}
        answer = service.client.post("/v1/videos", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "media_url_unreachable")
    assert SECRET not in answer.text + caplog.text


def test_a_disk_that_is_full_is_told_without_its_paths(service, caplog, monkeypatch):
    def put(key, data):
        raise OSError(errno.ENOSPC, "No space left on device", f"/mnt/{SECRET}/{key}")

    monkeypatch.setattr(service.gateway.artifacts, "put", put)
    body = {"prompt": PROMPT, "input_reference": {"image_url": data_url(png())}}
    answer = service.client.post("/v1/videos", headers=service.key("tenant"), json=body)
    assert answer.status_code == 503
    assert SECRET not in answer.text
    # A traceback may name our own files; no line of it names the disk's.
    assert [line for line in caplog.text.splitlines() if f"/mnt/{SECRET}" in line] == []


@pytest.mark.parametrize(
    ("stage", "error", "code"),
    [
        ("denoise", GangError, "gang_died_twice"),
        ("decode", ReplicaLostError, "replica_lost"),
    ],
)
def test_what_is_said_of_a_lost_process_is_for_the_log_and_not_for_the_jobs_owner(world, caplog, stage, error, code):
    said = f"ray::Rank.step() (pid=42, ip=10.20.30.41) /mnt/{SECRET}/path.py in the job of another tenant"
    world.add("j")

    async def scenario():
        world.stages.faults["j", stage] = [error(said)] * 100
        async with world.dispatcher():
            await world.ended("j")

    with caplog.at_level(logging.INFO):
        run(scenario)
    told = error_view("failed", world.job("j").error_code, world.job("j").error_message)
    assert told.code == code
    assert [word for word in (SECRET, "10.20.30.41", "pid", "/") if word in told.message] == []
    assert [line for line in caplog.text.splitlines() if SECRET in line and code in line] != []


def test_a_setting_that_is_not_known_is_named_without_its_value(tmp_path: Path) -> None:
    config = tmp_path / "service.yaml"
    config.write_text("database_ur1: postgresql+psycopg://serve:hunter2@db/videos\n")
    done = subprocess.run(
        [sys.executable, "-m", "serve", "keys", "list", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "database_ur1" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
