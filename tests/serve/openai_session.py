"""Run by test_openai_client.py in a process of its own: a user's session with the official client.

python openai_session.py MAJOR BASE_URL FOLDER KEY
"""

import json
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

MAJOR, BASE_URL, FOLDER, KEY = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
PNG = (FOLDER / "a.png").read_bytes()
MP4 = (FOLDER / "a.mp4").read_bytes()


def refused(kind: type[openai.APIStatusError], call: Any, *args: Any, **kwargs: Any) -> openai.APIStatusError:
    with pytest.raises(kind) as refusal:
        call(*args, **kwargs)
    assert refusal.value.request_id
    return refusal.value


assert int(openai.__version__.split(".")[0]) == MAJOR, openai.__version__
client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY)
videos = client.videos

# Create, poll, retrieve.
created = videos.create(prompt="leave queued", model="debug", seconds="2", size="64x64")  # type: ignore[arg-type]
assert (created.object, created.status, created.size) == ("video", "queued", "64x64")
assert isinstance(created.seconds, str)
done = videos.create_and_poll(
    prompt="a cat",
    input_reference=("a.png", PNG, "image/png"),
    extra_body={"pusa": json.dumps({"num_inference_steps": 4, "seed": 7})},
)
assert (done.status, done.progress, done.error) == ("completed", 100, None)
assert done.completed_at is not None
assert done.pusa["seed"] == 7  # type: ignore[attr-defined]
assert videos.retrieve(done.id) == done

# A job that fails, and one that is cancelled, end the poll with their reason.
failed = videos.create_and_poll(prompt="please fail")
assert failed.status == "failed"
assert failed.error is not None
assert failed.error.code == "gang_died"
cancelled = client.post(f"/videos/{created.id}/cancel", cast_to=type(created))
assert cancelled.status == "failed"
assert cancelled.error is not None
assert cancelled.error.code == "cancelled"

# Several files, placed.
keyframes = videos.create(
    prompt="two pictures",
    input_reference=[("a.png", PNG, "image/png"), ("b.mp4", MP4, "video/mp4")],  # type: ignore[arg-type]
    extra_body={"pusa": json.dumps({"conditioning": [{"position": "start"}, {"position": "end", "source": -1}]})},
)
assert [entry["position"] for entry in keyframes.pusa["request"]["conditioning"]] == [0, 4]  # type: ignore[attr-defined]

# Content of every variant.
assert videos.download_content(done.id).read() == MP4
for variant in ("video", "thumbnail", "spritesheet"):
    assert videos.download_content(done.id, variant=variant).read()  # type: ignore[arg-type]
assert videos.download_content(done.id, variant="frames").read() == b"frames"  # type: ignore[arg-type]
with videos.with_streaming_response.download_content(done.id) as streamed:
    assert b"".join(streamed.iter_bytes()) == MP4

# Extension, of an upload and of a video made here.
extended = videos.extend(prompt="it goes on", seconds="2", video=("a.mp4", MP4, "video/mp4"))  # type: ignore[arg-type]
assert videos.poll(extended.id).status == "completed"
by_id = videos.extend(
    prompt="it goes on",
    seconds="2",
    video=openai.omit,
    extra_body={"video": {"id": done.id}},  # type: ignore[arg-type]
)
assert videos.poll(by_id.id).status == "completed"

# A list over several pages.
everything = list(videos.list(limit=2, order="asc"))
assert [video.id for video in everything] == [created.id, done.id, failed.id, keyframes.id, extended.id, by_id.id]
first_page = videos.list(limit=2)
assert [video.id for video in first_page.data] == [by_id.id, extended.id]
assert first_page.has_next_page()

# Models.
assert [model.id for model in client.models.list()] == ["debug"]
assert client.models.retrieve("debug").pusa["limits"]["max_steps"] == 50  # type: ignore[attr-defined]

# Errors have their class, code and param.
error = refused(openai.BadRequestError, videos.create, prompt="a", size="100x100")
assert (error.code, error.param) == ("invalid_size", "size")
error = refused(openai.BadRequestError, videos.create, prompt="a", extra_body={"pusa": json.dumps({"sed": 1})})
assert (error.code, error.param) == ("unknown_field", "pusa.sed")
error = refused(openai.NotFoundError, videos.retrieve, "video_0")
assert error.code == "video_not_found"
error = refused(openai.NotFoundError, videos.create, prompt="a", model="sora-2")
assert (error.code, error.param) == ("model_not_found", "model")
error = refused(openai.ConflictError, videos.download_content, videos.create(prompt="leave queued").id)
assert error.code == "video_not_ready"
error = refused(openai.BadRequestError, videos.remix, done.id, prompt="again")
assert error.code == "not_supported"
error = refused(openai.BadRequestError, videos.edit, prompt="again", video=("a.mp4", MP4, "video/mp4"))
assert error.code == "not_supported"
error = refused(openai.BadRequestError, videos.create_character, name="x", video=("a.mp4", MP4, "video/mp4"))
assert error.code == "not_supported"
error = refused(openai.BadRequestError, videos.get_character, "c1")
assert error.code == "not_supported"
stranger = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="wrong")
error = refused(openai.AuthenticationError, stranger.videos.list)
assert error.code == "invalid_api_key"
too_large = ("a.png", b"x" * 3_000_000, "image/png")
error = refused(openai.APIStatusError, videos.create, prompt="a", input_reference=too_large)
assert (error.status_code, error.code) == (413, "body_too_large")

# Delete.
deleted = videos.delete(done.id)
assert (deleted.id, deleted.object, deleted.deleted) == (done.id, "video.deleted", True)
refused(openai.NotFoundError, videos.retrieve, done.id)
sys.stdout.write("session complete\n")
