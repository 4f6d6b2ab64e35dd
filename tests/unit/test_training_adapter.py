import pytest
import torch
from safetensors import safe_open

from pusa_dist.checkpoint.keys import diffusers_name, original_name
from pusa_dist.checkpoint.load import read_tensors
from pusa_dist.checkpoint.lora import MergedLora, read_pusa
from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import load_model_config
from pusa_dist.errors import CheckpointError, ConfigError
from pusa_dist.training.adapter import (
    adapter_parameters,
    inject,
    load_adapter,
    published_state,
    read_adapter,
    save_adapter,
)

MODEL = load_model_config("debug")


def base(precision="fp32"):
    return build_transformer(MODEL, "main", device="cpu", precision=precision)


def trained(rank=3, alpha=None, precision="fp32"):
    """An adapter that does something."""
    transformer = inject(base(precision), rank, alpha)
    for name, parameter in adapter_parameters(transformer).items():
        parameter.data.copy_(seeded_normal(parameter.shape, 3, name, 0.1))
    return transformer


def velocity(transformer):
    latents, context = seeded_normal((2, 16, 3, 4, 6), 1, "x"), seeded_normal((2, 7, 32), 1, "context")
    with torch.no_grad():
        return transformer(latents, torch.tensor([[0.0, 400.0, 900.0], [30.0, 999.0, 1.0]]), context).float()


def test_an_adapter_starts_as_no_change_and_is_all_that_learns():
    transformer = inject(base(), 4)
    assert velocity(transformer).equal(velocity(base()))
    learning = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert learning == set(adapter_parameters(transformer))
    # 10 linears a block, two halves each.
    assert len(learning) == 10 * 2 * MODEL.transformer.num_layers
    assert all(p.dtype == torch.float32 for p in adapter_parameters(transformer).values())


def test_the_start_is_a_kaiming_draw_of_the_seed_alone():
    one, again, other = (
        {n: p for n, p in adapter_parameters(inject(base(), 4, seed=seed)).items() if ".lora_A." in n}
        for seed in (1, 1, 2)
    )
    assert all(one[name].equal(again[name]) and not one[name].equal(other[name]) for name in one)
    for parameter in one.values():
        bound = parameter.shape[1] ** -0.5
        assert 0.9 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("strength", [1.0, 1.4])
@pytest.mark.parametrize(("rank", "alpha"), [(3, None), (4, 6.0)])
def test_the_products_merged_model_is_the_trained_one(tmp_path, strength, rank, alpha):
    transformer = trained(rank, alpha)
    save_adapter(transformer, tmp_path / "new" / "lora.safetensors")
    merged = base()
    MergedLora(merged, read_pusa(read_tensors([tmp_path / "new" / "lora.safetensors"]))).set_alpha(strength)
    for module in transformer.modules():
        if hasattr(module, "scaling") and "default" in module.scaling:
            module.scaling["default"] *= strength
    expected = velocity(transformer)
    assert (velocity(merged) - expected).abs().max() < 2e-5
    assert (velocity(base()) - expected).abs().max() > 0.05


def test_a_bf16_base_keeps_float32_updates_and_merges_to_within_bf16():
    transformer = trained(precision="bf16")
    assert {p.dtype for p in adapter_parameters(transformer).values()} == {torch.float32}
    merged = base("bf16")
    MergedLora(merged, read_pusa(published_state(transformer))).set_alpha(1.0)
    ours, theirs = velocity(merged), velocity(transformer)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


def test_the_file_has_pusas_keys(tmp_path):
    save_adapter(trained(), tmp_path / "lora.safetensors", dtype=torch.bfloat16)
    linears = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            f"blocks.{i}.{linear}.lora_{half}.default.weight" for i in range(2) for linear in linears for half in "AB"
        }
        assert file.get_tensor("blocks.0.ffn.2.lora_A.default.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_training_continues_from_a_published_file(tmp_path, alpha):
    transformer = trained(3, alpha)
    save_adapter(transformer, tmp_path / "lora.safetensors")
    continued = inject(base(), 3, alpha)
    read_adapter(continued, tmp_path / "lora.safetensors")
    assert (velocity(continued) - velocity(transformer)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".default", ""),
        lambda key: f"model.{key}",
        lambda key: f"diffusion_model.{key}",
        lambda key: f"model.diffusion_model.{key}",
        lambda key: key.replace("lora_A.default", "lora_down").replace("lora_B.default", "lora_up"),
        lambda key: key.replace("ffn.0", "ffn.net.0.proj").replace("self_attn.o", "attn1.to_out.0"),
    ],
)
def test_training_continues_from_every_format_that_is_served(rename):
    transformer = trained()
    file = {rename(key): tensor for key, tensor in published_state(transformer).items()}
    assert file.keys() != published_state(transformer).keys()
    continued = inject(base(), 3)
    load_adapter(continued, file)
    before = adapter_parameters(transformer)
    assert all(before[name].equal(parameter) for name, parameter in adapter_parameters(continued).items())


def test_a_file_that_does_not_fit_is_refused_with_every_key_and_changes_nothing():
    transformer = trained()
    before = {name: p.detach().clone() for name, p in adapter_parameters(transformer).items()}
    spoilt = {key: torch.ones_like(tensor) for key, tensor in published_state(transformer).items()}
    spoilt["blocks.0.ffn.0.lora_A.default.weight"] = torch.ones(5, 7)
    for half in "AB":
        key = f"blocks.1.ffn.0.lora_{half}.default.weight"
        spoilt[key.replace("blocks.1", "blocks.9")] = spoilt.pop(key)
    with pytest.raises(CheckpointError, match=r"2 missing: blocks\.1.*2 unexpected: blocks\.9.*1 misshapen: blocks\.0"):
        load_adapter(transformer, spoilt)
    alone = published_state(transformer)
    alone["blocks.9.ffn.0.lora_A.default.weight"] = alone.pop("blocks.1.ffn.0.lora_A.default.weight")
    with pytest.raises(CheckpointError, match=r"without its up half: blocks\.9.*without its down half: blocks\.1"):
        load_adapter(transformer, alone)
    assert all(before[name].equal(p) for name, p in adapter_parameters(transformer).items())


def test_a_second_adapter_and_no_rank_are_refused():
    with pytest.raises(ConfigError, match="rank=0"):
        inject(base(), 0)
    with pytest.raises(ConfigError, match="already"):
        inject(trained(), 2)


def test_original_names_are_the_reverse_of_diffusers_names():
    names = list(base().state_dict())
    assert [diffusers_name(original_name(name)) for name in names] == names
    assert original_name("blocks.1.norm2.weight") == "blocks.1.norm3.weight"
    assert original_name("scale_shift_table") == "head.modulation"
    assert not any("attn1" in original_name(name) or "condition" in original_name(name) for name in names)
