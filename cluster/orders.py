"""Ordering videos over HTTP: what a client sends, the polite wait, and the lossless frames that come back."""

import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Frames = NDArray[np.uint8]
"""(T, H, W, 3)."""

DEFAULT_POLL_MS = "500"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One image or clip."""

    name: str
    data: bytes
    content_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job as the API takes it."""

    prompt: str
    seed: int
    uploads: Sequence[Upload] = ()
    conditioning: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of ``pusa``."""
    size: str | None = None
    extends: bool = False
    """Go on where the one uploaded clip ends; the service places its frames itself."""


@dataclass(frozen=True, slots=True)
class Form:
    """An order as a multipart request."""

    route: str
    fields: Mapping[str, str]
    files: Sequence[tuple[str, tuple[str, bytes, str]]]
    """Of each: the part's name, and the file's name, bytes and type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """A finished job."""

    id: str
    frames: Frames
    """As decoded: lossless."""
    seconds: float
    """From the order to the frames."""


def png(name: str, picture: NDArray[np.uint8]) -> Upload:
    """A picture (H, W, 3) as a lossless upload."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return Upload(name=name, data=buffer.getvalue(), content_type="image/png")


def clip(name: str, frames: Frames, fps: int = 8) -> Upload:
    """A clip as a lossless upload: H.264 of RGB pixels without quantisation."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return Upload(name=name, data=buffer.getvalue(), content_type="video/mp4")


def make(client: httpx.Client, order: Order) -> Video:
    """Order a video, wait for it as the service asks to, and fetch its frames.

    Raises:
        RuntimeError: the service refused the order, or the job did not complete.
    """
    began = time.monotonic()
    video_id = completed(client, order)
    frames = read_frames(download(client, video_id, "frames"))
    return Video(id=video_id, frames=frames, seconds=time.monotonic() - began)


def completed(client: httpx.Client, order: Order) -> str:
    """Order a video and wait for it as the service asks to; returns its id.

    Raises:
        RuntimeError: the service refused the order, or the job did not complete.
    """
    created = submit(client, order)
    job = created.json()
    pause_s = int(created.headers.get("openai-poll-after-ms", DEFAULT_POLL_MS)) / 1000
    while job["status"] in ("queued", "in_progress"):
        time.sleep(pause_s)
        job = _checked(client.get(f"/v1/videos/{job['id']}")).json()
    if job["status"] != "completed":
        raise RuntimeError(f"job {job['id']} ({order.prompt!r}, seed {order.seed}): {job['error']}")
    video_id: str = job["id"]
    return video_id


def submit(client: httpx.Client, order: Order, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """Order a video; the answer holds the job, and how often to ask for it.

    Args:
        client: of the service.
        order: what is wanted.
        headers: such as ``Idempotency-Key``.

    Raises:
        RuntimeError: the service refused.
    """
    sent = form(order)
    return _checked(client.post(sent.route, data=dict(sent.fields), files=list(sent.files) or None, headers=headers))


def form(order: Order) -> Form:
    """What is sent for an order, by whichever client."""
    pusa: dict[str, Any] = {"seed": order.seed, **order.settings}
    if order.conditioning:
        pusa["conditioning"] = list(order.conditioning)
    fields = {"prompt": order.prompt, "pusa": json.dumps(pusa)} | ({"size": order.size} if order.size else {})
    route, media = ("/v1/videos/extensions", "video") if order.extends else ("/v1/videos", "input_reference[]")
    return Form(route, fields, [(media, (one.name, one.data, one.content_type)) for one in order.uploads])


def download(client: httpx.Client, video_id: str, variant: str) -> bytes:
    """A file of a finished video."""
    path = f"/v1/videos/{video_id}/content"
    return _checked(client.get(path, params={"variant": variant}, follow_redirects=True)).content


def delete(client: httpx.Client, video_id: str) -> None:
    """Remove a video and its files from the service."""
    _checked(client.delete(f"/v1/videos/{video_id}"))


def served_model(client: httpx.Client) -> dict[str, Any]:
    """The model that is served: its ``id``, and ``pusa`` with revision, limits and defaults."""
    return _checked(client.get("/v1/models")).json()["data"][0]


def read_frames(archive: bytes) -> Frames:
    """The frames of a zip of pictures, in the order of their names."""
    with zipfile.ZipFile(io.BytesIO(archive)) as pictures:
        names = sorted(pictures.namelist())
        return np.stack([np.asarray(Image.open(io.BytesIO(pictures.read(name))).convert("RGB")) for name in names])


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise RuntimeError(f"{response.request.method} {response.request.url}: {response.status_code} {response.text}")
    return response
