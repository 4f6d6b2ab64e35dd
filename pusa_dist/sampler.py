"""One denoising step of one or several generations in one forward.

Generations at different steps, with different given frames, may share a forward because the model
takes a timestep per sample and latent frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pusa_dist.errors import NumericsError
from pusa_dist.schedule import DTYPES
from pusa_dist.state import GenerationState

VelocityFn = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""(latents (B, C, F, H, W), timestep (B, F), context (B, L, E), negative_context (B, L, E) or None,
guidance_scale (B,) float32) -> guided velocity (B, C, F, H, W)."""


def advance(states: Sequence[GenerationState], velocity: VelocityFn) -> list[GenerationState]:
    """Advance every state by one step, all in one call of ``velocity``.

    Args:
        states: not final, with equal ``signature()``.
        velocity: the model of the states' next expert, with guidance.

    Returns:
        New states in the same order, their latents in float32.

    Raises:
        ValueError: the states cannot share a forward.
        NumericsError: a state's latents became non-finite.
    """
    if len({state.signature() for state in states}) != 1:
        raise ValueError("states of one forward must have equal signatures, and there must be at least one")
    predicted = velocity(*_batch(states))
    return [_stepped(state, predicted[index]) for index, state in enumerate(states)]


def clean_estimate(before: GenerationState, after: GenerationState) -> Tensor:
    """Where a generation is heading: its latents (C, F, H, W) if the last step's velocity held to the end.

    Args:
        before: the state before the last step.
        after: the state after it.
    """
    step = before.step
    change = after.tables.sigma_next[step] - after.tables.sigma[step]
    # A frame that does not move any more is where it is heading.
    scale = torch.where(change == 0, torch.zeros_like(change), after.tables.sigma_next[step] / change)
    latents = after.latents.float()
    moved = latents - before.latents.float()
    return latents - moved * scale.to(latents.device).view(1, -1, 1, 1)


def _batch(states: Sequence[GenerationState]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    first = states[0]
    device, dtype = first.latents.device, DTYPES[first.precision]
    # States past their first step hold float32 latents; the model is fed its own precision.
    latents = torch.stack([state.latents.to(dtype) for state in states])
    timestep = torch.stack([state.tables.model_timesteps[state.step] for state in states]).to(device)
    context = torch.stack([state.context for state in states])
    negative = [state.negative_context for state in states if state.negative_context is not None]
    scale = torch.tensor([state.request.guidance_scale for state in states], device=device)
    return latents, timestep, context, torch.stack(negative) if negative else None, scale


def _stepped(state: GenerationState, velocity: Tensor) -> GenerationState:
    """Euler: latents (C, F, H, W) move by each frame's own change of sigma, in float32."""
    step = state.step
    change = (state.tables.sigma_next[step] - state.tables.sigma[step]).to(velocity.device)
    latents = state.latents.float() + velocity.float() * change.view(1, -1, 1, 1)
    if not torch.isfinite(latents).all():
        raise NumericsError(f"latents became non-finite in step {step + 1} of {state.num_steps} ({state.expert})")
    return replace(state, latents=latents, step=step + 1)
