"""What the transformer is taught: the velocity of latents whose every frame has a noise level of its own.

An index into the schedule of ``NUM_TIMESTEPS`` steps is drawn uniformly, for every latent frame by itself
(the adaptation) or once for all frames of a sample (a text-to-video base). Then, per frame,

    noisy = (1 - sigma) * latents + sigma * noise          target = noise - latents

No frame is kept clean, no timestep is shared by design, no prompt is dropped: conditioning on given frames
is not trained for, it follows from the frames' independence.

Three facts of the public code that the recordings show and that are kept:

* The loss of a sample is its mean squared error times the mean of its frames' weights, rather than a weighted
  mean over frames: a frame's weight also scales its neighbours' errors.
* In bf16 a timestep is rounded before sigma and weight are looked up from it, by the nearest timestep of the
  schedule, so 1000 indices share 294 noise levels. Here the table is made once, by index, and nothing is
  searched for in training.
* Its search takes one sample at a time. Ours takes any batch: the loss is the mean over samples of what each
  would have had alone.

Ref: Pusa V1.0, arXiv:2507.16116.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_dist.config import Precision
from pusa_dist.schedule import DTYPES, TIMESTEP_SCALE, shifted_sigmas, training_weights

NUM_TIMESTEPS = 1000
DEFAULT_SHIFT = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSchedule:
    """What each index means; every table is (N,) float32 on the CPU."""

    timesteps: Tensor
    """What the model is fed, in 0..1000."""
    sigmas: Tensor
    """Noise level in 0..1."""
    weights: Tensor
    """Weight in the loss, averaging to 1 over the indices (in bf16, before they are rounded)."""

    @classmethod
    def of(
        cls, precision: Precision = "fp32", *, shift: float = DEFAULT_SHIFT, num_timesteps: int = NUM_TIMESTEPS
    ) -> "TrainingSchedule":
        """The schedule as a precision sees it.

        Args:
            precision: what timesteps are rounded to; fp32 keeps every index apart.
            shift: of the sigma schedule, as in sampling.
            num_timesteps: N.
        """
        sigmas = shifted_sigmas(num_timesteps, shift)[:-1]
        exact = sigmas * TIMESTEP_SCALE
        fed = exact.to(DTYPES[precision]).float()
        nearest = (exact[None] - fed[:, None]).abs().argmin(dim=1)
        return cls(fed, sigmas[nearest], training_weights(exact)[nearest])

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A batch as the transformer meets it, and what it should answer."""

    noisy: Tensor
    """(B, C, F, H, W) float32, the model's input."""
    timesteps: Tensor
    """(B, F) float32, the model's input."""
    target: Tensor
    """(B, C, F, H, W) float32, the velocity it should give."""
    weights: Tensor
    """(B, F) float32."""


def sample_generator(seed: int, sample: int) -> torch.Generator:
    """Random numbers of one training sample, on the CPU.

    They depend on the seed and the sample's number alone, so neither the number of ranks nor an interruption
    changes what a sample is given.

    Args:
        seed: of the run.
        sample: how many samples the run has seen before it.
    """
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def draw_indices(batch: int, frames: int, generator: torch.Generator, *, shared: bool = False) -> Tensor:
    """Uniform indices into the schedule, (B, F) int64 on the CPU.

    Args:
        batch: B.
        frames: F.
        generator: on the CPU.
        shared: one index for all frames of a sample, instead of one for each.
    """
    drawn = torch.randint(NUM_TIMESTEPS, (batch, 1 if shared else frames), generator=generator)
    return drawn.expand(batch, frames)


def draw(latents: Tensor, generators: Sequence[torch.Generator], *, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Noise like the latents, and indices, from a generator for each sample.

    Args:
        latents: (B, C, F, H, W).
        generators: B of them, on the CPU, as ``sample_generator`` makes them.
        shared: as in ``draw_indices``.

    Returns:
        noise (B, C, F, H, W) float32 and indices (B, F) int64, both on the CPU.
    """
    shape, frames = latents.shape[1:], latents.shape[2]
    indices = [draw_indices(1, frames, generator, shared=shared) for generator in generators]
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(noise), torch.cat(indices)


def lesson(latents: Tensor, noise: Tensor, indices: Tensor, schedule: TrainingSchedule) -> Lesson:
    """Mix noise into every frame at its own level.

    Args:
        latents: (B, C, F, H, W), normalised, on the device of the model.
        noise: of the same shape.
        indices: (B, F) int64 into the schedule.
        schedule: its tables.

    Returns:
        The lesson, on the device of the latents.
    """
    latents, noise = latents.float(), noise.to(latents.device).float()
    timesteps, sigmas, weights = (
        table[indices.cpu()].to(latents.device) for table in (schedule.timesteps, schedule.sigmas, schedule.weights)
    )
    sigma = sigmas[:, None, :, None, None]
    return Lesson((1 - sigma) * latents + sigma * noise, timesteps, noise - latents, weights)


def loss(velocity: Tensor, given: Lesson) -> Tensor:
    """Mean over the samples of squared error times the mean weight of the sample's frames.

    Args:
        velocity: (B, C, F, H, W), what the transformer answered.
        given: what it was asked.

    Returns:
        A float32 scalar.
    """
    errors = (velocity.float() - given.target).square().flatten(1).mean(1)  # (B,)
    return (errors * given.weights.mean(1)).mean()
