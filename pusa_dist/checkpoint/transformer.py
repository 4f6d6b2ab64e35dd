"""A transformer with its weights: from files, or drawn from a seed."""

import torch

from pusa_dist.checkpoint.keys import with_diffusers_names
from pusa_dist.checkpoint.load import load_exactly, read_tensors, weight_files
from pusa_dist.checkpoint.seeded import seeded_state
from pusa_dist.config import ModelConfig, Precision
from pusa_dist.errors import ConfigError
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_transformer(
    model: ModelConfig, expert: str, *, device: str, precision: Precision, weights_root: str | None = None
) -> VectorTimestepTransformer:
    """One expert of a model, ready for inference.

    Besides the weights themselves, no more than one tensor of a file is in memory at a time.

    Args:
        model: whose expert.
        expert: one of ``model.experts``.
        device: where the weights go.
        precision: of every weight.
        weights_root: overrides the folder of ``model.weights``.

    Raises:
        ConfigError: unknown expert, or no file of that name.
        CheckpointError: the files do not hold exactly this model.
    """
    if expert not in model.experts:
        raise ConfigError(f"expert {expert!r} is unknown; the experts of {model.name} are {', '.join(model.experts)}")
    with torch.device("meta"):
        transformer = new_transformer(model.transformer)
    what = f"transformer {model.name}/{expert}"
    dtype = DTYPES[precision]
    if model.weights.seed is not None:
        drawn = seeded_state(transformer, model.weights.seed, f"transformer/{expert}")
        tensors = {name: tensor.to(device, dtype) for name, tensor in drawn.items()}
    else:
        files = weight_files(root_of(model, weights_root), pattern_of(model, expert))
        tensors = with_diffusers_names(read_tensors(files, dtype=dtype, device=device), what)
    load_exactly(transformer, tensors, what)
    return transformer.eval().requires_grad_(False)


def root_of(model: ModelConfig, weights_root: str | None) -> str:
    """Folder of a model's files.

    Raises:
        ConfigError: neither the model nor the caller names one.
    """
    root = weights_root or model.weights.root
    if root is None:
        raise ConfigError(f"{model.name} needs files, and no folder of weights is set; set weights.root")
    return root


def pattern_of(model: ModelConfig, expert: str) -> str:
    """Glob of an expert's files.

    Raises:
        ConfigError: the model's configuration names none.
    """
    pattern = model.weights.transformer.get(expert)
    if pattern is None:
        raise ConfigError(f"{model.name}: weights.transformer names no files for expert {expert!r}; add them")
    return pattern
