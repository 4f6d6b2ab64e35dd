"""What the API tests share: a gateway in a folder, media made in memory, and a dispatcher that pretends."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from serve.config import ServeConfig, UploadLimits
from serve.http.api import create_api
from serve.http.gateway import Gateway
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Artifact, Job, JobStore

ABSENT = f"video_{'0' * 34}"
"""The id of no video."""
VARIANTS = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.jpg", "image/jpeg"),
    "frames": ("frames.zip", "application/zip"),
}


def png(width: int = 64, height: int = 48) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def blank_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def animated_gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (32, 32), shade) for shade in (0, 255)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def mp4(num_frames: int = 9, width: int = 64, height: int = 48) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(num_frames):
            pixels = noise.integers(0, 255, (height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@dataclass
class Service:
    """A gateway, its API, and the two stores behind it as another process would see them."""

    gateway: Gateway
    client: TestClient
    store: JobStore
    artifacts: ArtifactStore
    ready: dict[str, bool]
    folder: Path

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/videos", json={"prompt": "a cat", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def job(self, video_id: str, tenant: str = "local") -> Job:
        job = self.store.get(tenant, video_id)
        assert job is not None
        return job

    def key(self, tenant: str) -> dict[str, str]:
        """Headers with a new key of the tenant."""
        _, secret = self.store.create_key(tenant)
        return {"Authorization": f"Bearer {secret}"}

    def forget_estimates(self) -> None:
        """Have the gateway read anew what it otherwise remembers for a second."""
        for remembered in (self.gateway._forecast._measured, self.gateway._forecast._positions):
            remembered._until = 0.0

    def finish(self, video_id: str, video: bytes = b"0123456789") -> None:
        claimed = self.store.claim(video_id, "test", 60.0)
        assert claimed is not None
        complete(self.store, self.artifacts, claimed, video)

    def stored_files(self) -> list[Path]:
        return [path for path in (self.folder / "artifacts").rglob("*") if path.is_file()]


def complete(store: JobStore, artifacts: ArtifactStore, job: Job, video: bytes) -> None:
    """What a dispatcher leaves behind of a job that went well."""
    results = {}
    for variant, (name, content_type) in VARIANTS.items():
        data = video if variant == "video" else variant.encode()
        key = f"jobs/{job.id}/attempts/{job.attempt}/{name}"
        artifacts.put(key, data)
        results[variant] = Artifact(key=key, content_type=content_type, num_bytes=len(data))
    store.progress(job.id, job.attempt, "denoise", job.num_steps, job.num_steps)
    assert store.complete(job.id, job.attempt, results, {"denoise": 1.0})


@contextmanager
def open_service(folder: Path, **settings: Any) -> Iterator[Service]:
    config = ServeConfig(
        model="debug", state_dir=str(folder), uploads=UploadLimits(max_body_bytes=2_000_000, max_inputs=4), **settings
    )
    ready = {"Gateway": True, "Denoiser": True}

    async def readiness() -> dict[str, bool]:
        return ready

    gateway = Gateway(config, readiness)
    store = JobStore(config.resolved_database_url)
    try:
        with TestClient(create_api(gateway)) as client:
            yield Service(gateway, client, store, ArtifactStore(config.resolved_artifacts_url), ready, folder)
    finally:
        store.close()
        gateway.close()


class FakeDispatcher(threading.Thread):
    """Completes every job it finds, after a few steps; a prompt that says so fails."""

    def __init__(self, config: ServeConfig, video: bytes) -> None:
        super().__init__(daemon=True)
        self._store = JobStore(config.resolved_database_url)
        self._artifacts = ArtifactStore(config.resolved_artifacts_url)
        self._video = video
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.02):
            for queued in self._store.queued("debug", 10):
                if "leave queued" not in queued.request.prompt:
                    self._run_job(queued)
        self._store.close()

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def _run_job(self, queued: Job) -> None:
        job = self._store.claim(queued.id, "fake", 60.0)
        assert job is not None
        self._store.progress(job.id, job.attempt, "denoise", 1, job.num_steps)
        if "please fail" in job.request.prompt:
            self._store.fail(job.id, job.attempt, "gang_died", "the gang died twice")
        else:
            complete(self._store, self._artifacts, job, self._video)


def pusa(**fields: Any) -> str:
    return json.dumps(fields)


def data_url(content_type: str, data: bytes) -> str:
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


def error_of(answer: Any) -> dict[str, Any]:
    """The error of an answer, which has the shape of OpenAI's."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]
