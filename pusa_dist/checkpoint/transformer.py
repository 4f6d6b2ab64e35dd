"""A transformer with its weights: from files, or drawn from a seed."""

import torch
from torch import Tensor

from pusa_dist.checkpoint.keys import with_diffusers_names
from pusa_dist.checkpoint.load import load_exactly, read_tensors
from pusa_dist.checkpoint.seeded import seeded_state
from pusa_dist.config import ModelConfig, Precision
from pusa_dist.errors import ConfigError
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer
from pusa_dist.schedule import DTYPES
from pusa_dist.weights import files_of


def build_transformer(
    model: ModelConfig, expert: str, *, device: str, precision: Precision
) -> VectorTimestepTransformer:
    """One expert of a model, ready for inference.

    Besides the weights themselves, no more than one tensor of a file is in memory at a time.

    Args:
        model: whose expert.
        expert: one of ``model.experts``.
        device: where the weights go.
        precision: of every weight.

    Raises:
        ConfigError: unknown expert, or no file of that name.
        CheckpointError: the files do not hold exactly this model.
    """
    with torch.device("meta"):
        transformer = new_transformer(model.transformer)
    dtype = DTYPES[precision]
    tensors = stored_weights(model, expert, transformer, dtype=dtype, device=device)
    load_exactly(transformer, tensors, f"transformer {model.name}/{expert}")
    return transformer.eval().requires_grad_(False)


def stored_weights(
    model: ModelConfig,
    expert: str,
    transformer: VectorTimestepTransformer,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """One expert's weights by diffusers' names, from the files or from the seed.

    Args:
        model: whose expert.
        expert: one of ``model.experts``.
        transformer: of its shape, on any device.
        dtype: None keeps the files' own; on the CPU they are then only mapped, and read as they are used.
        device: where they go.

    Raises:
        ConfigError: unknown expert, or no file of that name.
        CheckpointError: the files cannot be read, or name a weight twice.
    """
    if expert not in model.experts:
        raise ConfigError(f"expert {expert!r} is unknown; the experts of {model.name} are {', '.join(model.experts)}")
    if model.weights.seed is not None:
        drawn = seeded_state(transformer, model.weights.seed, f"transformer/{expert}")
        return {name: tensor.to(device, dtype) for name, tensor in drawn.items()}
    files = files_of(model, f"weights.transformer.{expert}", model.weights.transformer.get(expert))
    return with_diffusers_names(read_tensors(files, dtype=dtype, device=device), f"transformer {model.name}/{expert}")
