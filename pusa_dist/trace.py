"""What a forward costs and what it computes on the way, without a GPU.

``trace_forward`` runs a model on the meta device, where tensors have shapes and no data: floating-point
operations and tensor sizes of the full 14B model are exact, in seconds, on a laptop.
``record_forward`` runs a real forward and keeps its intermediate results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pusa_dist.config import TransformerConfig
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer, sinusoid

# Tokens of text that the production encoder gives, padding included.
TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Trace:
    """Cost of one forward."""

    total_flops: int
    """Multiplications and additions of matrix products, convolutions and attention."""
    largest_tensor_numel: int
    """Elements of the largest tensor that any operation of the forward made."""
    largest_tensor_shape: tuple[int, ...]
    largest_tensor_op: str
    """The operation that made it."""
    tokens: int
    """Tokens of the whole clip, S."""

    @property
    def total_tflops(self) -> float:
        """Total in units of 10^12."""
        return self.total_flops / 1e12


def meta_transformer(config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> VectorTimestepTransformer:
    """A transformer of any size that occupies no memory, for ``trace_forward``."""
    with torch.device("meta"):
        model = new_transformer(config).eval().requires_grad_(False)
    return torch.nn.Module.to(model, dtype)  # diffusers' own ``to`` warns of modules it would keep in float32


def trace_forward(model: VectorTimestepTransformer, latents_shape: Sequence[int]) -> Trace:
    """Count a forward's operations and find its largest tensor.

    Attention counts as one fused operation, which is how every device runs it; unfused, its matrix of
    scores would be the largest tensor.

    Args:
        model: on the meta device (``meta_transformer``); on a real one it is really run.
        latents_shape: (C, F, H, W) or (B, C, F, H, W); 81 frames of 480x832 are (16, 21, 60, 104).
    """
    batch, channels, frames, height, width = (1, *latents_shape) if len(latents_shape) == 4 else latents_shape
    parameter = model.proj_out.weight
    with torch.device(parameter.device):
        latents = torch.zeros(batch, channels, frames, height, width)
        timestep = torch.zeros(batch, frames)
        context = torch.zeros(batch, TEXT_TOKENS, model.config["text_dim"], dtype=parameter.dtype)
    return trace_call(lambda: model(latents, timestep, context), tokens=frames * height * width // 4)


def trace_call(call: Callable[[], Any], *, tokens: int) -> Trace:
    """Trace any computation on meta tensors, to compare with ``trace_forward``."""
    largest = _LargestTensor()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _FusedAttention(), counter, largest:
        call()
    return Trace(counter.get_total_flops(), largest.numel, largest.shape, largest.op, tokens)


def record_forward(
    model: VectorTimestepTransformer, latents: Tensor, timestep: Tensor, context: Tensor
) -> dict[str, Tensor]:
    """Run a forward on one rank and keep what it computes on the way.

    Args:
        model: not parallelized.
        latents: (B, C, F, H, W).
        timestep: (B, F).
        context: (B, L, text_dim).

    Returns:
        ``sinusoid`` (B, F, freq_dim), ``temb`` (B, F, E), ``tproj`` (B, F, 6 * E), ``ctx_emb`` (B, L, E), ``patch``
        (B, E, F, H/2, W/2), ``block0``, ``block1``, ... (B, F * H/2 * W/2, E) and ``output`` (B, C, F, H, W).
    """
    embedder = model.condition_embedder
    seen: dict[str, Tensor] = {}
    watched = {"temb": embedder.time_embedder, "tproj": embedder.time_proj, "ctx_emb": embedder.text_embedder}
    watched |= {f"block{index}": block for index, block in enumerate(model.blocks)}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            seen[name] = output.flatten(1, 2) if name.startswith("block") else output

        return hook

    def keep_patches(module: Any, args: tuple[Tensor, ...]) -> None:
        grid = (latents.shape[3] // 2, latents.shape[4] // 2)
        seen["patch"] = args[0].permute(0, 3, 1, 2).unflatten(3, grid)

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    handles.append(model.blocks[0].register_forward_pre_hook(keep_patches))
    try:
        output = model(latents, timestep, context)
    finally:
        for handle in handles:
            handle.remove()
    waves = sinusoid(timestep, model.config["freq_dim"]).to(model.proj_out.weight.dtype)
    return {"sinusoid": waves, **seen, "output": output}


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0
        self.shape: tuple[int, ...] = ()
        self.op = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.numel:
                self.numel, self.shape, self.op = leaf.numel(), tuple(leaf.shape), str(func)
        return result


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args or (kwargs["query"], kwargs["key"], kwargs["value"])  # type: ignore[index]
            if query.device.type == "meta":
                return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **(kwargs or {}))
