"""The autoencoder's stage: clips of the world through ``AutoencoderKLWan`` and back.

Still crops first, then short ones, then long ones, then whole clips: convolutions carry over to larger
pictures, but not to longer clips, and what a still needs is learnt ten times as fast from stills.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanResample
from numpy.typing import NDArray
from torch import Tensor, nn

from pusa_dist.checkpoint.vae import new_vae
from pusa_dist.config import VaeConfig
from pusa_dist.model.vae import decode_chunks, encode
from pusa_dist.training.distributed import ALONE, Ranks
from pusa_dist.training.loop import LoopOptions, autocast, train
from pusa_dist.training.samples import psnr, to_frames, write_grid
from pusa_dist.training.whole_clip import decode_unclamped, encode_moments
from pusa_dist.world.render import render
from pusa_dist.world.scene import NUM_FRAMES, SIDE, Scene, scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What a part of the steps sees."""

    steps: int
    batch_size: int
    frames: int
    """4k+1."""
    side: int
    """Pixels of the square crop; 64 is the whole picture."""


PHASES = (
    Phase(steps=600, batch_size=48, frames=1, side=32),
    Phase(steps=600, batch_size=24, frames=5, side=32),
    Phase(steps=1600, batch_size=8, frames=13, side=32),
    Phase(steps=600, batch_size=2, frames=NUM_FRAMES, side=SIDE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeOptions:
    """The recipe of the autoencoder."""

    phases: tuple[Phase, ...] = PHASES
    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(steps=3400, batch_size=1, lr=4e-4, clip=0.2, ema=0.995)
    )
    kl: float = 2e-4
    """Weight of the mean KL divergence per latent value."""
    num_clips: int = 4096
    """Clips drawn once, in memory, that crops are taken from."""

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


def train_vae(config: VaeConfig, options: VaeOptions, out: Path, ranks: Ranks = ALONE) -> AutoencoderKLWan:
    """Train an autoencoder of a shape; its latents are not normalised yet (``measured``)."""
    torch.manual_seed(options.loop.seed)
    vae = new_vae(unnormalised(config))
    nn.Module.to(vae, options.loop.device)
    start_as_passthrough(vae)
    scenes = [scene(seed) for seed in range(options.num_clips)]
    clips = torch.from_numpy(np.stack([render(each) for each in scenes]))  # (N, T, H, W, 3) uint8
    unseen = torch.from_numpy(np.stack([render(scene(seed, "held-out")) for seed in range(6)]))

    def loss(step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        video = _crops(clips, scenes, options.phase(step), generator)
        return vae_loss(vae, video.to(options.loop.device), options, generator)

    def sample(step: int) -> None:
        truth, decoded = unseen.numpy(), reconstruct(vae, to_video(unseen))
        quality = psnr(decoded, truth)
        rows = [row for pair in zip(truth, decoded, strict=True) for row in pair]
        write_grid(rows, out / f"vae-{step:06d}.png")
        by_frame = quality.mean(0).round(1).tolist()
        logger.info("step %d: %.2f dB, least %.2f, by frame %s", step, quality.mean(), quality.min(), by_frame)

    train(vae, loss, options.loop, out, sample, ranks)
    return vae.eval()


@torch.no_grad()
def start_as_passthrough(vae: AutoencoderKLWan) -> None:
    """Initialise the layers without a bypass so that they hand on what they get.

    Blocks have a residual path, but the layers that change the rate or the size do not: drawn at random,
    a chain of them mixes everything before the first step.
    """
    for module in vae.modules():
        if not isinstance(module, WanResample) or module.mode == "none":
            continue
        _hand_on(module.resample[1], pool=module.mode.startswith("downsample"))
        if module.mode.endswith("3d"):
            _hand_on(module.time_conv)
    moments: Any = vae.quant_conv
    _hand_on(moments)
    _hand_on(vae.post_quant_conv)
    half = moments.bias.shape[0] // 2
    moments.weight[half:] *= 0.1
    moments.bias[half:] = -5.0  # little noise on the latents at first, or nothing gets through


def _hand_on(convolution: Any, pool: bool = False) -> None:
    """Output i is input i, modulo their number: of the newest frame, and of the pixel or the four it stands for."""
    weight = convolution.weight
    convolution.bias.zero_()
    weight.mul_(0.3)
    outputs, inputs, *kernel = weight.shape
    for i in range(max(outputs, inputs)):
        share = min(1.0, outputs / inputs)
        if pool:
            weight[i % outputs, i % inputs, :2, :2] += share / 4
        else:
            place = [_tap(size, axis) for axis, size in enumerate(kernel, 5 - len(kernel))]
            weight[(i % outputs, i % inputs, *place)] += share


def _tap(size: int, axis: int) -> int:
    # Time (axis 2) looks back, so the newest frame is the last tap; in space the middle is the place itself.
    return size - 1 if axis == 2 else size // 2


def unnormalised(config: VaeConfig) -> VaeConfig:
    """The same shape, its latents as they come out of the encoder."""
    return replace(config, latents_mean=(0.0,) * config.z_dim, latents_std=(1.0,) * config.z_dim)


def vae_loss(
    vae: AutoencoderKLWan, video: Tensor, options: VaeOptions, generator: torch.Generator
) -> dict[str, Tensor]:
    """Absolute and squared error of the unclamped reconstruction, and the KL divergence of the latents."""
    with autocast(options.loop):
        mean, log_variance = encode_moments(vae, video)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20.0, 10.0)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        decoded = decode_unclamped(vae, mean + (0.5 * log_variance).exp() * noise).float()
    error = decoded - video
    absolute, squared = error.abs().mean(), error.square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return {"loss": absolute + squared + options.kl * kl, "l1": absolute, "mse": squared, "kl": kl}


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, video: Tensor) -> NDArray[np.uint8]:
    """Clips (B, 3, T, H, W) through the autoencoder as the service runs it: (B, T, H, W, 3) bytes."""
    return to_frames(torch.cat(list(decode_chunks(vae, encode(vae, video))), dim=2))


def to_video(frames: Tensor) -> Tensor:
    """Bytes (B, T, H, W, 3) to (B, 3, T, H, W) float32 in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def _crops(clips: Tensor, scenes: list[Scene], phase: Phase, generator: torch.Generator) -> Tensor:
    """Crops whose middle frame has the shape's centre somewhere in it."""
    parts = []
    for index in torch.randint(len(clips), (phase.batch_size,), generator=generator).tolist():
        first = int(torch.randint(NUM_FRAMES - phase.frames + 1, (), generator=generator))
        middle = scenes[index].centre(first + phase.frames // 2)
        shift = torch.rand(2, generator=generator).tolist()
        left, top = (
            min(max(round(centre - part * phase.side), 0), SIDE - phase.side)
            for centre, part in zip(middle, shift, strict=True)
        )
        window = (slice(first, first + phase.frames), slice(top, top + phase.side), slice(left, left + phase.side))
        parts.append(clips[index][window])
    return to_video(torch.stack(parts))
