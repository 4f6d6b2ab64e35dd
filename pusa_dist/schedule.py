"""The noise schedule: every sigma and timestep of a generation, worked out once.

Time is a vector: a table has one row per step and one column per latent frame. A step is then
``latents += (sigma_next[i] - sigma[i]) * velocity``, by loop index, for every task alike.

Ref: Pusa V1.0, arXiv:2507.16116. The order of the floating-point operations is Pusa's, because
truncating a timestep makes the last bit of a product visible.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_dist.config import Precision

TIMESTEP_SCALE = 1000.0
"""The model is fed 1000 * sigma."""

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What each precision computes in, timesteps included."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTables:
    """What every step does to every latent frame; each table is (N, F) float32 on the CPU."""

    sigma: Tensor
    """Noise level before the step."""
    sigma_next: Tensor
    """Noise level after it."""
    model_timesteps: Tensor
    """What the model is fed, rounded as the precision rounds it."""

    @property
    def num_steps(self) -> int:
        """N."""
        return self.sigma.shape[0]


def shifted_sigmas(num_inference_steps: int, shift: float, strength: float = 1.0) -> Tensor:
    """Scalar schedule shared by all free frames.

    Args:
        num_inference_steps: N.
        shift: greater than 1 spends more steps at high noise.
        strength: noise level to start from; 1 is pure noise.

    Returns:
        (N + 1,) float32, descending; the last is 0.
    """
    uniform = torch.linspace(strength, 0.0, num_inference_steps + 1, dtype=torch.float32)
    return shift * uniform / (1 + (shift - 1) * uniform)


def step_tables(
    num_inference_steps: int,
    shift: float,
    num_latent_frames: int,
    multipliers: Mapping[int, float],
    precision: Precision,
) -> StepTables:
    """Resolve a request's schedule into per-frame tables.

    A given frame's timestep and sigma are the loop's, times its noise multiplier. The timestep is
    also rounded to the precision and, when any frame is given, truncated to an integer; sigma is
    not, so the two differ slightly, as in Pusa. A given frame whose timestep truncates to 0 is
    left alone in that step.

    Args:
        num_inference_steps: N.
        shift: of the sigma schedule.
        num_latent_frames: F.
        multipliers: noise multiplier (0..1) of each given latent frame; empty for text-to-video.
        precision: what timesteps are rounded to.
    """
    sigmas = shifted_sigmas(num_inference_steps, shift)
    timesteps = (sigmas[:-1] * TIMESTEP_SCALE).to(DTYPES[precision])
    model_timesteps = _per_frame(timesteps, num_latent_frames)
    sigma = _per_frame(sigmas[:-1], num_latent_frames)
    sigma_next = _per_frame(sigmas[1:], num_latent_frames)
    for frame, multiplier in multipliers.items():
        # The product is rounded to the timesteps' dtype before it is truncated.
        model_timesteps[:, frame] = timesteps * multiplier
        sigma[:, frame] *= multiplier
        sigma_next[:, frame] *= multiplier
    if multipliers:
        model_timesteps = model_timesteps.trunc()
    for frame in multipliers:
        frozen = model_timesteps[:, frame] == 0
        sigma[frozen, frame] = 0.0
        sigma_next[frozen, frame] = 0.0
    return StepTables(sigma, sigma_next, model_timesteps.float())


def expert_index(num_inference_steps: int, shift: float, boundary: float) -> tuple[int, ...]:
    """Which of two experts each step uses: 0 while the noise is high, then 1.

    The unrounded timestep of free frames decides; given frames do not.

    Args:
        num_inference_steps: N.
        shift: of the sigma schedule.
        boundary: steps whose timestep is strictly below ``1000 * boundary`` use expert 1.
    """
    timesteps = shifted_sigmas(num_inference_steps, shift)[:-1] * TIMESTEP_SCALE
    return tuple(int(timestep < boundary * TIMESTEP_SCALE) for timestep in timesteps.tolist())


def training_weights(timesteps: Tensor) -> Tensor:
    """Loss weight of each timestep of a training schedule: a bell around its middle.

    Args:
        timesteps: (N,) in 0..1000, all timesteps of the schedule; the weights average to 1 over them.
    """
    count = len(timesteps)
    bell = torch.exp(-2 * ((timesteps - count / 2) / count) ** 2)
    above = bell - bell.min()
    return above * (count / above.sum())


def _per_frame(values: Tensor, num_latent_frames: int) -> Tensor:
    return values.unsqueeze(1).repeat(1, num_latent_frames)
