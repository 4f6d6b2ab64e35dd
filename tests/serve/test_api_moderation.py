"""Moderation: asked before a job is accepted and before a result is published, and nothing passes without it."""

import asyncio
import errno
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pusa_dist.errors import ConfigError, RequestError
from serve import moderation_example
from serve.moderation import Finished, Moderation, ModerationUnavailableError, Submission
from serve.store.artifacts import StorageError
from tests.serve.api_support import Service, open_service, png
from tests.serve.dispatcher_support import add_long, stored

EXAMPLE = "serve.moderation_example:refuse_listed"


def broken(subject: Submission | Finished) -> str | None:
    raise RuntimeError(f"no answer about {subject.request.prompt}")


def recorded(subjects: list[Any]) -> Callable[[Any], None]:
    return subjects.append


def post(service: Service, prompt: str) -> Any:
    return service.client.post("/v1/videos", data={"prompt": prompt}, files={"input_reference": ("a", png())})


def test_the_example_refuses_a_prompt_and_nothing_is_stored(tmp_path: Path) -> None:
    with open_service(tmp_path, moderation=EXAMPLE) as service:
        answer = post(service, "a Deepfake of a king")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "moderation_refused", "prompt")
        assert "its prompt asks for what is not made here" in error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert (service.stored_files(), service.store.counts()) == ([], {})
        assert post(service, "a king").status_code == 200


def test_the_hook_sees_what_was_asked_and_the_files_that_came(tmp_path: Path) -> None:
    subjects: list[Any] = []
    with open_service(tmp_path) as service:
        service.gateway._intake._moderation = Moderation(recorded(subjects))
        post(service, "a king")
    (submission,) = subjects
    assert isinstance(submission, Submission)
    assert (submission.tenant, submission.request.prompt, submission.inputs) == ("local", "a king", (png(),))


def test_a_hook_that_fails_lets_nothing_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_service(tmp_path) as service, caplog.at_level(logging.INFO):
        service.gateway._intake._moderation = Moderation(broken)
        answer = post(service, "a king")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moderation_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert (service.stored_files(), service.store.counts()) == ([], {})
    assert "RuntimeError" in caplog.text
    assert "a king" not in caplog.text


def test_a_result_can_be_refused_before_anybody_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects: list[Any] = []
    with open_service(tmp_path) as service:
        job = service.job(service.create()["id"])
        keys = {variant: f"jobs/{job.id}/attempts/1/{variant}" for variant in ("video", "thumbnail")}
        for variant, key in keys.items():
            service.artifacts.put(key, variant.encode())
        Moderation(recorded(subjects)).check_result(job, keys, service.artifacts)
        (finished,) = subjects
        assert isinstance(finished, Finished)
        assert (finished.job_id, finished.variants) == (job.id, {"video", "thumbnail"})
        assert finished.read("thumbnail") == b"thumbnail"

        example = Moderation.load(EXAMPLE)
        example.check_result(job, keys, service.artifacts)
        monkeypatch.setattr(moderation_example, "FILES", {hashlib.sha256(b"video").hexdigest()})
        with pytest.raises(RequestError, match="the video was refused: it is on the operator's list") as refusal:
            example.check_result(job, keys, service.artifacts)
        assert refusal.value.code == "moderation_refused"
        with pytest.raises(ModerationUnavailableError):
            Moderation(broken).check_result(job, keys, service.artifacts)


def test_a_result_that_cannot_be_read_is_no_failure_of_the_hook(tmp_path: Path) -> None:
    def away(_: str) -> bytes:
        raise StorageError(errno.EIO, "no answer")

    def reading(subject: Any) -> None:
        subject.read("video")

    with open_service(tmp_path) as service:
        job = service.job(service.create()["id"])
        service.artifacts.read = away  # type: ignore[method-assign]
        with pytest.raises(StorageError):
            Moderation(reading).check_result(job, {"video": "jobs/j/video"}, service.artifacts)


def test_it_is_off_by_default(tmp_path: Path) -> None:
    Moderation.load(None).check_submission("local", None, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["", "serve.moderation_example", "serve.moderation_example:nothing", "serve.nowhere:hook", ":hook",
             "serve.moderation_example:WORDS"]
)  # fmt: skip
def test_a_hook_that_does_not_exist_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigError, match="moderation="):
        Moderation.load(name)


# Before a result is published, by the dispatcher.


@pytest.mark.parametrize(("hook", "code"), [(lambda _: "no", "moderation_refused"), (broken, "moderation_unavailable")])
def test_a_job_whose_result_is_refused_fails_with_a_code_and_leaves_no_file(world: Any, hook: Any, code: str) -> None:
    world.add("j")

    async def scenario() -> None:
        async with world.dispatcher(moderation=Moderation(hook)):
            await world.ended("j")

    asyncio.run(scenario())
    job = world.job("j")
    assert (job.status, job.error_code, dict(job.results)) == ("failed", code, {})
    assert stored(world, "j") == []


def test_what_passes_is_published_and_a_preview_that_does_not_is_not_shown(world: Any) -> None:
    seen = []

    def no_previews(subject: Submission | Finished) -> str | None:
        assert isinstance(subject, Finished)
        seen.append((subject.job_id, sorted(subject.variants)))
        return "not yet" if "preview" in subject.variants else None

    add_long(world, "j", preview_every=2)

    async def scenario() -> None:
        async with world.dispatcher(moderation=Moderation(no_previews)):
            await world.ended("j")

    asyncio.run(scenario())
    job = world.job("j")
    assert (job.status, set(job.results), job.preview_step) == ("completed", {"video"}, None)
    assert ("j", ["preview"]) in seen
    assert ("j", ["video"]) in seen
