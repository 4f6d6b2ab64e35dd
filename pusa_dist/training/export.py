"""Trained weights to files: the published checkpoints' names, safetensors, read by the same loaders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from pusa_dist.checkpoint import text, vae
from pusa_dist.checkpoint.keys import original_name
from pusa_dist.model.transformer import VectorTimestepTransformer

STORED = torch.float16
"""Half the size of float32, and eight times as exact as bfloat16; loading converts to what the device computes in."""


def save_vae(model: AutoencoderKLWan, num_res_blocks: int, path: Path) -> None:
    """Write an autoencoder under the published Wan VAE's names."""
    _save(vae.original_names(model.state_dict(), num_res_blocks), path)


def save_text_encoder(model: UMT5EncoderModel, path: Path) -> None:
    """Write a text encoder under the published umT5's names."""
    _save(text.original_names(model.state_dict()), path)


def save_transformer(model: VectorTimestepTransformer, path: Path) -> None:
    """Write a transformer under the published Wan DiT's names."""
    _save({original_name(name): tensor for name, tensor in model.state_dict().items()}, path)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().to(STORED).contiguous() for name, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(stored, partial)
    partial.replace(path)


@torch.no_grad()
def fold_statistics(model: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Change the 1x1x1 layers on either side of the latents so that these have mean 0 and deviation 1, in place.

    Args:
        model: whose ``latents_mean`` and ``latents_std`` are 0 and 1.
        mean: (C,), measured.
        std: (C,), measured.
    """
    into: Any = model.quant_conv
    out_of: Any = model.post_quant_conv
    into.weight[: len(mean)] /= std.view(-1, 1, 1, 1, 1)
    into.bias[: len(mean)] -= mean
    into.bias[: len(mean)] /= std
    into.bias[len(mean) :] -= 2 * std.log()  # the log variances, in the new unit
    out_of.bias += out_of.weight.flatten(1) @ mean
    out_of.weight *= std.view(1, -1, 1, 1, 1)
