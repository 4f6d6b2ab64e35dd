from dataclasses import replace

import pytest
import torch

from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import load_model_config
from pusa_dist.training import memory
from pusa_dist.training.adapter import inject
from pusa_dist.training.distributed import checkpoint_blocks
from pusa_dist.training.memory import GIB, activation_bytes, describe, peak_bytes, plan_memory

REAL = load_model_config("pusa-v1-14b")
SMALL = load_model_config("debug")
LATENTS = (2, 16, 3, 8, 12)


def plan(gpus, **changes):
    return plan_memory(REAL, **{"rank": 512, "gpus": gpus, "width": 832, "height": 480, "num_frames": 81, **changes})


def test_what_the_real_adaptation_needs():
    one, eight, sixteen = (plan(gpus) for gpus in (1, 8, 16))
    # Wan2.1-14B has 14.29e9 weights; rank 512 on ten linears of forty blocks: 61.3e6 a block.
    assert one.base == 14_288_491_584 * 2
    adapter = 40 * 512 * (8 * (5120 + 5120) + 2 * (5120 + 13824))
    assert (one.adapter, one.gradients, one.optimiser) == (adapter * 4, adapter * 4, adapter * 8)
    assert eight.base * 8 == one.base
    assert sixteen.optimiser * 16 == one.optimiser
    assert (one.gathered, eight.gathered) == (0, sixteen.gathered)
    assert one.activations == eight.activations
    assert 90 < one.total / GIB < 100
    assert 36 < sixteen.total / GIB < eight.total / GIB < 45
    assert plan(1, average=True).total - one.total == adapter * 4


def test_checkpointing_keeps_the_inputs_of_forty_blocks_and_one_block_at_work():
    tokens = 21 * 30 * 52
    kept = 40 * tokens * 5120 * 2
    assert kept < plan(8).activations < 3 * kept
    assert plan(8, checkpointing=False).activations > 20 * kept


def real_peak(config, *, checkpointing):
    """The same step with content, on this machine."""
    transformer = inject(
        build_transformer(replace(SMALL, transformer=config), "main", device="cpu", precision="bf16"), 4
    )
    if checkpointing:
        checkpoint_blocks(transformer)
    noisy, timesteps, context = torch.randn(LATENTS), torch.rand(2, 3) * 1000, torch.randn(2, 9, 32).bfloat16()
    return peak_bytes(transformer, lambda: memory._step(transformer, noisy, timesteps, context))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_and_extrapolation_agree_with_a_step_that_is_really_taken(checkpointing):
    config = replace(SMALL.transformer, num_layers=6)
    estimated = activation_bytes(config, 4, LATENTS, 9, checkpointing=checkpointing)
    assert estimated == pytest.approx(real_peak(config, checkpointing=checkpointing), rel=0.03)


def test_peak_counts_what_is_alive_at_once():
    def step():
        for _ in range(5):
            one = torch.empty(1000, dtype=torch.float32) + 1
            del one
        kept = [torch.zeros(1000, dtype=torch.float32) for _ in range(2)]
        kept[0].view(10, 100).add_(1)

    assert peak_bytes(torch.nn.Linear(2, 2), step) == 8000


def test_the_table_has_a_column_for_each():
    lines = describe([plan(1), plan(8)])
    assert lines[0].split() == ["GiB", "a", "GPU", "1", "GPU", "8", "GPUs"]
    assert lines[-1].startswith("total")
    assert len(lines) == 10
