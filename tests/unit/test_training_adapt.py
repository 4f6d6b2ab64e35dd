import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa_dist.__main__ import main
from pusa_dist.checkpoint.load import read_tensors
from pusa_dist.checkpoint.lora import MergedLora, read_pusa
from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import load_model_config
from pusa_dist.errors import CheckpointError, ConfigError
from pusa_dist.training import cache
from pusa_dist.training.adapt import CachedOptions, adapt, adapted_transformer
from pusa_dist.training.adapter import inject
from pusa_dist.training.cache import CacheSettings, LatentCache
from pusa_dist.training.loop import LoopOptions, read_log
from pusa_dist.training.objective import TrainingSchedule, draw, lesson, loss, sample_generator

MODEL = load_model_config("debug")
LOOP = LoopOptions(steps=6, batch_size=2, lr=5e-3, warmup=0, ema=0.0, log_every=1, save_every=2)
OPTIONS = CachedOptions(loop=LOOP, rank=4)


def write_cache(folder, count=3):
    settings = CacheSettings(model="debug", revision="1", width=48, height=32, num_frames=9, precision="fp32")
    cache._begin(folder, settings, [f"clip{n}" for n in range(count)])
    for n in range(count):
        tensors = {"latents": seeded_normal((16, 3, 4, 6), 1, f"latents {n}"), "prompt": torch.randn(5, 32)}
        save_file(tensors, folder / f"clip{n}.safetensors")
    return folder


@pytest.fixture
def data(tmp_path):
    torch.manual_seed(0)
    return write_cache(tmp_path / "cache")


def test_it_learns_from_cached_files_alone_and_the_product_merges_what_it_writes(data, tmp_path):
    loop = replace(LOOP, steps=24, lr=2e-2, save_every=24)
    file = adapt(MODEL, data, tmp_path / "run", replace(OPTIONS, loop=loop))
    base, merged = (build_transformer(MODEL, "main", device="cpu", precision="fp32") for _ in range(2))
    MergedLora(merged, read_pusa(read_tensors([file]))).set_alpha(1.0)
    continued = adapted_transformer(MODEL, OPTIONS, "fp32", start=file)
    latents, context = LatentCache(data, MODEL).batch([0, 1, 2] * 4)
    given = lesson(latents, *draw(latents, [sample_generator(9, n) for n in range(12)]), TrainingSchedule.of())
    with torch.no_grad():
        before, after, same = (net(given.noisy, given.timesteps, context) for net in (base, merged, continued))
    assert loss(after, given) < 0.9 * loss(before, given)
    assert (after - same).abs().max() < 2e-5


def test_the_base_read_weight_by_weight_is_the_one_the_product_builds():
    ours = adapted_transformer(MODEL, OPTIONS, "bf16")
    theirs = inject(build_transformer(MODEL, "main", device="cpu", precision="bf16"), 4)
    for (name, one), (same, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == same
        assert one.dtype == other.dtype
        assert one.equal(other)
        assert one.requires_grad == other.requires_grad == (".lora_" in name)


def test_an_interrupted_run_ends_with_the_same_bits(data, tmp_path, monkeypatch):
    whole = adapt(MODEL, data, tmp_path / "whole", OPTIONS)
    read, seen = LatentCache.batch, []

    def dies_in_step_five(self, indices):
        seen.append(indices)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return read(self, indices)

    monkeypatch.setattr(LatentCache, "batch", dies_in_step_five)
    with pytest.raises(KeyboardInterrupt):
        adapt(MODEL, data, tmp_path / "run", OPTIONS)
    monkeypatch.undo()
    resumed = adapt(MODEL, data, tmp_path / "run", OPTIONS)
    ours, theirs = load_file(resumed), load_file(whole)
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_another_run_is_not_continued_by_mistake(data, tmp_path):
    adapt(MODEL, data, tmp_path / "run", OPTIONS)
    with pytest.raises(
        ConfigError, match=r"rank=4 there, 8 here.*repeat them, or use another folder and --init-adapter"
    ):
        adapt(MODEL, data, tmp_path / "run", replace(OPTIONS, rank=8))
    adapt(MODEL, data, tmp_path / "run", replace(OPTIONS, loop=replace(LOOP, log_every=3)))


def test_what_cannot_be_used_is_refused_before_anything_is_trained(data, tmp_path):
    with pytest.raises(ConfigError, match="two experts"):
        adapt(load_model_config("debug-two-expert"), data, tmp_path / "run", OPTIONS)
    other = adapt(MODEL, data, tmp_path / "other", replace(OPTIONS, rank=2, loop=replace(LOOP, steps=1)))
    with pytest.raises(CheckpointError, match="misshapen"):
        adapt(MODEL, data, tmp_path / "new", OPTIONS, start=other)
    (data / "clip1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of 3 clips \(clip1\)"):
        adapt(MODEL, data, tmp_path / "new", OPTIONS)


def test_the_command_adapts_and_goes_on(data, tmp_path, capsys):
    arguments = ["train", "adapt", "--model", "debug", "--data", str(data), "--out", str(tmp_path / "run")]
    arguments += ["--steps", "2", "--rank", "3", "--lr", "1e-3", "--batch-size", "2", "--threads", "1"]
    for _ in range(2):
        assert main(arguments) == 0
    assert [line["step"] for line in read_log(tmp_path / "run" / "adapt" / "log.jsonl")] == [1, 2]
    run = json.loads((tmp_path / "run" / "adapt" / "run.json").read_text())
    assert (run["rank"], run["steps"], run["lr"], run["ema"]) == (3, 2, 1e-3, 0.0)
    assert main([*arguments[:-2], "--caption-dropout", "0.1"]) == 2
    assert "--caption-dropout: only with no --data" in capsys.readouterr().err
    assert main(["train", "adapt", "--model", "debug", "--sharded", "--out", str(tmp_path / "none")]) == 2
    assert "--sharded: only with --data" in capsys.readouterr().err


def test_the_plan_command_shows_a_column_for_each_number_of_gpus(capsys):
    assert main(["train", "plan", "--rank", "64", "--gpus", "1", "4", "--size", "832x480"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pusa-v1-14b: LoRA of rank 64, 832x480, 81 frames"
    assert lines[1].split() == ["GiB", "a", "GPU", "1", "GPU", "4", "GPUs"]
    assert main(["train", "plan", "--size", "big"]) == 2
