"""A gang of any degrees computes what one rank computes, down to the sampled latents.

35 tokens a frame divide by none of the sequence degrees tried; two generations with different given
frames, multipliers and guidance scales share every forward, so timesteps differ between frames and
between samples.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from pusa_dist.config import ParallelConfig, TransformerConfig, load_model_config
from pusa_dist.model.transformer import new_transformer
from pusa_dist.parallel.apply import parallelize
from pusa_dist.parallel.guidance import guided_velocity
from pusa_dist.parallel.mesh import lay_out
from pusa_dist.request import Conditioning, GenerationRequest
from pusa_dist.sampler import advance
from pusa_dist.state import GenerationState
from tests.distributed.ranks import run_ranks

STEPS = 4
# (cfg, ring, ulysses): every product that 12 heads and two guidance branches allow.
DEGREES = {
    1: [(1, 1, 1)],
    2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    3: [(1, 1, 3), (1, 3, 1)],
    4: [(1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)],
}


def parallel_config(degrees):
    cfg, ring, ulysses = degrees
    return ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)


def model_config():
    transformer = TransformerConfig(
        num_layers=2, num_attention_heads=12, attention_head_dim=8, ffn_dim=128, text_dim=32, freq_dim=64
    )
    return replace(load_model_config("debug"), transformer=transformer)


def small_transformer():
    torch.manual_seed(3)
    model = new_transformer(model_config().transformer).requires_grad_(False).eval()
    for block in model.blocks:
        # Sharper than at random: which keys a rank has seen must matter.
        block.attn1.norm_q.weight.mul_(2)
        block.attn1.norm_k.weight.mul_(2)
    return model


def states(parallel, guidance_scales=(5.0, 2.5)):
    """Two generations of 5 latent frames of 5 x 7 tokens: keyframes, and an extension."""
    generator = torch.Generator().manual_seed(11)
    conditioning = (
        (
            Conditioning(input=0, position=0, noise_multiplier=0.2),
            Conditioning(input=1, position=4, noise_multiplier=0.5),
        ),
        (
            Conditioning(input=0, position=0, noise_multiplier=0.0),
            Conditioning(input=0, position=1, noise_multiplier=0.4),
        ),
    )
    started = []
    for seed, (entries, scale) in enumerate(zip(conditioning, guidance_scales, strict=True)):
        request = GenerationRequest(
            model="debug",
            prompt="a ball rolls",
            negative_prompt="",
            width=112,
            height=80,
            num_frames=17,
            fps=8,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            shift=5.0,
            seed=seed,
            lora_alpha={},
            conditioning=entries,
        )
        context, negative = torch.randn(2, 9, 32, generator=generator)
        given = torch.randn(16, 2, 10, 14, generator=generator)
        negative = negative if request.uses_guidance else None
        started.append(GenerationState.start(request, model_config(), "fp32", parallel, context, negative, given))
    return started


def velocity_and_trajectory(model, mesh, parallel):
    generator = torch.Generator().manual_seed(13)
    latents = torch.randn(2, 16, 5, 10, 14, generator=generator)
    latents[..., 7:] *= 3  # one side of every frame is unlike the other
    timestep = torch.tensor([[0.0, 937.0, 500.0, 212.0, 100.0], [71.0, 71.0, 882.0, 1.0, 999.0]])
    context = torch.randn(2, 9, 32, generator=generator)
    velocity = partial(guided_velocity, model, cfg_group=mesh.get_group("cfg"))
    results = [model(latents, timestep, context)]
    for scales in ((5.0, 2.5), (1.0, 1.0)):  # with guidance, and without
        residents = states(parallel, scales)
        for _ in range(STEPS):
            residents = advance(residents, velocity)
            results.append(torch.stack([state.latents for state in residents]))
    return results


def run_degrees(place, degrees):
    place.join(ParallelConfig(ulysses_degree=place.world_size))
    found = []
    for one in degrees:
        parallel = parallel_config(one)
        mesh = lay_out(parallel, "cpu", 60)
        model = parallelize(small_transformer(), mesh)
        with torch.inference_mode():
            found.append([velocity_and_trajectory(model, mesh, parallel) for _ in range(2)])
    return found


@cache
def one_rank():
    return run_ranks(1, run_degrees, DEGREES[1])[0][0][0]


def test_one_rank_is_the_plain_model_bit_for_bit():
    model = small_transformer()
    generator = torch.Generator().manual_seed(13)
    latents = torch.randn(2, 16, 5, 10, 14, generator=generator)
    latents[..., 7:] *= 3
    timestep = torch.tensor([[0.0, 937.0, 500.0, 212.0, 100.0], [71.0, 71.0, 882.0, 1.0, 999.0]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = model(latents, timestep, torch.randn(2, 9, 32, generator=generator))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one_rank()[0], expected)
    assert all(torch.isfinite(result).all() for result in one_rank())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_product_of_degrees_samples_as_one_rank_does(world_size):
    ranks = run_ranks(world_size, run_degrees, DEGREES[world_size])
    for index, degrees in enumerate(DEGREES[world_size]):
        first = ranks[0][index][0]
        differences = [(got - wanted).abs().max().item() for got, wanted in zip(first, one_rank(), strict=True)]
        assert max(differences) < 1e-5, f"{degrees}: {differences}"
        for rank, results in enumerate(ranks):
            for repeat in results[index]:
                same = [torch.equal(a, b) for a, b in zip(repeat, first, strict=True)]
                assert all(same), f"{degrees}: rank {rank} or its repeat is not bit-equal to rank 0: {same}"


def test_another_gang_of_the_same_degrees_repeats_bit_for_bit():
    degrees = [(1, 2, 1)]
    first, second = (run_ranks(2, run_degrees, degrees)[0][0][0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
