import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa_dist.errors import ConfigError
from pusa_dist.parity import run
from pusa_dist.parity.cases import CaseFolder
from pusa_dist.parity.runner import judge

GOLDENS = Path(__file__).parents[1] / "goldens"


def run_folder(folder):
    lines = []
    return run(folder, lines.append), lines


def row_of(lines, name):
    return next(line for line in lines if line.startswith(f"{name} "))


def judge_one(folder, name):
    return judge(next(case for case in CaseFolder(folder).cases if case.name == name))


@pytest.fixture
def copy(other_folder, tmp_path):
    """A copy of the other folder to spoil."""
    return Path(shutil.copytree(other_folder, tmp_path / "copy"))


def change_json(folder, name, **changes):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder, name, key, change):
    tensors = load_file(folder / f"{name}.safetensors")
    save_file({**tensors, key: change(tensors[key])}, folder / f"{name}.safetensors")


def test_the_public_recordings_agree():
    code, lines = run_folder(GOLDENS)
    assert code == 0
    assert lines[-1] == "17 ok, 0 FAIL, 1 shown"
    assert "public_dit_main" in lines[0]
    assert " ok" in row_of(lines, "training_step")
    assert " shown" in row_of(lines, "vae_tiled")
    assert "informational: max_abs" in row_of(lines, "vae")


def test_a_folder_with_other_names_shapes_and_settings_agrees(other_folder):
    code, lines = run_folder(other_folder)
    assert code == 0, "\n".join(lines)
    assert lines[-1] == "14 ok, 0 FAIL, 0 shown"


def test_a_recorded_upstream_fault_is_named_and_checked_against_the_loops_own_sigma(other_folder, copy):
    row = judge_one(other_folder, "full")
    assert row.verdict == "ok", str(row)
    assert "upstream fault 2: checked against the loop's own sigma" in row.notes
    change_json(copy, "full", upstream_fault=None)
    assert judge_one(copy, "full").verdict == "FAIL"
    change_json(copy, "full", upstream_fault=77)
    assert "upstream_fault=77 is not known" in judge_one(copy, "full").notes


