"""What the end-to-end tests do over HTTP."""

import logging
import time

import httpx

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a poll


def create(client: httpx.Client, prompt="a cat", size="128x96", **pusa):
    response = client.post("/v1/videos", json={"prompt": prompt, "size": size, "pusa": pusa})
    response.raise_for_status()
    return response.json()["id"]


def retrieve(client, job_id):
    return client.get(f"/v1/videos/{job_id}").raise_for_status().json()


def until(client, job_id, condition, timeout_s=60.0, pause_s=0.03):
    """Poll until the video satisfies the condition; returns it."""
    deadline = time.monotonic() + timeout_s
    while not condition(video := retrieve(client, job_id)):
        assert time.monotonic() < deadline, f"never came true; last: {video['status']} {video['error']} {video['pusa']}"
        time.sleep(pause_s)
    return video


def completed(client, job_id, timeout_s=60.0):
    # Nothing is timed by this: the processors are the service's.
    video = until(client, job_id, lambda video: video["status"] in ("completed", "failed"), timeout_s, pause_s=0.2)
    assert video["status"] == "completed", video["error"]
    return video


def frames_of(client, job_id):
    """The lossless frames of a completed video, as the bytes of its zip."""
    answer = client.get(f"/v1/videos/{job_id}/content", params={"variant": "frames"}, follow_redirects=True)
    return answer.raise_for_status().content
