"""Putting questions to a served model, a few jobs at a time."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import TypeAlias

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from cluster.orders import Frames, delete, make
from cluster.quality.tasks import Outcome, Pair, Task

SHOWN_PAIRS = 8
SHOWN_FRAMES = (0, 2, 4, 6, 8, 10, 12, 14, 16)

Pictures: TypeAlias = Mapping[str, Sequence[Frames]]
"""Videos of the first pairs, by task."""


def answers(
    client: httpx.Client, questions: Sequence[tuple[Task, Pair]], in_flight: int
) -> tuple[dict[str, list[Outcome]], Pictures]:
    """Outcomes by task, in the order of the questions, and the videos of each task's first pairs.

    Args:
        client: of the service.
        questions: what to ask, for which scenes and seeds.
        in_flight: jobs at once; the service is asked for no more before one of them has ended.

    Raises:
        RuntimeError: an order was refused or a job failed: then nothing was measured.
    """

    def answer(question: tuple[Task, Pair]) -> tuple[Outcome, Frames]:
        task, pair = question
        video = make(client, task.order(pair))
        delete(client, video.id)
        return task.judge(pair, video.frames), video.frames

    outcomes: dict[str, list[Outcome]] = {task.name: [] for task, _ in questions}
    pictures: dict[str, list[Frames]] = {task.name: [] for task, _ in questions}
    threads = ThreadPoolExecutor(in_flight)
    try:
        results = tqdm(threads.map(answer, questions), total=len(questions), unit="job")
        for (task, _), (outcome, frames) in zip(questions, results, strict=True):
            outcomes[task.name].append(outcome)
            if len(pictures[task.name]) < SHOWN_PAIRS:
                pictures[task.name].append(frames)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # after an error, jobs in flight are not waited for
    return outcomes, pictures


def grid(videos: Sequence[Frames]) -> Image.Image:
    """A row a video, some of its frames side by side."""
    strips = [np.concatenate([video[n] for n in SHOWN_FRAMES if n < len(video)], axis=1) for video in videos]
    return Image.fromarray(np.concatenate(strips, axis=0))


def adaptation_cost(model: str) -> float | None:
    """Samples seen by a shipped model's adaptation over those of its base training; None: not recorded."""
    record = files("configs") / "model" / model / "training.json"
    if not record.is_file():
        return None
    stages = json.loads(record.read_text())
    return float(stages["adapt"]["samples"] / stages["base"]["samples"])
