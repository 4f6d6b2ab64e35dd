"""What a model in training makes of held-out prompts, by the product's own sampler: a picture and a count.

Not the measure of record (that goes through the service), but the same question: of every prompt, are
colour, shape and direction right?
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from pusa_dist.config import ModelConfig, ParallelConfig
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.model.vae import decode_chunks, encode
from pusa_dist.request import Conditioning, GenerationRequest
from pusa_dist.sampler import advance
from pusa_dist.state import GenerationState
from pusa_dist.training.samples import to_frames, write_grid
from pusa_dist.world.measure import track
from pusa_dist.world.render import render
from pusa_dist.world.scene import Scene

START = (Conditioning(input=0, position=0, noise_multiplier=0.0),)


def preview(
    model: ModelConfig,
    transformer: VectorTimestepTransformer,
    vae: AutoencoderKLWan,
    scenes: Sequence[Scene],
    contexts: tuple[Tensor, Tensor],
    grid: Path,
    *,
    first_frame: bool = False,
) -> dict[str, float]:
    """Generate each scene from its caption, draw the first eight and count what is right.

    Args:
        model: its defaults.
        transformer: in training.
        vae: trained.
        scenes: what is asked for.
        contexts: embeddings of the captions (N, L, E) and of the negative prompt (1, L, E).
        grid: the PNG to write.
        first_frame: give the scene's first frame, exactly.

    Returns:
        Shares in 0..1, and with a first frame the median distance in pixels in the last.
    """
    clips = np.stack([render(scene) for scene in scenes])
    stills = torch.from_numpy(clips[:, :1]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    given = encode(vae, stills) if first_frame else None
    latents = sample(model, transformer, contexts, given)
    frames = to_frames(torch.cat(list(decode_chunks(vae, latents)), dim=2))
    write_grid(list(frames[:8]), grid)
    tracks = [track(clip) for clip in frames]
    pairs = list(zip(tracks, scenes, strict=True))
    right = {word: [getattr(seen, word) == getattr(scene, word) for seen, scene in pairs] for word in _WORDS}
    result = {word: float(np.mean(values)) for word, values in right.items()}
    result["all"] = float(np.mean(np.all(list(right.values()), axis=0)))
    result["pace"] = float(np.mean([seen.pace == scene.speed for seen, scene in pairs]))
    if first_frame:
        last = [
            np.inf if seen.sights[-1] is None else np.hypot(*np.subtract(seen.sights[-1].centre, scene.centre(16)))
            for seen, scene in pairs
        ]
        result["last_px"] = float(np.median(last))
    return result


_WORDS = ("colour", "shape", "direction")


@torch.no_grad()
def sample(
    model: ModelConfig, transformer: VectorTimestepTransformer, contexts: tuple[Tensor, Tensor], given: Tensor | None
) -> Tensor:
    """Latents (N, C, F, H, W) of N prompts at the model's defaults, seeds 0, 1, ...

    Args:
        model: its defaults.
        transformer: on any device, in float32.
        contexts: as in ``preview``.
        given: first latent frames (N, C, 1, H, W).
    """
    positive, negative = contexts
    d = model.defaults
    request = GenerationRequest(
        model=model.name,
        prompt="",
        negative_prompt=d.negative_prompt,
        width=d.width,
        height=d.height,
        num_frames=d.num_frames,
        fps=d.fps,
        num_inference_steps=d.num_inference_steps,
        guidance_scale=d.guidance_scale,
        shift=d.shift,
        seed=0,
        lora_alpha={},
        conditioning=() if given is None else START,
    )
    device = transformer.device
    states = [
        GenerationState.start(
            replace(request, seed=seed),
            model,
            "fp32",
            ParallelConfig(),
            context,
            negative[0] if request.uses_guidance else None,
            None if given is None else given[seed],
        ).to(str(device))
        for seed, context in enumerate(positive)
    ]

    def velocity(latents: Tensor, timestep: Tensor, context: Tensor, against: Tensor | None, scale: Tensor) -> Tensor:
        prompted = transformer(latents, timestep, context)
        if against is None:
            return prompted
        unprompted = transformer(latents, timestep, against)
        return unprompted + scale.view(-1, 1, 1, 1, 1) * (prompted - unprompted)

    for _ in range(d.num_inference_steps):
        states = advance(states, velocity)
    return torch.stack([state.latents for state in states]).cpu()
