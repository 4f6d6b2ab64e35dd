"""Memory that the transformers' weights take on a rank, worked out from shapes before anything is read."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from pusa_dist.checkpoint.lora import is_target, lora_rank
from pusa_dist.config import ModelConfig, Precision
from pusa_dist.errors import ConfigError
from pusa_dist.model.transformer import new_transformer
from pusa_dist.schedule import DTYPES

GIB, MIB = 2**30, 2**20
_MEMINFO = Path("/proc/meminfo")
_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Of cgroups of version 2 and 1, as a container sees its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsMemory:
    """Bytes of the weights that every rank of a gang holds, whatever its degrees."""

    model: str
    precision: Precision
    experts: int
    base: int
    """The transformer of one expert."""
    lora: int = 0
    """Both halves of one expert's adjustable LoRA."""
    rank: int = 0
    """Of that LoRA."""
    pristine: int = 0
    """Copies of the weights that one expert's LoRA changes."""
    pristine_on_host: bool = False

    @property
    def device(self) -> int:
        """On the rank's device."""
        return self.experts * (self.base + self.lora) + (0 if self.pristine_on_host else self.experts * self.pristine)

    @property
    def host(self) -> int:
        """In the memory of the rank's machine."""
        return self.experts * self.pristine if self.pristine_on_host else 0

    def describe(self) -> list[str]:
        """For people: what it is made of."""
        parts = [f"base {_text(self.base)}"]
        if self.rank:
            parts.append(f"LoRA of rank {self.rank} {_text(self.lora)}")
        copies = f"pristine copies {_text(self.pristine)}"
        if self.pristine and not self.pristine_on_host:
            parts.append(copies)
        times = f"{self.experts} x " if self.experts > 1 else ""
        lines = [
            f"weights ({self.precision}) on each rank's device: {_text(self.device)} = {times}({' + '.join(parts)})"
        ]
        if self.host:
            lines.append(f"and in its machine's memory, pinned: {_text(self.host)} = {times}({copies})")
        return lines


def weights_memory(model: ModelConfig, precision: Precision) -> WeightsMemory:
    """What the weights of every expert take on one rank; activations and the device's own needs come on top.

    The rank of a LoRA is read from its file, or is Pusa V1.0's if the file is not here.
    """
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in new_transformer(model.transformer).named_parameters()}
    size, rank = DTYPES[precision].itemsize, lora_rank(model)
    adapted = [shape for name, shape in shapes.items() if rank and is_target(name)]
    return WeightsMemory(
        model=model.name,
        precision=precision,
        experts=len(model.experts),
        base=size * _numel(list(shapes.values())),
        lora=size * rank * sum(sum(shape) for shape in adapted),
        rank=rank,
        pristine=size * _numel(adapted),
        pristine_on_host=model.pristine_weights == "host",
    )


def check_device_memory(needed: WeightsMemory, free: int, total: int) -> None:
    """Refuse weights that a device cannot hold, before minutes are spent on reading them.

    Args:
        needed: by the weights.
        free: bytes of the device that can still be had.
        total: bytes of the device.

    Raises:
        ConfigError: saying what is needed, what there is and what would help.
    """
    if needed.device <= free:
        return
    remedies = ["use a device with more memory, or free what others hold of this one"]
    without_copies = needed.experts * (needed.base + needed.lora)
    if without_copies < needed.device and without_copies <= free:
        remedies.insert(0, f"set pristine_weights: host in the model's configuration ({_text(without_copies)})")
    raise ConfigError(
        f"{needed.model}: its weights need {_text(needed.device)} of every rank's device; this one has {_text(total)}, "
        f"{_text(free)} of them free; {', or '.join(remedies)}"
    )


def check_host_memory(needed: WeightsMemory, free: int, num_ranks: int) -> None:
    """Refuse copies that a machine cannot hold, before minutes are spent on reading weights.

    Args:
        needed: by the weights of one rank.
        free: bytes of the machine's memory that can be had.
        num_ranks: that share them.

    Raises:
        ConfigError: saying what is needed, what there is and what would help.
    """
    if num_ranks * needed.host > free:
        raise ConfigError(
            f"{needed.model}: pristine_weights=host needs {_text(needed.host)} of the machine's memory for each rank, "
            f"{_text(num_ranks * needed.host)} for {num_ranks}; {_text(free)} can be had; give the machine or "
            "container more memory or fewer ranks, or set pristine_weights: device"
        )


def free_host_memory() -> int:
    """Bytes that can be had of this machine's memory, or of its container's if that may have less."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
    assert available is not None, "Linux says so since 3.14"
    free = 1024 * int(available[1])
    for limit in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # it is of the other version, or there is no limit: "max"
            free = min(free, int(limit.read_text()))
    return free


def free_memory(device: str) -> tuple[int, int]:
    """Bytes of a CUDA device that this process can still have, and all of its bytes."""
    free, total = torch.cuda.mem_get_info(device)
    # What PyTorch's allocator has cached is this process's to use again.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached, total


def _numel(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _text(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
