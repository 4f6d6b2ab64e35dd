import pytest
import torch

from pusa_dist.config import ParallelConfig, load_model_config
from pusa_dist.errors import NumericsError
from pusa_dist.request import Conditioning, GenerationRequest
from pusa_dist.sampler import advance, clean_estimate
from pusa_dist.state import GenerationState

MODEL = load_model_config("debug")


def start(seed=0, given=(), steps=5, precision="fp32", scale=3.0):
    conditioning = tuple(Conditioning(input=0, position=p, noise_multiplier=m) for p, m in given)
    request = GenerationRequest(
        model="debug", prompt="x", negative_prompt="", width=32, height=32, num_frames=9, fps=8,
        num_inference_steps=steps, guidance_scale=scale, shift=5.0, seed=seed, lora_alpha={}, conditioning=conditioning,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(16, len(given), 4, 4, generator=generator) if given else None
    context = torch.randn(3, 8, generator=generator)
    negative = torch.randn(3, 8, generator=generator) if scale != 1.0 else None
    return GenerationState.start(request, MODEL, precision, ParallelConfig(), context, negative, clean)


def toy_velocity(latents, timestep, context, negative_context, guidance_scale):
    share = timestep.view(len(latents), 1, -1, 1, 1) / 1000
    told = (context.mean(dim=(1, 2)) * guidance_scale).view(-1, 1, 1, 1, 1)
    return (latents.float() * (0.3 + share) + told).to(latents.dtype)


def test_states_at_different_steps_with_different_conditioning_share_a_forward():
    early, late, free = start(1, [(0, 0.2)]), start(2, [(0, 0.0), (2, 0.5)], steps=8), start(3, scale=4.5)
    for _ in range(3):
        (late,) = advance([late], toy_velocity)
    alone = [advance([state], toy_velocity)[0] for state in (early, late, free)]
    together = advance([early, late, free], toy_velocity)
    assert [state.step for state in together] == [1, 4, 1]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frame_given_with_multiplier_zero_comes_back_bit_equal(precision):
    state = first = start(4, [(1, 0.0)], precision=precision)
    while not state.is_final:
        (state,) = advance([state], toy_velocity)
    assert torch.equal(state.latents[:, 1], first.latents[:, 1].float())
    assert not torch.equal(state.latents[:, 0], first.latents[:, 0].float())


def test_an_exact_velocity_brings_every_frame_to_the_clean_video():
    clean = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    state = start(5, steps=7)
    noise = state.latents
    while not state.is_final:
        (state,) = advance([state], lambda *inputs: (noise - clean).unsqueeze(0))
    torch.testing.assert_close(state.latents, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [(), [(0, 0.0), (1, 0.3)]])
def test_where_a_generation_is_heading_is_known_after_any_step(given):
    state = start(5, given, steps=7)
    clean = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    if given:
        clean[:, 0] = state.latents[:, 0]
    # The straight way to the clean video, frame by frame, from as much noise as each has.
    share = state.tables.sigma[0].clamp(min=1e-6).view(1, -1, 1, 1)
    velocity = (state.latents - clean) / share
    while not state.is_final:
        before = state
        (state,) = advance([state], lambda *inputs: velocity.unsqueeze(0))
        torch.testing.assert_close(clean_estimate(before, state), clean, rtol=0, atol=1e-4)


def test_bf16_latents_become_float32_with_the_first_step_and_the_model_is_always_fed_bf16():
    fed = []

    def velocity(latents, timestep, *rest):
        fed.append((latents.dtype, timestep.dtype))
        return toy_velocity(latents, timestep, *rest)

    state = start(6, [(0, 0.2)], precision="bf16")
    assert state.latents.dtype == torch.bfloat16
    for _ in range(2):
        (state,) = advance([state], velocity)
        assert state.latents.dtype == torch.float32
    assert fed == [(torch.bfloat16, torch.float32)] * 2


def test_the_velocity_is_given_what_the_states_hold():
    seen = []

    def velocity(*inputs):
        seen.append(inputs)
        return inputs[0]

    one, two = start(1, scale=2.0), start(2, scale=3.0)
    advance([one, two], velocity)
    latents, timestep, context, negative, scale = seen[0]
    assert latents.shape == (2, 16, 3, 4, 4)
    assert timestep.tolist() == [[1000.0] * 3] * 2
    assert torch.equal(context, torch.stack([one.context, two.context]))
    assert torch.equal(negative, torch.stack([one.negative_context, two.negative_context]))
    assert scale.tolist() == [2.0, 3.0]


def test_without_guidance_there_is_no_negative_branch():
    seen = []
    advance([start(1, scale=1.0)], lambda *inputs: seen.append(inputs) or inputs[0])
    assert seen[0][3] is None


def test_advancing_leaves_the_old_state_as_it_was():
    state = start(1, [(0, 0.2)])
    before = state.latents.clone()
    advance([state], toy_velocity)
    assert state.step == 0
    assert torch.equal(state.latents, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_latents_are_an_error_that_names_the_step(bad):
    (state,) = advance([start(1)], toy_velocity)
    with pytest.raises(NumericsError, match="step 2 of 5"):
        advance([state], lambda latents, *rest: torch.full_like(latents, bad))


def test_states_that_cannot_share_a_forward_are_refused():
    with pytest.raises(ValueError, match="equal signatures"):
        advance([start(1), start(2, scale=1.0)], toy_velocity)
    with pytest.raises(ValueError, match="at least one"):
        advance([], toy_velocity)
