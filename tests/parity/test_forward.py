"""Our forward against recorded upstream tensors and against diffusers' own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from pusa_dist.checkpoint.keys import with_diffusers_names
from pusa_dist.checkpoint.load import load_exactly
from pusa_dist.checkpoint.seeded import seeded_state
from pusa_dist.config import TransformerConfig
from pusa_dist.model.attention import attention_with_lse, local_attention
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer
from pusa_dist.parity.cases import transformer_config
from pusa_dist.trace import record_forward

GOLDENS = Path(__file__).parents[1] / "goldens"
SMALL = TransformerConfig(
    num_layers=2, num_attention_heads=4, attention_head_dim=24, ffn_dim=128, text_dim=32, freq_dim=64
)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def _case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(GOLDENS / f"{name}.safetensors")


def _golden_transformer(case: Mapping[str, Any], dtype: torch.dtype) -> VectorTimestepTransformer:
    config = transformer_config(case["model_config"])
    tensors = {name: x.to(dtype) for name, x in load_file(GOLDENS / case["weights"]["main"]).items()}
    with torch.device("meta"):
        model = new_transformer(config)
    load_exactly(model, with_diffusers_names(tensors, "golden"), "golden")
    return model.eval()


def _seeded(config: TransformerConfig = SMALL) -> VectorTimestepTransformer:
    with torch.device("meta"):
        model = new_transformer(config)
    load_exactly(model, seeded_state(model, 0, "test"), "test")
    return model.eval()


def _inputs(batch: int = 1, frames: int = 5, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    timestep = torch.rand(batch, frames, generator=generator) * 1000
    timestep[:, 0] = 0.0
    return latents, timestep, torch.randn(batch, 11, 32, generator=generator)


def test_per_frame_timesteps_equal_diffusers_fed_one_per_token() -> None:
    ours = _seeded()
    theirs = WanTransformer3DModel(**{k: v for k, v in ours.config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(ours.state_dict())
    latents, timestep, context = _inputs(batch=2)
    tokens = latents.shape[3] * latents.shape[4] // 4
    expected = theirs(latents, timestep.repeat_interleave(tokens, dim=1), context, return_dict=False)[0]
    velocity = ours(latents, timestep, context)
    assert (velocity - expected).norm() <= 1e-5 * expected.norm()


def test_samples_at_different_timesteps_share_a_forward() -> None:
    model = _seeded()
    latents, timestep, context = _inputs(batch=3)
    together = model(latents, timestep, context)
    for index in range(3):
        one = slice(index, index + 1)
        alone = model(latents[one], timestep[one], context[one])
        torch.testing.assert_close(together[one], alone, rtol=0, atol=5e-6)


def test_a_frames_timestep_reaches_that_frame_only_before_attention() -> None:
    model = _seeded()
    latents, timestep, context = _inputs()
    before = record_forward(model, latents, timestep, context)
    timestep[0, 3] += 100
    after = record_forward(model, latents, timestep, context)
    changed = (before["tproj"] != after["tproj"]).any(-1)[0]
    assert changed.tolist() == [False, False, False, True, False]
    assert not torch.equal(before["output"], after["output"])


def test_token_shard_decides_the_order_and_the_answer_does_not_change() -> None:
    class Shuffled:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(3))

        def split(self, tokens: Tensor) -> Tensor:
            return tokens[:, :, self.order]

        def join(self, tokens: Tensor) -> Tensor:
            return tokens[:, :, self.order.argsort()]

    model = _seeded()
    inputs = _inputs()
    expected = model(*inputs)
    model.token_shard = Shuffled()
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=5e-6)


def test_self_attention_of_every_block_goes_through_the_attention_attribute() -> None:
    shapes = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shapes.append((query.shape, key.shape, value.shape))
        return local_attention(query, key, value)

    model = _seeded()
    inputs = _inputs(batch=2)
    expected = model(*inputs)
    model.attention = attention
    assert torch.equal(model(*inputs), expected)
    assert shapes == [((2, 5 * 24, 4, 24),) * 3] * 2


def test_bfloat16_stays_close_to_float32() -> None:
    model = _seeded()
    inputs = _inputs()
    exact = model(*inputs)
    torch.nn.Module.to(model, torch.bfloat16)
    rounded = model(*inputs)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() <= 0.03 * exact.norm()


def test_the_model_is_saved_and_loaded_by_diffusers(tmp_path: Path) -> None:
    model = _seeded()
    model.save_pretrained(tmp_path)
    loaded = VectorTimestepTransformer.from_pretrained(tmp_path)
    inputs = _inputs()
    assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_lse_gives_the_same_output_and_the_log_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, length, 3, 24, generator=generator).to(dtype) for length in (7, 11, 11))
    out, lse = attention_with_lse(query, key, value)
    torch.testing.assert_close(out, local_attention(query, key, value))
    scores = torch.einsum("bsnd,btnd->bsnt", query.float(), key.float()) * 24**-0.5
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-4)
