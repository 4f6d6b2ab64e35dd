"""The cost of a forward at the full 14B size, counted on meta tensors."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from pusa_dist.config import TransformerConfig, load_model_config
from pusa_dist.trace import meta_transformer, trace_call, trace_forward

SIZES = [("480x832", (16, 21, 60, 104), 1678.0), ("720x1280", (16, 21, 90, 160), 6523.0)]


@pytest.fixture(scope="module")
def config() -> TransformerConfig:
    return load_model_config("pusa-v1-14b").transformer


@pytest.mark.parametrize(("name", "latents_shape", "tflops"), SIZES)
def test_the_full_model_costs_what_it_must_and_stores_no_modulation_per_token(
    config: TransformerConfig, name: str, latents_shape: tuple[int, ...], tflops: float
) -> None:
    trace = trace_forward(meta_transformer(config), latents_shape)
    assert trace.total_tflops == pytest.approx(tflops, rel=1e-3)
    assert trace.largest_tensor_numel < trace.tokens * 6 * config.dim
    # It is the feed-forward's hidden layer.
    assert trace.largest_tensor_numel == trace.tokens * config.ffn_dim


def test_the_check_catches_a_timestep_per_token(config: TransformerConfig) -> None:
    with torch.device("meta"):
        shape = dict(meta_transformer(config).config, num_layers=1)
        theirs = WanTransformer3DModel(**{k: v for k, v in shape.items() if not k.startswith("_")})
        latents, context = torch.zeros(1, 16, 21, 60, 104), torch.zeros(1, 512, 4096)
        tokens = 21 * 30 * 52
        timestep = torch.zeros(1, tokens)
    trace = trace_call(lambda: theirs(latents, timestep, context), tokens=tokens)
    assert trace.largest_tensor_numel >= tokens * 6 * config.dim
