"""The training loop: optimiser, averaged weights, log, checkpoints; the same for every stage.

Everything random in a step comes from one generator, seeded by the run's seed, the step and the rank. So a
run that was killed and continues from its last checkpoint ends with the weights of one that was not.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pusa_dist.training.distributed import ALONE, Ranks, like, whole

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How long and how fast a stage trains."""

    steps: int
    batch_size: int
    """Samples of each rank."""
    lr: float
    warmup: int = 100
    """Steps over which the learning rate rises to ``lr``; it then falls on half a cosine to nothing."""
    cycle: int | None = None
    """Steps after which the learning rate rises anew; None: it does not."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    ema: float = 0.999
    """Share of the averaged weights that a step keeps (less in the first steps); 0: no average is kept."""
    seed: int = 0
    device: str = "cpu"
    bf16: bool = True
    """Matrix products and convolutions in bfloat16; weights, norms, losses and the optimiser stay in float32."""
    log_every: int = 20
    save_every: int = 250
    sample_every: int = 500


Loss = Callable[[int, torch.Generator], Mapping[str, Tensor]]
"""(step, generator) to named scalars; the one named "loss" is minimised."""


def train(
    trained: nn.Module,
    loss: Loss,
    options: LoopOptions,
    out: Path,
    sample: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train until ``options.steps``, continuing from ``out`` if a run was there; ends with the averaged weights.

    Args:
        trained: its parameters that require gradients are trained, in place.
        loss: what is minimised.
        options: of the loop.
        out: folder of checkpoint and log.
        sample: called with the step, the averaged weights in place, for the eye or a metric; on the first rank,
            so not for a model that is sharded.
        ranks: who trains together.
    """
    out.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, options.lr, options.betas, weight_decay=options.weight_decay)
    average = Average(parameters, options.ema)
    start = _resume(out / CHECKPOINT, parameters, optimiser, average)
    clock, samples = time.perf_counter(), 0
    with tqdm(total=options.steps, initial=start, unit="step", disable=not ranks.is_first) as bar:
        for step in range(start, options.steps):
            for group in optimiser.param_groups:
                group["lr"] = options.lr * rate(step, options.cycle or options.steps, options.warmup)
            values = loss(step, step_generator(options.seed, step, ranks.rank))
            values["loss"].backward()
            ranks.average_gradients([p for p in parameters if p.grad is not None])
            norm = nn.utils.clip_grad_norm_(parameters, options.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            average.update(parameters, step)
            done, samples = step + 1, samples + options.batch_size * ranks.world_size
            bar.update()
            if done % options.log_every == 0 or done == options.steps:
                line = {name: round(value, 6) for name, value in ranks.mean(values).items()}
                seconds = time.perf_counter() - clock
                line |= {"norm": round(whole(norm).item(), 4), "samples_per_s": round(samples / seconds, 2)}
                if ranks.is_first:
                    _log(out / LOG, {"step": done, **line})
                bar.set_postfix(line)
                clock, samples = time.perf_counter(), 0
            if done % options.save_every == 0 or done == options.steps:
                content = {"weights": parameters, "optimiser": optimiser.state_dict(), "average": average.state}
                content = whole(content, keep=ranks.is_first)  # on every rank: shards are gathered
                if ranks.is_first:
                    save_atomically({"step": done, **content}, out / CHECKPOINT)
            if sample is not None and ranks.is_first and (done % options.sample_every == 0 or done == options.steps):
                with average.in_place(parameters):
                    sample(done)
                clock, samples = time.perf_counter(), 0
    average.copy_to(parameters)


def rate(step: int, cycle: int, warmup: int) -> float:
    """Share of the learning rate in a step: a linear rise, then half a cosine down to nothing, and again."""
    step %= cycle
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, cycle - warmup)))


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Randomness of one step on one rank."""
    return torch.Generator("cpu").manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)


def autocast(options: LoopOptions) -> Any:
    """Context in which a stage runs its model."""
    kind = torch.device(options.device).type
    return torch.autocast(kind, torch.bfloat16) if options.bf16 else nullcontext()


class Average:
    """Exponential moving average of weights."""

    def __init__(self, parameters: list[nn.Parameter], keep: float) -> None:
        self.state = [p.detach().clone() for p in parameters] if keep else []
        self._keep = keep

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter], step: int) -> None:
        """Move towards the weights after a step; early on the average is short."""
        if not self.state:
            return
        keep = min(self._keep, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.state, list[Tensor](parameters), 1 - keep)

    @torch.no_grad()
    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        """Overwrite the weights with their average, if one is kept."""
        if not self.state:
            return
        torch._foreach_copy_(list[Tensor](parameters), self.state)

    @contextmanager
    def in_place(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Context in which the weights are their average."""
        kept = [p.detach().clone() for p in parameters]
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](parameters), kept)


def save_atomically(content: object, path: Path) -> None:
    """``torch.save`` such that a process killed at any moment leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def _resume(path: Path, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, average: Average) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with torch.no_grad():
        for mine, values in ((parameters, state["weights"]), (average.state, state["average"])):
            for tensor, value in zip(mine, values, strict=True):
                tensor.copy_(like(value, tensor))
    moments = {
        index: {name: like(value, parameters[index]) if value.dim() else value for name, value in each.items()}
        for index, each in state["optimiser"]["state"].items()
    }
    optimiser.load_state_dict({**state["optimiser"], "state": moments})
    logger.info("continuing from step %d of %s", state["step"], path)
    return int(state["step"])


def _log(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> Iterator[dict[str, float]]:
    """Lines of a run's log."""
    yield from map(json.loads, path.read_text().splitlines())
