"""Weights drawn from a seed: the same on every machine and device, whatever else uses random numbers.

Each tensor has a generator of its own, seeded by the seed and the tensor's full name, so a weight does
not change because another was added, and two experts differ.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def seeded_normal(shape: Sequence[int], seed: int, name: str, std: float = 1.0) -> Tensor:
    """Normal numbers on the CPU in float32 that depend on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(tuple(shape), generator=generator) * std


def seeded_state(module: nn.Module, seed: int, name: str) -> dict[str, Tensor]:
    """Weights for every parameter and persistent buffer of a module, which may be on the meta device.

    Matrices and kernels keep the scale of what passes through them (variance 1 / fan-in), gains are
    near 1 and biases near 0, so a deep stack of them neither vanishes nor explodes.
    """
    return {key: _draw(key, tensor.shape, seed, f"{name}/{key}") for key, tensor in module.state_dict().items()}


def _draw(key: str, shape: torch.Size, seed: int, name: str) -> Tensor:
    if key.endswith("bias"):
        return seeded_normal(shape, seed, name, 0.02)
    if key.endswith("scale_shift_table"):
        return seeded_normal(shape, seed, name, shape[-1] ** -0.5)
    if len(shape) == 1 or max(shape) == shape.numel():  # gains of norms, (E,) or (C, 1, 1)
        return 1.0 + seeded_normal(shape, seed, name, 0.02)
    return seeded_normal(shape, seed, name, shape[1:].numel() ** -0.5)
