"""``make demo``: one job of every task through HTTP, its videos, and one picture of them all.

The photograph is the portrait of Grace Hopper that matplotlib ships; the clip is a slow camera move
over it, so every picture the jobs are given is real and nothing is downloaded.
"""

import argparse
import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw

from cluster.local_service import local_service

PROMPT = "A naval officer in dress uniform smiles at the camera, a flag behind her"
SHOWN_FRAMES = 6
CELL = (128, 96)
LABEL_WIDTH = 190
MARGIN = 6


@dataclass(frozen=True)
class Input:
    """One upload: its name, bytes and type, and the picture the contact sheet shows of it."""

    name: str
    data: bytes
    content_type: str
    picture: Image.Image


@dataclass(frozen=True)
class Task:
    """One job of the demo."""

    name: str
    inputs: Sequence[Input]
    conditioning: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What came back."""

    task: Task
    video: Path
    seconds: float
    frames: Sequence[Image.Image]


def tasks(photo: Image.Image, last: int) -> list[Task]:
    """Every task of the API.

    Args:
        photo: the photograph.
        last: index of the last latent frame of the model's default video.
    """
    start, middle, end = (_image(name, _view(photo, zoom)) for name, zoom in _VIEWS)
    forward = _clip("move.mp4", photo, [t / 16 for t in range(17)])
    backward = _clip("return.mp4", photo, [1 - t / 16 for t in range(17)])
    return [
        Task("text to video", [], []),
        Task("image to video", [start], [{"position": "start", "noise_multiplier": 0.2}]),
        Task("start and end", [start, end], [_at("start", 0.2), _at("end", 0.5)]),
        Task("keyframes", [start, middle, end], [_at("start", 0.0), _at(last // 2, 0.3), _at("end", 0.3)]),
        Task("extension", [forward], [_at(0, 0.0), _at(1, 0.3), _at(2, 0.4)]),
        Task("completion", [forward], [_at(0, 0.2), _at(1, 0.4), _at(last, 0.4)]),
        Task(
            "transition",
            [forward, backward],
            [
                {"input": 0, "position": 0, "source": -2, "noise_multiplier": 0.2},
                {"input": 0, "position": 1, "source": -1, "noise_multiplier": 0.4},
                {"input": 1, "position": last - 1, "source": 0, "noise_multiplier": 0.4},
                {"input": 1, "position": last, "source": 1, "noise_multiplier": 0.4},
            ],
        ),
    ]


_VIEWS = (("start.jpg", 0.0), ("middle.jpg", 0.5), ("end.jpg", 1.0))


def _at(position: int | str, noise_multiplier: float) -> dict[str, Any]:
    return {"position": position, "noise_multiplier": noise_multiplier}


def _view(photo: Image.Image, progress: float) -> Image.Image:
    """What the camera sees when ``progress`` (0..1) of its move from wide to close is done."""
    left, top, width = progress * 120, 60 + progress * 30, photo.width + progress * (280 - photo.width)
    box = (left, top, left + width, top + width * 3 / 4)
    return photo.resize((320, 240), Image.Resampling.LANCZOS, box=box)


def _image(name: str, picture: Image.Image) -> Input:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return Input(name, buffer.getvalue(), "image/jpeg", picture)


def _clip(name: str, photo: Image.Image, moments: Sequence[float]) -> Input:
    buffer = io.BytesIO()
    views = [_view(photo, moment) for moment in moments]
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = views[0].width, views[0].height, "yuv420p"
        for view in views:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(view), format="rgb24")))
        container.mux(stream.encode(None))
    return Input(name, buffer.getvalue(), "video/mp4", _strip([views[0], views[len(views) // 2], views[-1]]))


def _strip(views: Sequence[Image.Image]) -> Image.Image:
    """A clip as one picture: the middle of each of its moments, side by side."""
    width, height = views[0].width // len(views), views[0].height
    strip = Image.new("RGB", (width * len(views), height))
    for i, view in enumerate(views):
        left = (view.width - width) // 2
        strip.paste(view.crop((left, 0, left + width, height)), (i * width, 0))
    return strip


def run(task: Task, client: httpx.Client, folder: Path) -> Outcome:
    """Send one job, wait for it, download its video and its frames."""
    began = time.monotonic()
    created = client.post(
        "/v1/videos",
        data={"prompt": PROMPT, "pusa": json.dumps({"conditioning": list(task.conditioning), "seed": 7})},
        files=[("input_reference[]", (one.name, one.data, one.content_type)) for one in task.inputs] or None,
    )
    job = _ok(created).json()
    while job["status"] in ("queued", "in_progress"):
        time.sleep(int(created.headers.get("openai-poll-after-ms", "500")) / 1000)
        job = _ok(client.get(f"/v1/videos/{job['id']}")).json()
    if job["status"] != "completed":
        raise RuntimeError(f"{task.name}: {job['error']}")
    seconds = time.monotonic() - began
    path = folder / f"{task.name.replace(' ', '-')}.mp4"
    path.write_bytes(_content(client, job["id"], "video"))
    with zipfile.ZipFile(io.BytesIO(_content(client, job["id"], "frames"))) as archive:
        names = sorted(archive.namelist())
        chosen = [names[round(i * (len(names) - 1) / (SHOWN_FRAMES - 1))] for i in range(SHOWN_FRAMES)]
        frames = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
    return Outcome(task, path, seconds, frames)


def _content(client: httpx.Client, job_id: str, variant: str) -> bytes:
    return _ok(client.get(f"/v1/videos/{job_id}/content", params={"variant": variant}, follow_redirects=True)).content


def _ok(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise RuntimeError(f"{response.request.method} {response.request.url}: {response.status_code} {response.text}")
    return response


def contact_sheet(outcomes: Sequence[Outcome]) -> Image.Image:
    """A row a task: its name, the pictures it was given, and frames of its video."""
    num_inputs = max(len(outcome.task.inputs) for outcome in outcomes)
    width = LABEL_WIDTH + (num_inputs + SHOWN_FRAMES) * (CELL[0] + MARGIN) + 3 * MARGIN
    height = (CELL[1] + MARGIN) * len(outcomes) + 30
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    given_x, made_x = LABEL_WIDTH, LABEL_WIDTH + num_inputs * (CELL[0] + MARGIN) + 2 * MARGIN
    draw.text((given_x, 8), "given", fill="black", font_size=14)
    draw.text((made_x, 8), f"generated, {SHOWN_FRAMES} frames of the video", fill="black", font_size=14)
    for row, outcome in enumerate(outcomes):
        y = 30 + row * (CELL[1] + MARGIN)
        places = ", ".join(str(entry["position"]) for entry in outcome.task.conditioning) or "none"
        label = f"{outcome.task.name}\n{outcome.seconds:.1f} s\ngiven latents: {places}"
        draw.multiline_text((MARGIN, y + 8), label, fill="black", font_size=13, spacing=6)
        for i, one in enumerate(outcome.task.inputs):
            sheet.paste(one.picture.resize(CELL), (given_x + i * (CELL[0] + MARGIN), y))
        for i, frame in enumerate(outcome.frames):
            sheet.paste(frame.resize(CELL), (made_x + i * (CELL[0] + MARGIN), y))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="debug", help="a shipped model's name, or a path to a YAML file")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the videos")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    photo = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    say = sys.stdout.write
    with tempfile.TemporaryDirectory(prefix="pusa-demo-") as state:
        say("starting the service ...\n")
        began = time.monotonic()
        with local_service(arguments.model, Path(state)) as url, httpx.Client(base_url=url, timeout=60) as client:
            say(f"ready at {url} after {time.monotonic() - began:.1f} s\n")
            defaults = _ok(client.get("/v1/models")).json()["data"][0]["pusa"]["defaults"]
            last = (defaults["num_frames"] - 1) // 4
            outcomes = []
            for task in tasks(photo, last):
                outcomes.append(run(task, client, arguments.out))
                say(f"  {task.name:16s} {outcomes[-1].seconds:6.1f} s  {outcomes[-1].video}\n")
    sheet = arguments.out / "contact-sheet.png"
    contact_sheet(outcomes).save(sheet)
    say(f"contact sheet: {sheet}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
