"""Schedule tables against what the public pipelines recorded."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pusa_dist.schedule import expert_index, shifted_sigmas, step_tables, training_weights

GOLDENS = Path(__file__).parents[1] / "goldens"
SIGMA_TOLERANCE = 1e-6  # the goldens' own; ours are equal except where a sum's order shows


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDENS / "scheduler.safetensors")


@pytest.fixture(scope="module")
def described():
    return json.loads((GOLDENS / "scheduler.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [4, 10, 30])
@pytest.mark.parametrize("pipeline", ["t2v", "multi_frames", "v2v", "wan22_t2v", "wan22_multi_frames", "wan22_v2v"])
def test_tables_equal_those_of_every_public_pipeline(recorded, described, pipeline, steps, precision):
    cond = described["cond"]
    given = {} if pipeline.endswith("t2v") else dict(zip(cond["positions"], cond["multipliers"], strict=True))
    tables = step_tables(steps, 5.0, cond["latent_frames"], given, precision)
    prefix = f"{pipeline}.shift5.steps{steps}.{precision}"
    assert torch.equal(tables.model_timesteps, recorded[f"{prefix}.model_timesteps"])
    torch.testing.assert_close(tables.sigma, recorded[f"{prefix}.sigma"], rtol=0, atol=SIGMA_TOLERANCE)
    torch.testing.assert_close(tables.sigma_next, recorded[f"{prefix}.sigma_next"], rtol=0, atol=SIGMA_TOLERANCE)


def test_scalar_schedules_equal_the_recorded_ones(recorded):
    for name, value in recorded.items():
        if match := re.fullmatch(r"\w+\.shift5\.steps(\d+)\.(sigmas|timesteps)", name):
            scale = 1000.0 if match[2] == "timesteps" else 1.0
            assert torch.equal(shifted_sigmas(int(match[1]), 5.0)[:-1] * scale, value), name
    for strength in (0.6, 1.0):
        assert torch.equal(shifted_sigmas(10, 5.0, strength)[:-1], recorded[f"denoise{strength}.steps10.sigmas"])


def test_the_training_schedule_and_its_weights_equal_the_recorded_ones(recorded):
    sigmas = shifted_sigmas(1000, 5.0)[:-1]
    assert torch.equal(sigmas, recorded["train1000.sigmas"])
    assert torch.equal(sigmas * 1000, recorded["train1000.timesteps"])
    torch.testing.assert_close(
        training_weights(sigmas * 1000), recorded["train1000.weights"], rtol=0, atol=SIGMA_TOLERANCE
    )


def test_experts_switch_where_the_public_pipelines_switch(described):
    for name, experts in described["experts"].items():
        steps = int(re.search(r"steps(\d+)", name)[1])
        assert [["high", "low"][index] for index in expert_index(steps, 5.0, 0.875)] == experts