def test_a_schedule_that_records_the_fault_is_checked_against_the_loops_own_sigma(copy):
    change_json(copy, "times", upstream_fault=2)
    for precision in ("fp32", "bf16"):
        change_tensor(copy, "times", f"wan22_v2v.shift2.5.steps7.{precision}.sigma", lambda tensor: tensor.roll(1, 0))
    assert judge_one(copy, "times").verdict == "ok"
    change_tensor(copy, "times", "wan22_v2v.shift2.5.steps7.sigmas", lambda tensor: tensor + 0.01)
    assert judge_one(copy, "times").verdict == "FAIL"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("clip", "latents_steps"),
        ("clip", "final"),
        ("clip", "cond_latents"),
        ("free", "context_neg"),
        ("free", "sigmas"),
        ("free", "noise"),
        ("pair", "noise_pred"),
        ("pair", "model_timesteps"),
        ("half", "sigma_next"),
        ("full", "timesteps"),
        ("full", "sigmas"),
        ("velocity", "output"),
        ("velocity", "timestep"),
        ("times", "wan22_v2v.shift2.5.steps7.bf16.model_timesteps"),
        ("times", "t2v.shift2.5.steps7.fp32.sigma"),
        ("strength", "merged_fp32.lightx2v_then_pusa/blocks.2.self_attn.k.weight"),
        ("strength", "merged_bf16.pusa/blocks.2.self_attn.k.weight"),
        ("sight", "latents_first_frame_only"),
        ("sight", "decoded"),
        ("words", "embeds_zeroed"),
        ("words", "raw"),
        ("words", "w/encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        ("lesson", "latents"),
        ("lesson", "noise"),
        ("lesson", "context"),
        ("lesson", "timestep"),
        ("lesson", "noisy_latents"),
        ("lesson", "weights_per_frame"),
        ("lesson", "model_output"),
        ("lesson", "mse"),
        ("lesson", "loss"),
        ("lesson", "bf16.timestep"),
        ("lesson", "bf16.noisy_latents"),
        ("lesson", "bf16.weights_per_frame"),
        ("lesson", "lora/blocks.1.ffn.2.lora_B.default.weight"),
        ("lesson", "lora/blocks.0.cross_attn.o.lora_A.default.weight"),
        ("lesson", "grad/blocks.2.self_attn.q.lora_A.default.weight"),
        ("lesson", "grad/blocks.0.ffn.0.lora_B.default.weight"),
    ],
)
def test_one_wrong_number_is_a_miss(copy, name, key):
    def spoil(tensor):
        flat = tensor.flatten()
        flat[len(flat) // 2] += 2.0
        return flat.view_as(tensor)

    change_tensor(copy, name, key, spoil)
    assert judge_one(copy, name).verdict == "FAIL"


@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
def test_a_gradient_that_is_half_a_percent_off_is_a_miss(copy, key):
    change_tensor(copy, "lesson", f"grad/blocks.2.self_attn.q.{key}.default.weight", lambda tensor: tensor * 1.005)
    assert "grad_rel_norm" in str(judge_one(copy, "lesson"))
    assert judge_one(copy, "lesson").verdict == "FAIL"


def test_a_lesson_of_other_indices_other_scale_or_other_adapted_weights_is_a_miss(copy):
    names = json.loads((copy / "lesson.json").read_text())["trainable_names"]
    for changes in ({"lora_alpha": 3}, {"trainable_names": names[1:]}, {"shift": 3.0}):
        kept = (copy / "lesson.json").read_text()
        change_json(copy, "lesson", **changes)
        assert judge_one(copy, "lesson").verdict == "FAIL", changes
        (copy / "lesson.json").write_text(kept)
    change_tensor(copy, "lesson", "timestep_id", lambda indices: indices + 1)
    assert judge_one(copy, "lesson").verdict == "FAIL"


@pytest.mark.parametrize("key", ["loss", "lora/blocks.0.ffn.0.lora_A.default.weight"])
def test_a_lesson_that_lacks_something_is_a_miss_with_the_reason(copy, key):
    tensors = load_file(copy / "lesson.safetensors")
    del tensors[key]
    save_file(tensors, copy / "lesson.safetensors")
    row = judge_one(copy, "lesson")
    assert row.verdict == "FAIL"
    assert key.removeprefix("lora/") in row.notes


@pytest.mark.parametrize(("name", "key"), [("portrait", "vae_input"), ("strip", "frame7_out_rgb_48x64_every3rd")])
def test_wrong_pixels_are_a_miss(copy, name, key):
    change_tensor(copy, name, key, lambda tensor: tensor.flip(-1).contiguous())
    assert judge_one(copy, name).verdict == "FAIL"


def test_nan_in_a_recording_is_a_miss(copy):
    change_tensor(copy, "velocity", "output", lambda tensor: tensor * float("nan"))
    assert judge_one(copy, "velocity").verdict == "FAIL"


def test_a_miss_in_spoiled_weights_is_a_miss(copy):
    change_tensor(copy, "weights_cold", "proj_out.bias", lambda tensor: tensor + 0.1)
    assert judge_one(copy, "velocity").verdict == "FAIL"


@pytest.mark.parametrize("flaw", ["no file", "not json", "not tensors", "no tolerance", "unknown tolerance", "shape"])
@pytest.mark.parametrize("name", ["free", "strip"])
def test_an_unreadable_case_is_a_fail_row_with_the_reason_and_the_others_go_on(copy, name, flaw):
    keep = {"free": "final", "strip": "frame7_out_rgb_48x64_every3rd"}[name]
    match flaw:
        case "no file":
            (copy / f"{name}.safetensors").unlink()
        case "not json":
            (copy / f"{name}.json").write_text("{")
        case "not tensors":
            (copy / f"{name}.safetensors").write_bytes(b"\x00" * 40)
        case "no tolerance":
            change_json(copy, name, tolerance={})
        case "unknown tolerance":
            change_json(copy, name, tolerance={"max_abs": 1.0, "colour_max_abs": 1.0, "max_uint8_levels": 2})
        case "shape":
            change_tensor(copy, name, keep, lambda tensor: tensor[:, :1].contiguous())
    kind = "sampler" if name == "free" else "preprocess"
    listed = [{"name": name, "kind": kind}, {"name": "portrait", "kind": "preprocess"}]
    (copy / "manifest.json").write_text(json.dumps({"cases": listed}))
    code, lines = run_folder(copy)
    assert code == 1
    assert "FAIL" in row_of(lines, name)
    assert row_of(lines, name).partition("FAIL")[2].strip()
    assert " ok" in row_of(lines, "portrait")
    assert lines[-1] == "1 ok, 1 FAIL, 0 shown"


@pytest.mark.parametrize(
    ("name", "new_name"),
    [
        ("velocity", "mystery"),
        ("times", "t2v.shift5.colour"),
        ("sight", "mystery"),
        ("words", "mystery"),
        ("lesson", "grad/mystery"),
    ],
)
def test_a_tensor_that_is_not_understood_is_not_passed_over(copy, name, new_name):
    tensors = load_file(copy / f"{name}.safetensors")
    save_file({**tensors, new_name: torch.zeros(2)}, copy / f"{name}.safetensors")
    row = judge_one(copy, name)
    assert row.verdict == "FAIL"
    assert "is not understood" in row.notes


def test_an_unknown_kind_is_a_fail_row(copy):
    change_json(copy, "free", kind="poem")
    (copy / "manifest.json").write_text(json.dumps({"cases": [{"name": "free", "kind": "poem"}]}))
    code, lines = run_folder(copy)
    assert code == 1
    assert "unknown kind" in row_of(lines, "free")


def test_a_kind_that_differs_from_the_manifests_is_a_fail_row(copy):
    change_json(copy, "free", kind="vae")
    assert "the manifest says kind 'sampler', its JSON 'vae'" in judge_one(copy, "free").notes


def test_what_is_informational_is_shown_and_does_not_fail(copy):
    change_tensor(copy, "patchwork", "decoded_tiled", lambda tensor: -tensor)
    assert judge_one(copy, "patchwork").verdict == "FAIL"
    change_json(copy, "patchwork", tolerance={"max_abs": 1e-4, "informational": True})
    assert judge_one(copy, "patchwork").verdict == "shown"


def test_a_vae_case_without_a_vae_among_the_weights_fails(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["cases"] = [entry for entry in manifest["cases"] if entry["name"] != "eyes"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "no weights case" in judge_one(copy, "sight").notes


@pytest.mark.parametrize("content", [None, "{", "[]", '{"cases": []}', '{"cases": [{"kind": "vae"}]}'])
def test_a_folder_without_a_manifest_of_cases_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        run_folder(tmp_path)


def test_every_tensor_of_the_public_lesson_counts(tmp_path):
    for name in ("public_dit_main", "training_step"):
        for suffix in ("json", "safetensors"):
            shutil.copy(GOLDENS / f"{name}.{suffix}", tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": [{"name": "training_step", "kind": "training"}]}))
    assert judge_one(tmp_path, "training_step").verdict == "ok"
    sound = load_file(tmp_path / "training_step.safetensors")
    passed_over = []
    for key, tensor in sound.items():
        if key.startswith("lora/blocks.0."):
            continue  # as those of the other block, and there are many
        spoilt = tensor.clone()
        spoilt.view(-1)[spoilt.numel() // 2] += 1
        save_file({**sound, key: spoilt}, tmp_path / "training_step.safetensors")
        if judge_one(tmp_path, "training_step").verdict != "FAIL":
            passed_over.append(key)
    assert not passed_over
