"""The adaptation itself: low-rank updates of a frozen transformer, through peft.

They sit where Pusa's do, on the query, key, value and output of both attentions and both linears of the
feed-forward of every block; the input, time and text embeddings and the head stay the base's. Files are in
Pusa's format (original Wan names, ``<linear>.lora_A.default.weight``), which the product merges as
``W = W0 + strength * (B @ A)`` with no division by the rank.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pusa_dist.checkpoint.keys import original_name
from pusa_dist.checkpoint.load import read_tensors, refuse
from pusa_dist.checkpoint.lora import read_pusa
from pusa_dist.errors import ConfigError
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.training.distributed import like, whole

TARGETS = r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
"""Full names of the adapted linears."""
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def inject(
    transformer: VectorTimestepTransformer, rank: int, alpha: float | None = None, *, seed: int = 0
) -> VectorTimestepTransformer:
    """Add an adapter that starts as no change, and freeze everything else, in place.

    A is drawn as peft draws it (Kaiming uniform), B is zero. Both are float32 whatever the base is, on the
    base's device; they compute in float32 unless autocast says otherwise.

    Args:
        transformer: loaded; may be on the meta device.
        rank: r of every update.
        alpha: the update is ``alpha / rank * (B @ A)``; None: the rank, as Pusa trains.
        seed: of A.

    Returns:
        ``transformer``.

    Raises:
        ConfigError: the rank is not positive, or there is an adapter already.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank}: use at least 1; Pusa V1.0 has 512")
    if adapter_parameters(transformer):
        raise ConfigError("the transformer has an adapter already; load the base again")
    from peft import LoraConfig, inject_adapter_in_model  # imported late: it takes seconds

    # peft types lora_alpha as a whole number and divides it by the rank; any number will do.
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=TARGETS)  # type: ignore[arg-type]
    inject_adapter_in_model(config, transformer, low_cpu_mem_usage=True)  # on the meta device, filled here
    device = transformer.proj_out.weight.device
    for name, parameter in adapter_parameters(transformer).items():
        holder: Any = transformer.get_submodule(name.removesuffix(".weight"))
        value = parameter.data.float() if device.type == "meta" else first_value(parameter.shape, seed, name).to(device)
        holder.weight = nn.Parameter(value)
    return transformer


def first_value(shape: torch.Size, seed: int, name: str) -> Tensor:
    """What a parameter starts as, on the CPU in float32: zeros for B, for A a Kaiming draw of the seed and its name."""
    value = torch.zeros(shape)
    if name.endswith(_UP):
        return value
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    return nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, all that is trained, by their names in the transformer."""
    return {name: parameter for name, parameter in transformer.named_parameters() if ".lora_" in name}


def parameters_by_key(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their keys in Pusa's files, such as ``blocks.0.ffn.2.lora_B.default.weight``."""
    return {_pusa_key(name): parameter for name, parameter in adapter_parameters(transformer).items()}


def published_state(transformer: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The adapter as it is published: Pusa's keys, on the CPU, for merging at strength 1.

    The scale ``alpha / rank``, which the format has no place for, is part of B. Collective where the
    parameters are sharded.

    Args:
        transformer: with an adapter.
        keep: False for a rank that only takes part; it gets nothing.
    """
    state = {}
    for name, parameter in adapter_parameters(transformer).items():
        gathered = whole(parameter, keep=keep)
        if keep:
            state[_pusa_key(name)] = (gathered * _scale(transformer, name)).contiguous()
    return state


def load_adapter(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Continue from a published adapter: the reverse of ``published_state``.

    Args:
        transformer: with an adapter injected.
        tensors: of a file that the product can serve (``read_pusa``), of the same rank.

    Raises:
        CheckpointError: listing every key that is missing, unexpected or of another shape, or first every one that is
            no LoRA's or without its other half; nothing was loaded.
    """
    parameters = adapter_parameters(transformer)
    given: dict[str, Tensor] = {}
    for weight, delta in read_pusa(tensors).items():
        linear = weight.removesuffix(".weight")
        given |= {linear + _DOWN: delta.down, linear + _UP: delta.up}
    problems = {
        "missing": [_pusa_key(name) for name in parameters if name not in given],
        "unexpected": [_pusa_key(name) for name in given if name not in parameters],
        "misshapen": [
            f"{_pusa_key(name)} is {tuple(given[name].shape)}, not {tuple(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in given and given[name].shape != parameter.shape
        ],
    }
    refuse("the adapter", problems)
    for name, parameter in parameters.items():
        value = given[name].to(parameter.dtype) / _scale(transformer, name)
        with torch.no_grad():
            parameter.copy_(like(value, parameter))


def save_adapter(transformer: nn.Module, path: Path, *, dtype: torch.dtype = torch.float32, write: bool = True) -> None:
    """Write the adapter to a safetensors file in Pusa's format; collective where it is sharded.

    Args:
        transformer: with an adapter.
        path: of the file; its folder is made.
        dtype: of the file; half precision halves it.
        write: whether this rank is the one that writes.
    """
    state = published_state(transformer, keep=write)
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.to(dtype) for key, tensor in state.items()}, path)


def read_adapter(transformer: nn.Module, path: Path) -> None:
    """``load_adapter`` from a file."""
    load_adapter(transformer, read_tensors([path]))


def _scale(transformer: nn.Module, name: str) -> float:
    """What a half has to be multiplied by for the update to be B @ A alone."""
    if name.endswith(_DOWN):
        return 1.0
    linear: Any = transformer.get_submodule(name.removesuffix(_UP))
    return linear.scaling["default"]


def _pusa_key(name: str) -> str:
    """``blocks.0.attn1.to_q.lora_A.default.weight`` to ``blocks.0.self_attn.q.lora_A.default.weight``."""
    half = _DOWN if name.endswith(_DOWN) else _UP
    return original_name(name.removesuffix(half) + ".weight").removesuffix(".weight") + half
