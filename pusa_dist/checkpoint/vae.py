"""Building the VAE: published names to diffusers' names, or weights drawn from a seed."""

import re
from collections.abc import Mapping

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from pusa_dist.checkpoint.load import load_exactly, read_tensors
from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.config import ModelConfig, Precision, VaeConfig
from pusa_dist.schedule import DTYPES
from pusa_dist.weights import files_of

# Published name (a prefix or an infix) to diffusers' name.
_PARTS = {
    "conv1.": "quant_conv.",
    "conv2.": "post_quant_conv.",
    "encoder.conv1.": "encoder.conv_in.",
    "decoder.conv1.": "decoder.conv_in.",
    "encoder.downsamples.": "encoder.down_blocks.",
}
_HALVES = {
    "middle.0.": "mid_block.resnets.0.",
    "middle.1.": "mid_block.attentions.0.",
    "middle.2.": "mid_block.resnets.1.",
    "head.0.": "norm_out.",
    "head.2.": "conv_out.",
}
_BLOCK = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_PREFIXES = {**_PARTS, **{f"{half}.{a}": f"{half}.{b}" for half in ("encoder", "decoder") for a, b in _HALVES.items()}}
_UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
_UPSAMPLE = re.compile(r"decoder\.upsamples\.(\d+)\.")


def build_vae(model: ModelConfig, *, device: str, precision: Precision) -> AutoencoderKLWan:
    """The model's VAE with its weights, ready to run.

    Args:
        model: its shape and where its weights are.
        device: where the weights go.
        precision: dtype of the weights and of what is computed.

    Raises:
        CheckpointError: the file's tensors are not exactly the model's.
        ConfigError: the file does not exist.
    """
    dtype = DTYPES[precision]
    with torch.device("meta"):
        vae = new_vae(model.vae)
    if model.weights.seed is not None:
        drawn = _drawn(vae, model.weights.seed)
        tensors = {name: tensor.to(device, dtype) for name, tensor in drawn.items()}
    else:
        files = files_of(model, "weights.vae", model.weights.vae)
        published = read_tensors(files, dtype=dtype, device=device)
        tensors = diffusers_names(published, model.vae.num_res_blocks)
    load_exactly(vae, tensors, f"the VAE of {model.name}")
    return vae.eval().requires_grad_(False)


def new_vae(config: VaeConfig) -> AutoencoderKLWan:
    """An autoencoder of this shape on the current default device, its weights not yet meaningful."""
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )


def diffusers_names(tensors: Mapping[str, Tensor], num_res_blocks: int) -> dict[str, Tensor]:
    """Rename a published Wan VAE's tensors (with or without a leading ``model.``) as diffusers names them.

    Names that are none of the published ones stay, so a file in diffusers' own format passes unchanged.
    """
    return {_diffusers_name(name, num_res_blocks): tensor for name, tensor in tensors.items()}


def _diffusers_name(name: str, num_res_blocks: int) -> str:
    name = name.removeprefix("model.")
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    # The decoder's flat list: per level num_res_blocks + 1 residual blocks, then an upsampler.
    if match := _UPSAMPLE.match(name):
        level, place = divmod(int(match[1]), num_res_blocks + 2)
        block = f"resnets.{place}" if place <= num_res_blocks else "upsamplers.0"
        name = f"decoder.up_blocks.{level}.{block}.{name[match.end() :]}"
    for old, new in _BLOCK.items():
        name = name.replace(f".{old}", f".{new}")
    return name


def original_names(tensors: Mapping[str, Tensor], num_res_blocks: int) -> dict[str, Tensor]:
    """Rename a VAE's tensors as the published Wan VAE names them: the reverse of ``diffusers_names``."""
    return {_original_name(name, num_res_blocks): tensor for name, tensor in tensors.items()}


def _original_name(name: str, num_res_blocks: int) -> str:
    for new, old in _BLOCK.items():
        name = name.replace(f".{old}", f".{new}")
    if match := _UP_BLOCK.match(name):
        place = int(match[3]) if match[2] == "resnets" else num_res_blocks + 1
        name = f"decoder.upsamples.{int(match[1]) * (num_res_blocks + 2) + place}.{name[match.end() :]}"
    for new, old in _PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# Gains of the drawn weights: activations stay near unit size, colours spread over [-1, 1] without
# saturating, latents spread like the published statistics.
_HIDDEN_GAIN = 1.4
_OUTPUT_GAIN = {"decoder.conv_out.weight": 0.7, "encoder.conv_out.weight": 3.0, "quant_conv.weight": 1.0}


def _drawn(vae: AutoencoderKLWan, seed: int) -> dict[str, Tensor]:
    return {name: _drawn_tensor(name, tensor, seed) for name, tensor in vae.state_dict().items()}


def _drawn_tensor(name: str, tensor: Tensor, seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(tensor.shape)
    if name.endswith("gamma"):
        return torch.ones(tensor.shape)
    gain = _OUTPUT_GAIN.get(name, _HIDDEN_GAIN)
    return seeded_normal(tensor.shape, seed, f"vae/{name}", gain / tensor[0].numel() ** 0.5)
