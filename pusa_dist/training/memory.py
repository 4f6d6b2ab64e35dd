"""GPU memory of the adaptation, worked out without a GPU and without weights.

Weights, gradients and optimiser are counted from the model on the meta device. Activations are found by running
a forward and a backward pass on fake tensors, which have shapes and no content, and following what is alive:
checkpointed blocks keep their input, and one block at a time is run again and holds everything it saves.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pusa_dist.config import ModelConfig, TransformerConfig
from pusa_dist.geometry import latent_shape
from pusa_dist.model.transformer import new_transformer
from pusa_dist.training.adapter import adapter_parameters, inject
from pusa_dist.training.distributed import checkpoint_blocks

GIB = 2**30
BASE_BYTES, ADAPTER_BYTES = 2, 4
"""A weight of the base is bfloat16, one of the adapter float32."""
OPTIMISER_BYTES = 2 * ADAPTER_BYTES
"""AdamW's two moments."""
OVERHEAD = 3 * GIB
"""CUDA context, NCCL's buffers and the allocator's gaps: an allowance, not derived."""
_TRACED_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on each GPU at the peak of a training step."""

    gpus: int
    base: int
    """Frozen weights."""
    adapter: int
    gradients: int
    optimiser: int
    average: int
    """The adapter's moving average, if one is kept."""
    gathered: int
    """Sharded: weights of the blocks at work, whole, and gradients on their way to their shards."""
    activations: int
    overhead: int = OVERHEAD

    @property
    def parts(self) -> Mapping[str, int]:
        """Every part by name."""
        names = ("base", "adapter", "gradients", "optimiser", "average", "gathered", "activations", "overhead")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def plan_memory(
    model: ModelConfig,
    *,
    rank: int,
    gpus: int,
    width: int,
    height: int,
    num_frames: int,
    batch_size: int = 1,
    checkpointing: bool = True,
    average: bool = False,
) -> MemoryPlan:
    """Memory of each GPU that adapts a model; more than one GPU share the weights (FSDP2).

    Args:
        model: whose transformer; an expert at a time.
        rank: of the adapter.
        gpus: how many.
        width: of the videos in pixels.
        height: of the videos in pixels.
        num_frames: of the videos.
        batch_size: samples of each GPU.
        checkpointing: whether blocks keep their input only.
        average: whether a moving average of the adapter is kept.
    """
    base, adapter, gathered = _weights(model.transformer, rank)
    latents = (batch_size, *latent_shape(model.transformer.in_channels, num_frames, height, width))

    def share(parameters: int, size: int) -> int:
        return math.ceil(parameters * size / gpus)

    return MemoryPlan(
        gpus=gpus,
        base=share(base, BASE_BYTES),
        adapter=share(adapter, ADAPTER_BYTES),
        gradients=share(adapter, ADAPTER_BYTES),
        optimiser=share(adapter, OPTIMISER_BYTES),
        average=share(adapter, ADAPTER_BYTES) if average else 0,
        gathered=gathered if gpus > 1 else 0,
        activations=activation_bytes(
            model.transformer, rank, latents, model.text_encoder.max_tokens, checkpointing=checkpointing
        ),
    )


@cache
def _weights(config: TransformerConfig, rank: int) -> tuple[int, int, int]:
    """Weights of the base, weights of the adapter, and bytes that a sharded model gathers.

    Those are two blocks whole, as the next is fetched while one works, a block's gradients twice, on their way to
    the shards, and what is in no block.
    """
    with torch.device("meta"):
        transformer = inject(new_transformer(replace(config, num_layers=1)), rank)

    def count(module: nn.Module) -> tuple[int, int]:
        adapter = sum(p.numel() for p in adapter_parameters(module).values())
        return sum(p.numel() for p in module.parameters()) - adapter, adapter

    block_base, block_adapter = count(transformer.blocks[0])
    outside = count(transformer)[0] - block_base
    whole = block_base * BASE_BYTES + block_adapter * ADAPTER_BYTES
    gathered = 2 * whole + 2 * block_adapter * ADAPTER_BYTES + outside * BASE_BYTES
    return outside + config.num_layers * block_base, config.num_layers * block_adapter, gathered


@cache
def activation_bytes(
    config: TransformerConfig, rank: int, latents: tuple[int, ...], text_tokens: int, *, checkpointing: bool = True
) -> int:
    """Most bytes alive during a forward and a backward pass, besides weights and their gradients.

    In bfloat16 under autocast, attention by a kernel that does not store its scores.

    Args:
        config: of the transformer.
        rank: of the adapter.
        latents: (B, C, F, H, W).
        text_tokens: L.
        checkpointing: whether blocks keep their input only.
    """
    if config.num_layers > _TRACED_LAYERS:  # every further layer adds the same
        fewer, some = (
            activation_bytes(replace(config, num_layers=n), rank, latents, text_tokens, checkpointing=checkpointing)
            for n in (_TRACED_LAYERS - 1, _TRACED_LAYERS)
        )
        return some + (some - fewer) * (config.num_layers - _TRACED_LAYERS)
    with torch.device("meta"):
        transformer = inject(new_transformer(config), rank)
    if checkpointing:
        checkpoint_blocks(transformer)
    batch, frames = latents[0], latents[2]
    with FakeTensorMode():
        _materialise(transformer)
        noisy, timesteps = torch.empty(latents), torch.empty(batch, frames)
        context = torch.empty(batch, text_tokens, config.text_dim, dtype=torch.bfloat16)
        return peak_bytes(transformer, lambda: _step(transformer, noisy, timesteps, context))


def _step(transformer: nn.Module, noisy: Tensor, timesteps: Tensor, context: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(noisy, timesteps, context)
    (velocity.float() - noisy).square().mean().backward()


def peak_bytes(module: nn.Module, step: Callable[[], None]) -> int:
    """Most bytes alive at once that ``step`` made, gradients of the module's parameters left out."""

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    learning = [p for p in module.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(forget) for p in learning]
    try:
        with _Live(module.parameters()) as live:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    return live.peak


def _materialise(transformer: nn.Module) -> None:
    """Give a module on the meta device (fake) weights, as ``plan_memory`` counts them."""
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.float32 if parameter.requires_grad else torch.bfloat16
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, fake)


class _Live(TorchDispatchMode):
    """Follows the storages that operations make, until nothing holds them."""

    def __init__(self, known: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._meet, result)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


def describe(plans: Sequence[MemoryPlan]) -> list[str]:
    """The plans side by side, in GiB a GPU."""
    lines = [f"{'GiB a GPU':<12}" + "".join(f"{f'{plan.gpus} GPU' + 's' * (plan.gpus > 1):>10}" for plan in plans)]
    for name in plans[0].parts:
        lines.append(f"{name:<12}" + "".join(f"{plan.parts[name] / GIB:>10.1f}" for plan in plans))
    return [*lines, f"{'total':<12}" + "".join(f"{plan.total / GIB:>10.1f}" for plan in plans)]
