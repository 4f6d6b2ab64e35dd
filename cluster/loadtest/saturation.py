"""Throughput at saturation against a plain loop: the same generations, the same number of ranks, turn by turn.

The plain loop has its model loaded and warm, and makes one video after the other, from the prompt to the MP4. The
service gets all jobs of a round at once, and may overlap what the loop cannot. Only the ratio means something.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from cluster.orders import Order, completed
from cluster.service_cost import plain_loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Text to video, with the model's own settings for the rest."""

    size: str = "192x128"
    num_frames: int = 33
    num_inference_steps: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds of the same jobs on both sides."""

    num_jobs: int
    plain_s: float
    service_s: float

    @property
    def ratio(self) -> float:
        """Throughput of the service by that of the loop."""
        return self.plain_s / self.service_s


def overall_ratio(rounds: Sequence[Round]) -> float:
    """Of all rounds together."""
    return sum(one.plain_s for one in rounds) / sum(one.service_s for one in rounds)


def measure(
    http: httpx.Client, model: str, ranks: int, made: Generation, num_jobs: int, num_rounds: int, folder: Path
) -> Iterator[Round]:
    """Run rounds, the loop and the service by turns.

    Args:
        http: client of a service that has nothing else to do.
        model: that both sides run.
        ranks: of the service's one gang.
        made: what both make.
        num_jobs: of a round, on each side.
        num_rounds: of both.
        folder: for the loop's videos.
    """
    work = (made.size, made.num_frames, made.num_inference_steps)
    _backlog(http, made, 1, "warm-up")
    for number in range(num_rounds):
        plain_s = sum(plain_loop(model, ranks, *work, folder / "plain.mp4", num_jobs))
        service_s = _backlog(http, made, num_jobs, f"round {number}")
        yield Round(num_jobs=num_jobs, plain_s=plain_s, service_s=service_s)


def _backlog(http: httpx.Client, made: Generation, num_jobs: int, name: str) -> float:
    """Seconds from the first order to the last end; every prompt is another, so each is encoded."""
    settings = {"num_frames": made.num_frames, "num_inference_steps": made.num_inference_steps}
    orders = [
        Order(prompt=f"saturation, {name}, job {number}", seed=number, size=made.size, settings=settings)
        for number in range(num_jobs)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(num_jobs) as pool:
        list(pool.map(lambda order: completed(http, order), orders))
    return time.perf_counter() - began
