"""What merging and re-merging promises; test_runner.py compares with the recorded merges."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pusa_dist.checkpoint import lora as lora_module
from pusa_dist.checkpoint.keys import diffusers_name, with_diffusers_names
from pusa_dist.checkpoint.load import load_exactly
from pusa_dist.checkpoint.lora import MergedLora, build_lora, pin, read_distill, read_pusa
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import LoraConfig, ModelConfig, PristineWeights, WeightsConfig, load_model_config
from pusa_dist.errors import CheckpointError, ConfigError
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer
from pusa_dist.parity.cases import transformer_config

GOLDENS = Path(__file__).parents[1] / "goldens"
CASE = json.loads((GOLDENS / "lora.json").read_text())
TENSORS = load_file(GOLDENS / "lora.safetensors")


def _under(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): x for key, x in TENSORS.items() if key.startswith(prefix)}


def _transformer(dtype: torch.dtype = torch.float32) -> VectorTimestepTransformer:
    shape = json.loads((GOLDENS / "public_dit_main.json").read_text())["model_config"]
    config = transformer_config(shape)
    tensors = {name: x.to(dtype) for name, x in load_file(GOLDENS / "public_dit_main.safetensors").items()}
    with torch.device("meta"):
        model = new_transformer(config)
    load_exactly(model, with_diffusers_names(tensors, "golden"), "golden")
    return model.requires_grad_(False)


def _copy(model: VectorTimestepTransformer) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def _equal(model: VectorTimestepTransformer, tensors: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())


def _debug(**changes: object) -> ModelConfig:
    return replace(load_model_config("debug"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_changes_of_strength_and_back_are_bit_equal(dtype: torch.dtype) -> None:
    model = _transformer(dtype)
    lora = MergedLora(model, read_pusa(_under("pusa/")), read_distill(_under("lightx2v/")))
    addresses = [x.data_ptr() for x in model.parameters()]
    lora.set_alpha(1.4)
    first = _copy(model)
    for step in range(100):
        lora.set_alpha(0.1 + 0.049 * step)
    assert not _equal(model, first)
    lora.set_alpha(1.4)
    assert _equal(model, first)
    assert [x.data_ptr() for x in model.parameters()] == addresses


def _merged(device: str, dtype: torch.dtype, pristine: PristineWeights) -> list[dict[str, Tensor]]:
    """Every weight on the CPU after a row of strengths."""
    model = _transformer(dtype).to(device)
    lora = MergedLora(model, read_pusa(_under("pusa/")), read_distill(_under("lightx2v/")), pristine=pristine)
    states = []
    for alpha in (1.4, 0.3, 5.0, 1.4):
        lora.set_alpha(alpha)
        states.append({name: x.cpu().clone() for name, x in model.state_dict().items()})
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pristine_weights_on_the_host_give_the_same_bits(dtype: torch.dtype) -> None:
    _same_wherever_kept("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pristine_weights_in_pinned_memory_give_the_same_bits(dtype: torch.dtype) -> None:
    _same_wherever_kept("cuda", dtype)


def _same_wherever_kept(device: str, dtype: torch.dtype) -> None:
    on_device, on_host = (_merged(device, dtype, kept) for kept in ("device", "host"))
    for ours, theirs in zip(on_host, on_device, strict=True):
        assert all(x.equal(theirs[name]) for name, x in ours.items())
    assert not all(x.equal(on_host[0][name]) for name, x in on_host[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_one_addition_to_the_pristine_weight(dtype: torch.dtype) -> None:
    model = _transformer(dtype)
    before, deltas = _copy(model), read_pusa(_under("pusa/"))
    MergedLora(model, deltas, pristine="host").set_alpha(1.4)
    after = model.state_dict()
    for name, delta in deltas.items():
        assert after[name].equal(before[name] + (delta.up.to(dtype) @ delta.down.to(dtype)).mul_(1.4))


class _Runtime:
    """CUDA's runtime, as far as pinning goes."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.pinned[address] = num_bytes
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_memory_is_pinned_for_as_long_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _Runtime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    tensor = torch.zeros(3, 5)
    pin(tensor)
    assert runtime.pinned == {tensor.data_ptr(): 60}
    del tensor
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: _Runtime(2))
    with pytest.raises(ConfigError, match=r"pristine_weights=host: 60 bytes .* use pristine_weights: device"):
        pin(torch.zeros(3, 5))


def test_the_configuration_says_where_pristine_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[PristineWeights] = []
    monkeypatch.setattr(lora_module, "MergedLora", lambda *_, pristine, **__: kept.append(pristine))
    for where in ("device", "host"):
        model = _debug(pristine_weights=where)
        build_lora(model, "main", build_transformer(model, "main", device="cpu", precision="fp32"))
    assert kept == ["device", "host"]


