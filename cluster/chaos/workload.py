"""The jobs: every task, several shapes, strengths and lengths, from three tenants; the same at every run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.orders import Frames, Order, clip, png

TENANTS = ("amber", "birch", "cedar")
NUM_JOBS = 20
CLIP_FRAMES = 17
_SIZES = (((320, 208), 33), ((256, 192), 49), ((352, 240), 33), ((208, 176), 65))
_STEPS = (50, 42, 46, 38)


def orders(are_alike: bool = False) -> Mapping[int, Order]:
    """The jobs by their number; job n is asked for by tenant n modulo three.

    Args:
        are_alike: of one shape and strength, all with guidance, so that any two may share a forward.
    """
    return {number: _order(number, are_alike) for number in range(NUM_JOBS)}


def _order(number: int, is_alike: bool) -> Order:
    (width, height), num_frames = _SIZES[2 if is_alike else number % 4]
    last = (num_frames - 1) // 4
    frames = _frames(number, width, height)
    start, end = png("start.png", frames[0]), png("end.png", frames[-1])
    given: dict[str, Any] = {
        0: {},
        1: {"uploads": [start], "conditioning": [_at(0, 0.2)]},
        2: {"uploads": [start, end], "conditioning": [_at(0, 0.0), _at(last, 0.5)]},
        3: {"uploads": [clip("clip.mp4", frames)], "extends": True},
        4: {"uploads": [start, end], "conditioning": [_at(0, 0.0), _at(last // 2, 0.3)]},
    }[number % 5]
    settings = {
        "num_frames": num_frames,
        "num_inference_steps": _STEPS[number // 5],
        # Alone, a job without guidance and a job of another strength: a gang changes between them.
        "guidance_scale": 1.0 if number % 7 == 6 and not is_alike else 5.0,
        "lora_alpha": 1.0 if number % 6 == 5 and not is_alike else 1.4,
        # Only the last: a job that waits behind all others after a gang's death keeps the next one from being made.
        "priority": "batch" if number == NUM_JOBS - 1 else "interactive",
    }
    prompt = f"object {number} drifts over field {number // 3}"
    return Order(prompt=prompt, seed=1000 + number, size=f"{width}x{height}", settings=settings, **given)


def _at(position: int, noise_multiplier: float) -> dict[str, float]:
    return {"position": position, "noise_multiplier": noise_multiplier}


def _frames(number: int, width: int, height: int) -> Frames:
    """A slow drift of colours, so that a clip is a clip and no two jobs are given the same."""
    time, row, column = np.ogrid[:CLIP_FRAMES, :height, :width]
    planes = [(row * (1 + plane) + column * (3 - plane) + time * 4 + number * 29) % 256 for plane in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)
