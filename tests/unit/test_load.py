"""Weights are loaded exactly or refused with every key that does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pusa_dist.checkpoint.keys import diffusers_name, with_diffusers_names
from pusa_dist.checkpoint.load import load_exactly, read_tensors
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import ModelConfig, WeightsConfig, load_model_config
from pusa_dist.errors import CheckpointError, ConfigError
from pusa_dist.parity.cases import transformer_config
from pusa_dist.weights import check_files, files_of

GOLDENS = Path(__file__).parents[1] / "goldens"
WEIGHTS = GOLDENS / "public_dit_main.safetensors"


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle ran code')",))


def _linear() -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    return module, {name: torch.randn(shape) for name, shape in shapes.items()}


def _model(root: Path, pattern: str = "shard-*.safetensors") -> ModelConfig:
    shape = json.loads((GOLDENS / "public_dit_main.json").read_text())["model_config"]
    transformer = transformer_config(shape)
    weights = WeightsConfig(root=str(root), transformer={"main": pattern})
    return replace(load_model_config("debug"), name="golden", transformer=transformer, weights=weights, lora=None)


def _save_shards(root: Path, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, root / "shard-1.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, root / "shard-2.safetensors")


def _is_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in state.items())


def test_missing_unexpected_and_misshapen_keys_are_all_listed_and_nothing_is_loaded() -> None:
    module, tensors = _linear()
    del tensors["0.bias"], tensors["1.weight"]
    tensors |= {"2.bias": torch.zeros(2), "head": torch.zeros(2), "0.weight": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError) as error:
        load_exactly(module, tensors, "two layers")
    message = str(error.value)
    assert message.startswith("two layers does not fit")
    for part in ("2 missing: 0.bias, 1.weight", "2 unexpected: 2.bias, head", "0.weight is (2, 4), not (2, 3)"):
        assert part in message
    assert all(x.is_meta for x in module.state_dict().values())


def test_the_module_takes_the_tensors_themselves() -> None:
    module, tensors = _linear()
    load_exactly(module, tensors, "two layers")
    assert {n: x.data_ptr() for n, x in module.state_dict().items()} == {n: x.data_ptr() for n, x in tensors.items()}


def test_tensors_are_read_from_shards_and_converted(tmp_path: Path) -> None:
    _save_shards(tmp_path, {"a": torch.ones(2), "b": torch.arange(3), "c": torch.zeros(1)})
    tensors = read_tensors(sorted(tmp_path.iterdir()), dtype=torch.bfloat16)
    assert {name: x.dtype for name, x in tensors.items()} == {
        "a": torch.bfloat16,
        "b": torch.int64,
        "c": torch.bfloat16,
    }


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="a is already in another file"):
        read_tensors(sorted(tmp_path.iterdir()))


def test_files_that_are_not_named_or_not_there_are_a_configuration_error(tmp_path: Path) -> None:
    model = _model(tmp_path)
    for name in ("b.pth", "a.pth", "c.txt"):
        (tmp_path / name).touch()
    assert files_of(model, "weights.vae", "*.pth") == [tmp_path / "a.pth", tmp_path / "b.pth"]
    with pytest.raises(ConfigError, match=r"golden: weights\.vae names no file"):
        files_of(model, "weights.vae", None)
    with pytest.raises(ConfigError, match=r"debug: weights\.vae names no file under a weights\.root"):
        files_of(load_model_config("debug"), "weights.vae", "vae.pth")
    with pytest.raises(ConfigError, match=r"no file under .* matches weights\.vae: model-\*\.pth; .* --weights"):
        files_of(model, "weights.vae", "model-*.pth")


def test_every_part_without_a_file_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in ("debug", "tiny"):
        check_files(load_model_config(name))
    model = load_model_config("pusa-v1-wan2.2-a14b", str(tmp_path))
    vae = tmp_path / "Wan2.2-T2V-A14B" / "Wan2.1_VAE.pth"
    vae.parent.mkdir()
    vae.touch()
    with pytest.raises(ConfigError) as refusal:
        check_files(model)
    parts = ("weights.transformer.high", "weights.transformer.low", "weights.text_encoder", "weights.tokenizer")
    assert all(f"{part}: " in str(refusal.value) for part in (*parts, "lora.files.high", "lora.files.low"))
    assert "vae" not in str(refusal.value).lower()
    assert f"no file under {tmp_path} matches" in str(refusal.value)


@pytest.mark.parametrize("wrapper", [None, "model_state", "state_dict"])
def test_pickled_tensors_are_read_wrapped_or_not(tmp_path: Path, wrapper: str | None) -> None:
    tensors = {"a": torch.randn(4)}
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "w.pth")
    assert torch.equal(read_tensors([tmp_path / "w.pth"])["a"], tensors["a"])


def test_a_pickle_of_the_old_format_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors([tmp_path / "w.pt"])["a"], torch.ones(4))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": _RunsCode()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt cannot be read"):
        read_tensors([tmp_path / "w.pt"])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02"])
def test_a_file_that_is_not_weights_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_tensors([tmp_path / name])


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"w\.safetensors cannot be read"):
        read_tensors([tmp_path / "w.safetensors"])


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 3}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        read_tensors([tmp_path / "w.pt"])


def test_original_and_diffusers_names_load_the_same_weights(tmp_path: Path) -> None:
    original = load_file(WEIGHTS)
    expected = with_diffusers_names(original, "golden")
    variants = {
        "original": original,
        "diffusers": expected,
        "wrapped": {f"model.diffusion_model.{name}": x for name, x in original.items()},
    }
    for kind, tensors in variants.items():
        (tmp_path / kind).mkdir()
        _save_shards(tmp_path / kind, tensors)
        transformer = build_transformer(_model(tmp_path / kind), "main", device="cpu", precision="fp32")
        assert _is_equal(transformer.state_dict(), expected), kind
        assert not transformer.training
        assert not any(x.requires_grad for x in transformer.parameters())


def test_files_are_converted_to_the_models_precision(tmp_path: Path) -> None:
    _save_shards(tmp_path, load_file(WEIGHTS))
    transformer = build_transformer(_model(tmp_path), "main", device="cpu", precision="bf16")
    assert {x.dtype for x in transformer.parameters()} == {torch.bfloat16}


def test_a_checkpoint_with_a_missing_and_a_misshapen_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensors = load_file(WEIGHTS)
    del tensors["blocks.1.cross_attn.k.bias"]
    tensors["head.head.bias"] = torch.zeros(7)
    _save_shards(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        build_transformer(_model(tmp_path), "main", device="cpu", precision="fp32")
    message = str(error.value)
    assert message.startswith("transformer golden/main")
    assert "1 missing: blocks.1.attn2.to_k.bias" in message
    assert "proj_out.bias is (7,), not (64,)" in message


def test_two_names_of_one_weight_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"head\.head\.bias and proj_out\.bias"):
        with_diffusers_names({"head.head.bias": 1, "proj_out.bias": 2}, "golden")


@pytest.mark.parametrize("name", ["blocks.0.ffn.net.0.proj.weight", "blocks.10.norm2.bias", "scale_shift_table"])
def test_diffusers_names_are_left_alone(name: str) -> None:
    assert diffusers_name(name) == name


def test_seeded_weights_repeat_and_differ_between_experts_and_seeds() -> None:
    model = load_model_config("debug-two-expert")

    def weights(config: ModelConfig, expert: str) -> dict[str, Tensor]:
        return build_transformer(config, expert, device="cpu", precision="fp32").state_dict()

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    high = weights(model, "high")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert _is_equal(weights(model, "high"), high)
    for other in (weights(model, "low"), weights(replace(model, weights=WeightsConfig(seed=1)), "high")):
        assert not any(torch.equal(x, high[name]) for name, x in other.items())


def test_a_seeded_transformer_answers_with_velocities_of_ordinary_size() -> None:
    transformer = build_transformer(load_model_config("debug"), "main", device="cpu", precision="fp32")
    timestep = torch.tensor([[0.0, 500.0, 1000.0]])
    velocity = transformer(torch.randn(1, 16, 3, 8, 8), timestep, torch.randn(1, 16, 32))
    assert 0.3 < velocity.std() < 3.0


def test_an_unknown_expert_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="expert 'high' is unknown; the experts of debug are main"):
        build_transformer(load_model_config("debug"), "high", device="cpu", precision="fp32")
