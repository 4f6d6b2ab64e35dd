"""Classifier-free guidance, its two branches on one rank or on two sides of the cfg axis."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided_velocity(
    model: VelocityModel,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor,
    negative_context: Tensor | None,
    guidance_scale: Tensor,
    cfg_group: ProcessGroup,
) -> Tensor:
    """``v_neg + scale * (v_pos - v_neg)``, rounded to the model's dtype after each operation.

    Collective over ``cfg_group`` and over the axes the model itself uses. With a cfg axis of two,
    side 0 runs the prompt and side 1 the negative prompt; without guidance both run the prompt.

    Args:
        model: (latents, timestep, context) -> velocity.
        latents: (B, C, F, H, W).
        timestep: (B, F).
        context: (B, L, E_text).
        negative_context: (B, L, E_text), or None: no guidance, one branch.
        guidance_scale: (B,) float32; a batch may mix strengths.
        cfg_group: one or two ranks.

    Returns:
        Velocity (B, C, F, H, W), bit-equal on every rank.
    """
    if negative_context is None:
        return model(latents, timestep, context)
    if dist.get_world_size(cfg_group) == 1:
        positive = model(latents, timestep, context)
        negative = model(latents, timestep, negative_context)
    else:
        side = dist.get_rank(cfg_group)
        mine = model(latents, timestep, (context, negative_context)[side]).contiguous()
        branches = [torch.empty_like(mine), torch.empty_like(mine)]
        dist.all_gather(branches, mine, group=cfg_group)
        positive, negative = branches
    # The product is taken in float32, as a Python scale times a bfloat16 tensor would be.
    scale = guidance_scale.to(negative.device, torch.float32).view(-1, *[1] * (negative.dim() - 1))
    return negative + (scale * (positive - negative)).to(negative.dtype)
