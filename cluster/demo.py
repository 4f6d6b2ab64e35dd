"""``make demo``: one job of every task through HTTP, its videos, and one picture of them all.

Everything the jobs are given comes from the synthetic world the small model was trained on: one scene whose
combination of words never occurred in training, so the true continuation of every given frame is known.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.contact_sheet import Picture, SheetRow, contact_sheet
from cluster.local_service import local_service
from cluster.orders import Frames, Order, Upload, Video, clip, download, make, png, served_model
from pusa_dist.world.caption import caption
from pusa_dist.world.measure import track
from pusa_dist.world.render import render
from pusa_dist.world.scene import BACKGROUNDS, Scene, scene

SEED = 7
SCENE_SEED = 7
"""Of a large, quick object: there is much to see."""
NOISE_MULTIPLIERS = {0.0: "kept exactly, damage and all", 0.2: "the default: half mended", 0.6: "mended"}
"""With what to look for when the given frame is damaged."""
EXTENDED_FRAMES = 9
TRANSITION_FRAMES = 5
"""Of each of the two clips a transition joins: two latent frames."""


@dataclass(frozen=True)
class Task:
    """One job of the demo."""

    name: str
    notes: Sequence[str] = ()
    uploads: Sequence[Upload] = ()
    shown: Sequence[Picture] = ()
    conditioning: Sequence[dict[str, Any]] = ()
    extended_latents: int = 0
    """Extensions: how many latent frames the service puts at the start."""

    @property
    def given_latents(self) -> frozenset[int]:
        """Positions of the given latent frames."""
        return frozenset(entry["position"] for entry in self.conditioning) | frozenset(range(self.extended_latents))


def tasks(world: Scene, last: int) -> list[Task]:
    """Every task of the API.

    Args:
        world: what the given frames show.
        last: index of the last latent frame of the model's default video.
    """
    frames = render(world)
    start, middle, end = (png(f"frame-{n}.png", frames[n]) for n in (0, 8, 16))
    head, tail = frames[:TRANSITION_FRAMES], frames[-TRANSITION_FRAMES:]
    damaged = without_a_corner(frames[0], world)
    noisy = [
        Task(
            "image to video",
            [f"noise multiplier {multiplier:g}", meaning],
            [png("damaged.png", damaged)],
            [Picture(pixels=damaged, caption="frame 0, damaged")],
            [_at(0, multiplier)],
        )
        for multiplier, meaning in NOISE_MULTIPLIERS.items()
    ]
    return [
        Task("text to video"),
        Task("image to video", ["noise multiplier 0.2"], [start], _pictures(frames, 0), [_at(0, 0.2)]),
        *noisy,
        Task(
            "start and end",
            ["noise multipliers 0.2, 0.5"],
            [start, end],
            _pictures(frames, 0, 16),
            [_at(0, 0.2), _at(last, 0.5)],
        ),
        Task(
            "keyframes",
            ["noise multipliers 0, 0.3, 0.3"],
            [start, middle, end],
            _pictures(frames, 0, 8, 16),
            [_at(0, 0.0), _at(last // 2, 0.3), _at(last, 0.3)],
        ),
        Task(
            "extension",
            [f"of a clip of {EXTENDED_FRAMES} frames"],
            [clip("beginning.mp4", frames[:EXTENDED_FRAMES])],
            _pictures(frames, 0, 4, 8),
            extended_latents=3,
        ),
        Task(
            "completion",
            ["of a clip without its middle", "noise multipliers 0.2, 0.4, 0.4"],
            [clip("clip.mp4", frames)],
            _pictures(frames, 0, 4, 16),
            [_at(0, 0.2), _at(1, 0.4), _at(last, 0.4)],
        ),
        Task(
            "transition",
            ["between two clips", "noise multipliers 0.2, 0.4, 0.4, 0.4"],
            [clip("first.mp4", head), clip("second.mp4", tail)],
            _pictures(frames, 0, 4, 12, 16),
            [
                {"input": 0, "source": -2, **_at(0, 0.2)},
                {"input": 0, "source": -1, **_at(1, 0.4)},
                {"input": 1, "source": 0, **_at(last - 1, 0.4)},
                {"input": 1, "source": 1, **_at(last, 0.4)},
            ],
        ),
    ]


def without_a_corner(frame: Frames, world: Scene) -> Frames:
    """The picture (H, W, 3) with the left of its object missing: what a model may put right, if it is let."""
    damaged = frame.copy()
    damaged[:, : round(world.start[0] - 0.4 * world.radius)] = BACKGROUNDS[world.background]
    return damaged


def _at(position: int, noise_multiplier: float) -> dict[str, Any]:
    return {"position": position, "noise_multiplier": noise_multiplier}


def _pictures(frames: Frames, *numbers: int) -> list[Picture]:
    return [Picture(pixels=frames[number], caption=f"frame {number}") for number in numbers]


def run(task: Task, prompt: str, client: httpx.Client, folder: Path) -> Video:
    """Send one job, wait for it, keep what it was given and its MP4."""
    given = folder / "given"
    given.mkdir(exist_ok=True)
    for upload in task.uploads:
        (given / upload.name).write_bytes(upload.data)
    order = Order(
        prompt=prompt,
        seed=SEED,
        uploads=task.uploads,
        conditioning=task.conditioning,
        extends=task.extended_latents > 0,
    )
    video = make(client, order)
    (folder / f"{file_name(task)}.mp4").write_bytes(download(client, video.id, "video"))
    return video


def file_name(task: Task) -> str:
    """A name of its own for each task."""
    words = [task.name, *task.notes[:1], *("damaged" for one in task.uploads if one.name == "damaged.png")]
    return "-".join(words).replace(", ", "-").replace(" ", "-")


def sheet_row(task: Task, video: Video) -> SheetRow:
    """A video with what was given, and in words what its pixels show."""
    given = {frame for frame in range(len(video.frames)) if -(-frame // 4) in task.given_latents}
    return SheetRow(
        title=task.name,
        notes=[*task.notes, *_seen(video.frames), f"{video.seconds:.1f} s"],
        given=task.shown,
        frames=video.frames,
        given_frames=frozenset(given),
    )


def _seen(frames: Frames) -> list[str]:
    found = track(frames)
    if found.speed is None:
        return ["measured: no object"]
    motion = f"{found.direction or 'aslant'}, {found.speed:.1f} px a frame"
    return [f"measured: {found.colour or 'odd'} {found.shape or 'thing'},", motion]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a shipped model's name, or a path to a YAML file")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs"),
        help="folder of the videos, and of what they were made from (given/)",
    )
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    world = scene(SCENE_SEED, "held-out")
    prompt = caption(world)
    say = sys.stdout.write
    with tempfile.TemporaryDirectory(prefix="pusa-demo-") as state:
        say("starting the service ...\n")
        began = time.monotonic()
        with local_service(arguments.model, Path(state)) as url, httpx.Client(base_url=url, timeout=60) as client:
            say(f"ready at {url} after {time.monotonic() - began:.1f} s\n{prompt}\n")
            last = (served_model(client)["pusa"]["defaults"]["num_frames"] - 1) // 4
            rows = []
            for task in tasks(world, last):
                video = run(task, prompt, client, arguments.out)
                rows.append(sheet_row(task, video))
                say(f"  {task.name:16s} {video.seconds:6.1f} s\n")
    sheet = arguments.out / "contact-sheet.png"
    contact_sheet(f"{arguments.model}: {prompt}", rows).save(sheet)
    say(f"contact sheet: {sheet}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