def test_only_adapted_weights_are_kept_twice() -> None:
    model = _transformer()
    before = _copy(model)
    lora = MergedLora(model, read_pusa(_under("pusa/")))
    assert lora.alpha is None
    assert _equal(model, before)
    lora.set_alpha(2.0)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {diffusers_name(f"{target}.weight") for target in CASE["targets"]}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"diffusion_model.{key}",
        lambda key: key.replace(".default", ""),
        lambda key: key.replace("lora_A.default", "lora_down").replace("lora_B.default", "lora_up"),
        lambda key: key.replace("self_attn.q", "attn1.to_q").replace("self_attn.o", "attn1.to_out.0"),
    ],
)
def test_every_documented_key_format_reads_the_same(rename) -> None:
    expected = read_pusa(_under("pusa/"))
    renamed = read_pusa({rename(key): x for key, x in _under("pusa/").items()})
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name].up, expected[name].up) for name in expected)


def test_a_lora_that_does_not_match_is_refused_whole_and_every_key_listed() -> None:
    model = _transformer()
    before = _copy(model)
    tensors = _under("pusa/")
    for target in ("blocks.7.self_attn.q", "blocks.8.ffn.0"):
        tensors[f"{target}.lora_A.weight"] = torch.zeros(4, 80)
        tensors[f"{target}.lora_B.weight"] = torch.zeros(80, 4)
    deltas = read_pusa(tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.7\.attn1\.to_q\.weight, blocks\.8\.ffn"):
        MergedLora(model, deltas)
    misshapen = read_pusa(_under("pusa/") | {"blocks.1.ffn.0.lora_B.default.weight": torch.zeros(80, 4)})
    with pytest.raises(CheckpointError, match=r"misshapen: blocks\.1\.ffn\.net\.0\.proj\.weight"):
        MergedLora(model, misshapen, read_distill(_under("lightx2v/")))
    assert _equal(model, before)


def test_unknown_keys_and_lonely_halves_are_refused_by_name() -> None:
    tensors = _under("pusa/")
    del tensors["blocks.0.self_attn.q.lora_B.default.weight"]
    tensors["blocks.0.self_attn.q.dora_scale"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        read_pusa(tensors)
    assert "dora_scale" in str(error.value)
    assert "without its up half: blocks.0.attn1.to_q.weight" in str(error.value)
    with pytest.raises(CheckpointError, match="empty"):
        read_pusa({})
    with pytest.raises(CheckpointError, match="alpha"):
        read_pusa(_under("lightx2v/"))


def test_full_rank_differences_of_a_distilled_file_are_left_out_with_a_warning(caplog) -> None:
    tensors = _under("lightx2v/") | {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(80),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(80),
    }
    assert read_distill(tensors).keys() == read_distill(_under("lightx2v/")).keys()
    assert "2 full-rank" in caplog.text


def test_debug_lora_adapts_every_linear_and_depends_on_the_expert() -> None:
    model = load_model_config("debug-two-expert")
    merged = {}
    for expert in model.experts:
        transformer = build_transformer(model, expert, device="cpu", precision="fp32")
        before = _copy(transformer)
        lora = build_lora(model, expert, transformer)
        assert lora is not None
        lora.set_alpha(1.0)
        merged[expert] = {
            n: x - before[n] for n, x in transformer.state_dict().items() if not torch.equal(x, before[n])
        }
        assert len(merged[expert]) == 10 * model.transformer.num_layers
        for name, delta in merged[expert].items():
            assert 0.05 < delta.norm() / before[name].norm() < 0.2, name
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(merged["high"][name], merged["low"][name])


def test_files_named_by_the_configuration_are_merged_distillation_first(tmp_path: Path) -> None:
    save_file(_under("pusa/"), tmp_path / "pusa.safetensors")
    save_file(_under("lightx2v/"), tmp_path / "distill.safetensors")
    model = _debug(
        lora=LoraConfig(alpha={"main": 1.4}, files={"main": "pusa.safetensors"}),
        distill_lora=LoraConfig(alpha={"main": 1.0}, files={"main": "distill.safetensors"}),
        weights=WeightsConfig(root=str(tmp_path)),
    )
    transformer = _transformer()
    lora = build_lora(model, "main", transformer)
    assert lora is not None
    lora.set_alpha(1.4)
    weights = transformer.state_dict()
    for key, x in _under("merged_fp32.lightx2v_then_pusa/").items():
        assert (weights[diffusers_name(key)] - x).abs().max() <= 1e-6


def test_a_model_without_lora_says_so() -> None:
    model = _debug(lora=None)
    transformer = _transformer()
    assert build_lora(model, "main", transformer) is None
    with pytest.raises(ConfigError, match="no LoRA of adjustable strength"):
        MergedLora(transformer, None, read_distill(_under("lightx2v/"))).set_alpha(1.0)


def test_a_lora_file_that_is_not_named_or_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    transformer = _transformer()
    unnamed = _debug(lora=LoraConfig(alpha={"main": 1.4}))
    with pytest.raises(ConfigError, match=r"lora\.files\.main names no file"):
        build_lora(unnamed, "main", transformer)
    named = LoraConfig(alpha={"main": 1.4}, files={"main": "pusa.pt"})
    absent = _debug(lora=named, weights=WeightsConfig(root=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"pusa\.pt"):
        build_lora(absent, "main", transformer)
