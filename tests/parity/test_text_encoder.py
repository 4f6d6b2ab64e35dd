"""The text encoder against a recording of Wan's, and the rows that must be exactly zero."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pusa_dist.checkpoint.text import build_text_encoder, load_text_encoder, new_text_encoder, transformers_names
from pusa_dist.config import TextEncoderConfig, load_model_config
from pusa_dist.errors import CheckpointError, RequestError
from pusa_dist.model.text import encode_ids
from pusa_dist.prompt_encoder import PromptEncoder

GOLDENS = Path(__file__).parents[1] / "goldens"
SHAPE = TextEncoderConfig(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "text_encoder.safetensors")


@pytest.fixture(scope="module")
def published(case) -> dict[str, torch.Tensor]:
    return {name.removeprefix("w/"): tensor for name, tensor in case.items() if name.startswith("w/")}


@pytest.fixture(scope="module")
def encoder(published):
    with torch.device("meta"):
        module = new_text_encoder(SHAPE)
    load_text_encoder(module, transformers_names(published), "golden text encoder")
    return module.eval()


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return PromptEncoder(load_model_config("debug"), "cpu")


def test_embeddings_equal_the_recording(encoder, case):
    embeddings = encode_ids(encoder, case["ids"], case["mask"])
    torch.testing.assert_close(embeddings, case["embeds_zeroed"], atol=1e-5, rtol=0)
    length = int(case["mask"].sum())
    assert not embeddings[:, length:].any()
    assert embeddings[:, :length].any()


def test_a_batch_of_prompts_of_different_lengths_equals_each_alone(encoder):
    ids = torch.arange(2, 14).repeat(2, 1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    together = encode_ids(encoder, ids, mask)
    alone = [encode_ids(encoder, ids[row : row + 1], mask[row : row + 1]) for row in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    assert not together[1, 5:].any()


def test_the_embedding_table_is_held_once(encoder):
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


@pytest.mark.parametrize("lost", ["token_embedding.weight", "blocks.1.attn.q.weight", "norm.weight"])
def test_a_missing_tensor_is_named(published, lost):
    with torch.device("meta"):
        module = new_text_encoder(SHAPE)
    tensors = transformers_names({name: tensor for name, tensor in published.items() if name != lost})
    expected = next(iter(transformers_names({lost: published[lost]})))
    with pytest.raises(CheckpointError, match=expected.replace(".", r"\.")):
        load_text_encoder(module, tensors, "text encoder")


def test_names_of_transformers_pass_unchanged(encoder):
    state = encoder.state_dict()
    assert transformers_names(state).keys() == state.keys()


def test_debug_weights_repeat_and_bf16_is_bf16():
    model = load_model_config("debug")
    first, second = (build_text_encoder(model, device="cpu", precision="fp32") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    half = build_text_encoder(model, device="cpu", precision="bf16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.encoder.embed_tokens.weight is half.shared.weight


def test_a_prompt_becomes_rows_and_zeros(prompts):
    embeddings = prompts.encode("a red ball")
    assert embeddings.shape == (512, 32)
    assert not embeddings[11:].any()  # 10 bytes and the end of text
    assert embeddings[:11].abs().sum(dim=1).min() > 0
    assert not torch.equal(embeddings, prompts.encode("a red cube"))


def test_prompts_equal_after_cleaning_are_encoded_once(prompts):
    assert prompts.encode("a  cat &amp; a dog ") is prompts.encode("a cat & a dog")


def test_an_empty_negative_prompt_is_the_end_of_text_alone(prompts):
    embeddings = prompts.encode("")
    assert embeddings[0].any()
    assert not embeddings[1:].any()


def test_the_least_recently_used_prompt_is_forgotten():
    encoder = PromptEncoder(load_model_config("debug"), "cpu", cache_size=2)
    kept, lost = encoder.encode("kept"), encoder.encode("lost")
    assert encoder.encode("kept") is kept
    encoder.encode("new")
    assert encoder.encode("kept") is kept
    again = encoder.encode("lost")
    assert again is not lost
    assert torch.equal(again, lost)


def test_a_prompt_longer_than_the_encoder_reads_is_refused_not_cut(prompts):
    assert prompts.encode("x" * 511).shape == (512, 32)
    with pytest.raises(RequestError, match="513 tokens") as caught:
        prompts.encode("x" * 512)
    assert caught.value.code == "prompt_too_long"
