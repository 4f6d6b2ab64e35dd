"""Where a generation starts: seeded noise, with the given latent frames mixed in.

Ref: Pusa V1.0, arXiv:2507.16116.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pusa_dist.request import Conditioning


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise that depends on the seed alone.

    It is drawn on the CPU in float32 whatever the device and the precision.

    Args:
        shape: (C, F, H, W).
        seed: any 64-bit integer.
    """
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def initial_latents(
    noise: Tensor, given: Tensor | None, conditioning: Sequence[Conditioning], sigma_start: Tensor, dtype: torch.dtype
) -> Tensor:
    """Latents before the first step.

    A given frame with multiplier 0 is the clean latent; with m > 0 it is
    ``(1 - s) * clean + s * noise``, s = m * sigma_start, in float32 and rounded once.

    Args:
        noise: (C, F, H, W).
        given: (C, K, H, W) clean latents in the order of ``conditioning``; None when it is empty.
        conditioning: where they go and how noisy they are.
        sigma_start: the schedule's first sigma, a float32 scalar.
        dtype: of the result; noise and given latents are rounded to it first.

    Returns:
        (C, F, H, W) in ``dtype``.

    Raises:
        ValueError: ``given`` does not have one latent frame of the noise's size per entry.
    """
    latents = noise.to(dtype, copy=True)
    expected = (noise.shape[0], len(conditioning), *noise.shape[2:])
    shape = (noise.shape[0], 0, *noise.shape[2:]) if given is None else tuple(given.shape)
    if shape != expected:
        raise ValueError(f"given latents are {shape}; conditioning asks for {expected} (channels, entries, h, w)")
    if given is None:
        return latents
    for index, entry in enumerate(conditioning):
        clean = given[:, index].to(dtype)
        if entry.noise_multiplier > 0:
            share = sigma_start * entry.noise_multiplier
            start = noise[:, entry.position].to(dtype).float()
            clean = ((1 - share) * clean.float() + share * start).to(dtype)
        latents[:, entry.position] = clean
    return latents
