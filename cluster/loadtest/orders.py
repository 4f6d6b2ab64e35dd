"""A job class as requests: every task with media of its own, made before the clock starts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.loadtest.schedule import Arrival
from cluster.loadtest.workload import JobClass, Workload
from cluster.orders import Form, Frames, Order, clip, form, png

_CLIP_FRAMES = 17


def forms(workload: Workload, arrivals: Sequence[Arrival], run: str) -> list[Form]:
    """The requests of a schedule, in its order.

    Args:
        workload: that it is of.
        arrivals: the schedule.
        run: its name, which every prompt begins with: no two are the same, so nothing is answered from a memory.
    """
    media = {name: _given(one) for name, one in workload.classes.items()}
    return [
        form(_order(one, workload.classes[one.job_class], media[one.job_class], prompt(run, one.number)))
        for one in arrivals
    ]


def prompt(run: str, number: int) -> str:
    """Of a run's job."""
    return f"{run} {number}: a slow pan over a mountain lake at dawn"


def number_of(run: str, found: str | None) -> int | None:
    """Which of a run's jobs a prompt is of; None: it is of none."""
    head, colon, _ = (found or "").removeprefix(f"{run} ").partition(":")
    return int(head) if (found or "").startswith(f"{run} ") and colon and head.isdecimal() else None


def _order(arrival: Arrival, job: JobClass, given: dict[str, Any], text: str) -> Order:
    settings = {
        "num_frames": job.num_frames,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "priority": job.priority,
    }
    return Order(prompt=text, seed=arrival.seed, size=job.size, settings=settings, **given)


def _given(job: JobClass) -> dict[str, Any]:
    if job.task == "text_to_video":
        return {}
    frames = _frames(*job.sides)
    start, end = png("start.png", frames[0]), png("end.png", frames[-1])
    last = (job.num_frames - 1) // 4
    match job.task:
        case "image_to_video":
            return {"uploads": [start], "conditioning": [_at(0, 0.2)]}
        case "start_end":
            return {"uploads": [start, end], "conditioning": [_at(0, 0.0), _at(last, 0.5)]}
        case "keyframes":
            return {"uploads": [start, end], "conditioning": [_at(0, 0.0), _at(max(last // 2, 1), 0.3)]}
        case "extension":
            return {"uploads": [clip("clip.mp4", frames)], "extends": True}


def _at(position: int, noise_multiplier: float) -> dict[str, float]:
    return {"position": position, "noise_multiplier": noise_multiplier}


def _frames(width: int, height: int) -> Frames:
    """A slow drift of colours."""
    time, row, column = np.ogrid[:_CLIP_FRAMES, :height, :width]
    planes = [(row * (1 + plane) + column * (3 - plane) + time * 4) % 256 for plane in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)
