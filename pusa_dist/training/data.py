"""What the transformer is trained on: latents of the world's clips with their captions.

The clips are drawn, encoded once and kept in one file; where the file is there already, it is used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from pusa_dist.errors import CheckpointError
from pusa_dist.model.text import tokenise
from pusa_dist.tokenizer import clean_prompt
from pusa_dist.training.whole_clip import encode_moments
from pusa_dist.world.caption import caption
from pusa_dist.world.render import render
from pusa_dist.world.scene import scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class WorldLatents:
    """Training clips 0..N-1 of the world, as latents and tokens."""

    latents: Tensor
    """(N, C, F, H, W) float16, normalised."""
    tokens: Tensor
    """(N, L) int64, captions."""
    masks: Tensor
    """(N, L) int64, 1 for a caption's tokens."""

    def __len__(self) -> int:
        return len(self.latents)


def load_world(vae: AutoencoderKLWan, tokenizer: Tokenizer, max_tokens: int, count: int, path: Path) -> WorldLatents:
    """The first ``count`` training clips; encoded now unless the file holds them.

    Raises:
        CheckpointError: the file holds clips encoded by another autoencoder.
    """
    mark = fingerprint(vae)
    if not path.exists():
        logger.info("encoding %d clips into %s", count, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"latents": encode_world(vae, range(count))}, partial, metadata={"vae": mark})
        partial.replace(path)
    with safe_open(path, framework="pt") as file:
        latents = file.get_tensor("latents")
        if file.metadata()["vae"] != mark or len(latents) < count:
            raise CheckpointError(f"{path} holds other latents than this run needs; delete it to have them made")
    tokens, masks = tokenise_all(tokenizer, [caption(scene(seed)) for seed in range(count)], max_tokens)
    return WorldLatents(latents[:count], tokens, masks)


@torch.no_grad()
def encode_world(vae: AutoencoderKLWan, seeds: Sequence[int], batch_size: int = 16) -> Tensor:
    """Latents (N, C, F, H, W) float16 of training clips, normalised by the statistics of the autoencoder."""
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    parts = []
    for start in tqdm(range(0, len(seeds), batch_size), desc="encode", unit="batch"):
        clips = np.stack([render(scene(seed)) for seed in seeds[start : start + batch_size]])
        video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().to(vae.device) / 127.5 - 1.0
        with torch.autocast(vae.device.type, torch.bfloat16):
            means, _ = encode_moments(vae, video)
        parts.append(((means.float().cpu() - mean) / std).half())
    return torch.cat(parts).contiguous()


def tokenise_all(tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens and masks (N, L) of prompts."""
    ids, masks = zip(*(tokenise(tokenizer, clean_prompt(prompt), max_tokens) for prompt in prompts), strict=True)
    return torch.cat(ids), torch.cat(masks)


def fingerprint(vae: AutoencoderKLWan) -> str:
    """A number that another autoencoder will not share."""
    weights = sum(p.double().abs().sum().item() for p in vae.parameters())
    return f"{weights:.6f}/{sum(vae.config['latents_mean']):.6f}/{sum(vae.config['latents_std']):.6f}"
