"""The shipped models, shrunk, from files laid out and named as published, through the command line."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pusa_dist.__main__ import main
from pusa_dist.media.clips import iter_frames

GOLDENS = Path(__file__).parents[1] / "goldens"
SHAPES = {
    "transformer": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 20, "ffn_dim": 160}
    | {"text_dim": 32, "freq_dim": 64},
    "vae": {"base_dim": 4},
    "text_encoder": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def recorded(name, prefix=""):
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def publish(root, pattern, tensors):
    """Save tensors where a model's configuration looks for them: in two shards where it looks for several."""
    names = sorted(tensors)
    shards = [names[::2], names[1::2]] if "*" in pattern else [names]
    for index, shard in enumerate(shards, 1):
        path = root / pattern.replace("*", f"{index:05d}-of-{len(shards):05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = {name: tensors[name] for name in shard}
        save_file(part, path) if path.suffix == ".safetensors" else torch.save(part, path)


def shrunk(name):
    """A shipped model's YAML with small shapes and a step-distillation LoRA."""
    values = yaml.safe_load((files("configs") / "model" / f"{name}.yaml").read_text()) | SHAPES
    alpha = values["lora"]["alpha"]
    return values | {
        "distill_lora": {"alpha": dict.fromkeys(alpha, 1.0), "files": {e: f"distill/{e}.safetensors" for e in alpha}}
    }


def publish_all(root, values):
    weights = values["weights"]
    for expert, pattern in weights["transformer"].items():
        publish(root, pattern, recorded(f"public_dit_{expert}"))
        publish(root, values["lora"]["files"][expert], recorded("lora", "pusa/"))
        publish(root, values["distill_lora"]["files"][expert], recorded("lora", "lightx2v/"))
    publish(root, weights["vae"], recorded("vae_weights"))
    publish(root, weights["text_encoder"], recorded("text_encoder", "w/"))
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "kite": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (root / weights["tokenizer"]).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(root / weights["tokenizer"]))


@pytest.fixture
def published(tmp_path, capsys):
    """A folder of weights, the YAML's values, and a function that generates from them."""

    def make(name):
        values = shrunk(name)
        publish_all(tmp_path / "weights", values)

        def generate(*options):
            (tmp_path / "model.yaml").write_text(yaml.safe_dump(values))
            out = tmp_path / "out.mp4"
            command = ["generate", "--model", str(tmp_path / "model.yaml"), "--weights", str(tmp_path / "weights")]
            command += ["--prompt", "a kite", "--size", "32x32", "--num-frames", "5", "--num-inference-steps", "4"]
            code = main([*command, "--seed", "1", "--out", str(out), *options])
            return code, np.stack(list(iter_frames(out.read_bytes()))) if code == 0 else capsys.readouterr().err

        return tmp_path / "weights", values, generate

    return make


@pytest.mark.parametrize("name", ["pusa-v1-14b", "pusa-v1-wan2.2-a14b"])
def test_a_shipped_model_generates_from_the_published_files(published, name):
    _, values, generate = published(name)
    code, frames = generate()
    assert (code, frames.shape) == (0, (5, 32, 32, 3))
    # Distilled: no guidance unless asked for; every LoRA's strength matters.
    assert np.array_equal(generate("--guidance-scale", "1")[1], frames)
    assert not np.array_equal(generate("--guidance-scale", "3")[1], frames)
    for expert, alpha in values["lora"]["alpha"].items():
        assert not np.array_equal(generate("--lora-alpha", json.dumps({expert: alpha + 2}))[1], frames), expert
    for expert in values["distill_lora"]["alpha"]:
        values["distill_lora"]["alpha"][expert] = 3.0
        assert not np.array_equal(generate()[1], frames), expert
        values["distill_lora"]["alpha"][expert] = 1.0


PARTS = {
    "transformer": ("public_dit_main", "", "head.head.bias", "proj_out.bias"),
    "vae": ("vae_weights", "", "conv2.bias", "post_quant_conv.bias"),
    "text_encoder": ("text_encoder", "w/", "norm.weight", "encoder.final_layer_norm.weight"),
}


@pytest.mark.parametrize("flaw", ["missing", "misshapen"])
@pytest.mark.parametrize("part", PARTS)
def test_a_flawed_checkpoint_is_one_line_that_names_the_tensor(published, part, flaw):
    root, values, generate = published("pusa-v1-14b")
    golden, prefix, key, name = PARTS[part]
    tensors = recorded(golden, prefix)
    tensors |= {key: torch.zeros(7)}
    if flaw == "missing":
        del tensors[key]
    pattern = values["weights"][part]
    publish(root, pattern["main"] if part == "transformer" else pattern, tensors)
    code, printed = generate()
    assert (code, len(printed.splitlines())) == (2, 1), printed
    assert printed.startswith("error: ")
    assert f"1 {flaw}: {name}" in printed


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_file_that_is_absent_or_no_weights_is_one_line_that_names_it(published, part):
    root, values, generate = published("pusa-v1-14b")
    path = root / values["weights"][part]
    path.write_bytes(b"not weights")
    code, printed = generate()
    assert (code, len(printed.splitlines())) == (2, 1), printed
    assert path.name in printed
    path.unlink()
    code, printed = generate()
    assert (code, len(printed.splitlines())) == (2, 1), printed
    assert path.name in printed
