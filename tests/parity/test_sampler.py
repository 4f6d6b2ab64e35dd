"""Denoising loops against recorded ones, beyond what the parity runner compares: see test_runner.py for that."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.parity.cases import CaseFolder
from pusa_dist.parity.sampler import initial_state, run_to_end
from pusa_dist.sampler import advance
from pusa_dist.state import GenerationState

GOLDENS = Path(__file__).parents[1] / "goldens"
EVERY = ["t2v", "i2v_mult0", "i2v_mult0p2", "start_end_81f", "v2v_extension", "wan22_i2v", "start_end_bf16"]


def recorded_case(name):
    return next(case for case in CaseFolder(GOLDENS).cases if case.name == name)


def test_every_recorded_loop_is_tested_here():
    listed = json.loads((GOLDENS / "manifest.json").read_text())["cases"]
    assert sorted(EVERY) == sorted(entry["name"] for entry in listed if entry["kind"] == "sampler")


def recorded_velocity(state, recorded, *inputs):
    assert torch.equal(inputs[1][0], recorded["model_timesteps"][state.step].float())
    return recorded["noise_pred"][state.step].unsqueeze(0)


@pytest.mark.parametrize("name", EVERY)
def test_fed_the_recorded_velocities_the_sampler_repeats_every_latent_bit_for_bit(name):
    case = recorded_case(name)
    recorded, state = case.tensors, initial_state(case)
    assert torch.equal(state.latents, recorded["latents_init"][0])
    assert state.latents.dtype == recorded["latents_init"].dtype
    while not state.is_final:
        (state,) = advance([state], partial(recorded_velocity, state, recorded))
        assert torch.equal(state.latents, recorded["latents_steps"][state.step - 1]), state.step
    assert torch.equal(state.latents, recorded["final"][0])


@pytest.mark.parametrize("name", EVERY)
def test_resumed_from_bytes_after_every_step_the_end_is_the_recorded_one(name):
    case = recorded_case(name)
    state = initial_state(case)
    while not state.is_final:
        state = GenerationState.from_bytes(state.to_bytes())
        (state,) = advance([state], partial(recorded_velocity, state, case.tensors))
    assert torch.equal(state.latents, case.tensors["final"][0])


def test_the_clean_first_frame_comes_back_bit_equal():
    case = recorded_case("i2v_mult0")
    final = run_to_end(case.model(), initial_state(case)).latents[-1]
    assert torch.equal(final[:, 0], case.tensors["cond_latents"][0, :, 0])


def test_loops_at_different_steps_share_a_forward_of_the_transformer():
    cases = [recorded_case(name) for name in ("i2v_mult0", "i2v_mult0p2", "t2v")]
    transformer = build_transformer(cases[0].model(), "main", device="cpu", precision="fp32")

    def velocity(latents, timestep, context, negative, scale):
        positive, negative = (transformer(latents, timestep, each) for each in (context, negative))
        return negative + scale.view(-1, 1, 1, 1, 1) * (positive - negative)

    states = [initial_state(case) for case in cases]
    states = [replace(state, request=replace(state.request, model="one")) for state in states]
    for _ in range(4):
        (states[0],) = advance([states[0]], velocity)
    (states[1],) = advance([states[1]], velocity)
    alone = [advance([state], velocity)[0].latents for state in states]
    together = [state.latents for state in advance(states, velocity)]
    torch.testing.assert_close(torch.stack(together), torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("i2v_mult0p2", {"noise_multipliers": [0.3]}), ("t2v", {"shift": 4.0}), ("v2v_extension", {"cfg_scale": 3.1})],
)
def test_a_wrong_setting_would_be_noticed(name, mistake):
    case = recorded_case(name)
    case.__dict__["description"] = {**case.description, **mistake}
    run = run_to_end(case.model(), initial_state(case))
    assert (torch.stack(run.latents) - case.tensors["latents_steps"]).abs().max() > 1e-2
