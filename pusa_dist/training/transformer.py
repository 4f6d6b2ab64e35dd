"""The transformer's two stages on the world: a text-to-video base, then its adaptation by LoRA.

The base is a video model of the usual kind: one noise level for all frames of a sample, a tenth of the
captions replaced by the negative prompt so that guidance has something to steer away from, and the text
encoder learns along. The adaptation is Pusa's (``objective``): everything is frozen but a low-rank update of
the blocks, and every latent frame has a noise level of its own. The forward is the product's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from pusa_dist.model.text import encode_ids
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.training.accelerate import training_forward
from pusa_dist.training.cache import sample_order
from pusa_dist.training.data import WorldLatents
from pusa_dist.training.loop import LoopOptions
from pusa_dist.training.objective import Lesson, TrainingSchedule, draw, lesson, sample_generator
from pusa_dist.training.objective import loss as adaptation_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOptions:
    """The recipe of the base."""

    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(
            steps=8000, cycle=4000, batch_size=48, lr=1e-3, warmup=200, betas=(0.9, 0.99), ema=0.999, sample_every=500
        )
    )
    num_clips: int = 6144
    caption_dropout: float = 0.1
    """Share of the samples that get the negative prompt."""
    compile: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptOptions:
    """The recipe of the adaptation."""

    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(
            steps=2400, batch_size=16, lr=2e-3, warmup=40, betas=(0.9, 0.99), ema=0.99, sample_every=600
        )
    )
    num_clips: int = 6144
    rank: int = 16
    compile: bool = True
    caption_dropout: float = 0.1
    """As in the base, so that guidance works at any mixture of noise levels. Pusa's own run dropped none."""


class TextToVideo(nn.Module):
    """The transformer with the text encoder, for what trains both."""

    def __init__(self, transformer: VectorTimestepTransformer, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder


class Batches:
    """Samples of a run by their number: latents, tokens and what is to be denoised.

    What a sample is depends on its number and the seed, not on the batch or the rank it falls to.
    """

    def __init__(
        self, world: WorldLatents, negative: tuple[Tensor, Tensor], loop: LoopOptions, dropout: float, *, shared: bool
    ) -> None:
        """Choose what to draw.

        Args:
            world: the clips.
            negative: tokens and mask (1, L) of the negative prompt.
            loop: its seed and device.
            dropout: share of the samples that get the negative prompt.
            shared: one noise level for all frames of a sample.
        """
        self._world, self._negative, self._loop = world, negative, loop
        self._dropout, self._shared = dropout, shared
        self._schedule = TrainingSchedule.of()
        self._order = sample_order(len(world), loop.seed)

    def __call__(self, numbers: range) -> tuple[Lesson, Tensor, Tensor]:
        """The lesson, tokens and masks (B, L) of some samples."""
        generators = [sample_generator(self._loop.seed, number) for number in numbers]
        indices = torch.tensor([self._order(number) for number in numbers])
        tokens, masks = self._world.tokens[indices], self._world.masks[indices]
        for row, generator in enumerate(generators):
            if torch.rand((), generator=generator) < self._dropout:
                tokens[row], masks[row] = self._negative[0][0], self._negative[1][0]
        latents = self._world.latents[indices].float()
        noise, levels = draw(latents, generators, shared=self._shared)
        device = self._loop.device
        return lesson(latents.to(device), noise, levels, self._schedule), tokens.to(device), masks.to(device)


def base_loss(model: TextToVideo, batches: Batches, loop: LoopOptions, numbers: range) -> Mapping[str, Tensor]:
    """Mean squared error of the velocity, every noise level alike."""
    given, tokens, masks = batches(numbers)
    with training_forward(loop):
        context = encode_with_gradient(model.text_encoder, tokens, masks)
        velocity = model.transformer(given.noisy, given.timesteps, context)
    return {"loss": (velocity.float() - given.target).square().mean()}


def adapt_loss(
    transformer: VectorTimestepTransformer,
    text_encoder: UMT5EncoderModel,
    batches: Batches,
    loop: LoopOptions,
    numbers: range,
) -> Mapping[str, Tensor]:
    """The objective of the paper; the text encoder is not trained."""
    given, tokens, masks = batches(numbers)
    with training_forward(loop):
        context = encode_ids(text_encoder, tokens, masks)
        velocity = transformer(given.noisy, given.timesteps, context)
    return {"loss": adaptation_loss(velocity, given), "mse": (velocity.float() - given.target).square().mean().detach()}


encode_with_gradient = encode_ids.__wrapped__  # type: ignore[attr-defined]
"""``encode_ids`` without its ``no_grad``."""
