import json

import numpy as np
import pytest
import torch

from pusa_dist.__main__ import main
from pusa_dist.config import load_model_config
from pusa_dist.errors import CheckpointError, ConfigError, RequestError
from pusa_dist.media.clips import iter_frames
from pusa_dist.media.mp4 import Mp4Writer
from pusa_dist.prompt_encoder import PromptEncoder
from pusa_dist.training import cache
from pusa_dist.training.cache import LatentCache, make_cache, sample_order
from pusa_dist.training.footage import Clip, frames_of, read_footage
from pusa_dist.video_codec import VideoCodec

MODEL = load_model_config("debug")
SETTINGS = {"size": (48, 32), "num_frames": 5}


def write_clip(path, frames, width=64, height=64, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = noise.repeat(height // 4, axis=0).repeat(width // 4, axis=1)
    with Mp4Writer(path, width, height, 8) as writer:
        writer.write(np.stack([np.roll(picture, 3 * i, axis=1) for i in range(frames)]))


@pytest.fixture
def folder(tmp_path):
    """Three clips, one in a folder of its own, one longer than needed."""
    data = tmp_path / "data"
    write_clip(data / "train" / "one.mp4", 5, seed=1)
    write_clip(data / "train" / "more" / "two.mp4", 8, seed=2)
    write_clip(data / "train" / "three.mp4", 5, seed=3)
    lines = ["file_name,text", "one.mp4,a kite", 'more/two.mp4,"a boat, drifting"', "three.mp4,a dog"]
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    return data


def samples_of(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_a_cache_holds_what_the_product_computes(folder, tmp_path):
    assert make_cache(MODEL, folder, tmp_path / "cache", **SETTINGS) == 3
    made = LatentCache(tmp_path / "cache", MODEL)
    assert len(made) == 3
    latents, prompt = made[1]
    clip = read_footage(folder)[1]
    codec = VideoCodec(MODEL, "cpu")
    frames = list(frames_of(clip, 48, 32, 5))
    assert latents.equal(torch.stack(list(codec.encode_frames(iter(frames))), dim=1))
    assert latents.shape == (16, 2, 4, 6)
    assert prompt.equal(PromptEncoder(MODEL, "cpu").encode("a boat, drifting"))
    together, prompts = made.batch([2, 0])
    assert together[1].equal(made[0][0])
    assert prompts.shape == (2, 512, 32)


def test_frames_cover_the_size_and_are_cropped_around_the_centre(tmp_path):
    write_clip(tmp_path / "wide.mp4", 2, width=128, height=32)
    clip = Clip(tmp_path / "wide.mp4", "wide.mp4", "x")
    (frame,) = frames_of(clip, 32, 32, 1)
    whole = next(iter_frames(clip.path.read_bytes()))
    assert np.array_equal(frame, whole[:, 48:80])
    (smaller,) = frames_of(clip, 16, 16, 1)
    averaged = whole[:, 48:80].reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(smaller - averaged).mean() < 10  # shrinking averages; picking pixels is off by 25


def test_caching_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    out, write = tmp_path / "cache", cache._write
    calls = []

    def dies_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(cache, "_write", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_cache(MODEL, folder, out, **SETTINGS)
    with pytest.raises(ConfigError, match=r"lacks 2 of 3 clips .* run `train cache` again"):
        LatentCache(out, MODEL)
    monkeypatch.undo()
    before = samples_of(out)
    assert make_cache(MODEL, folder, out, **SETTINGS) == 2
    assert before.items() <= samples_of(out).items()
    assert make_cache(MODEL, folder, out, **SETTINGS) == 0


def test_a_changed_clip_a_changed_caption_and_a_damaged_file_are_made_again(folder, tmp_path):
    out = tmp_path / "cache"
    make_cache(MODEL, folder, out, **SETTINGS)
    write_clip(folder / "train" / "one.mp4", 6, seed=9)
    (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text().replace("a dog", "a cat"))
    name = json.loads((out / "cache.json").read_text())["samples"][1]
    (out / f"{name}.safetensors").write_bytes(b"\x00" * 99)
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors cannot be read .* delete it"):
        LatentCache(out, MODEL)[1]
    assert make_cache(MODEL, folder, out, **SETTINGS) == 3
    assert LatentCache(out, MODEL)[2][1].equal(PromptEncoder(MODEL, "cpu").encode("a cat"))


def test_several_processes_each_cache_their_share(folder, tmp_path):
    out = tmp_path / "cache"
    assert [make_cache(MODEL, folder, out, rank=rank, world_size=2, **SETTINGS) for rank in (0, 1)] == [2, 1]
    assert len(LatentCache(out, MODEL)) == 3


def test_clips_that_cannot_be_used_are_named_and_the_others_kept(folder, tmp_path):
    out = tmp_path / "cache"
    (folder / "train" / "one.mp4").write_bytes(b"not a clip")
    write_clip(folder / "train" / "three.mp4", 3)
    with pytest.raises(RequestError) as told:
        make_cache(MODEL, folder, out, **SETTINGS)
    message = str(told.value)
    assert "2 of 3 clips could not be cached" in message
    assert "train/one.mp4: the clip cannot be decoded" in message
    assert (
        "train/three.mp4: the clip ends after 3 of the 5 frames needed; give a longer clip, or cache fewer" in message
    )
    assert len(samples_of(out)) == 1
    (folder / "metadata.csv").write_text(f"file_name,text\nmore/two.mp4,{'long ' * 200}\n")
    with pytest.raises(RequestError, match=r"two\.mp4: prompt has \d+ tokens"):
        make_cache(MODEL, folder, out, **SETTINGS)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (None, r"metadata\.csv cannot be read"),
        ("", "no column file_name, text"),
        ("file_name,caption\na.mp4,x\n", "no column text"),
        ("file_name,text\n", "lists no clip"),
        ("file_name,text\none.mp4,a kite\nnone.mp4,x\n", r"line 3: train/none\.mp4 does not exist"),
        ("file_name,text\none.mp4,  \n,x\n", r"line 2: one\.mp4 has no text; line 3: no file_name"),
        ("file_name,text\n../train/one.mp4,x\n", "outside of train/"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_every_line(folder, tmp_path, table, told):
    (folder / "metadata.csv").unlink()
    if table is not None:
        (folder / "metadata.csv").write_text(table)
    with pytest.raises(ConfigError, match=told):
        make_cache(MODEL, folder, tmp_path / "cache", **SETTINGS)


def test_a_cache_of_something_else_is_neither_mixed_nor_read(folder, tmp_path):
    out = tmp_path / "cache"
    make_cache(MODEL, folder, out, **SETTINGS)
    with pytest.raises(ConfigError, match="width=48 there, 64 here"):
        make_cache(MODEL, folder, out, size=(64, 32), num_frames=5)
    with pytest.raises(ConfigError, match="of model debug revision 1, not of debug-two-expert"):
        LatentCache(out, load_model_config("debug-two-expert"))
    with pytest.raises(ConfigError, match="make the cache with"):
        LatentCache(tmp_path / "nowhere", MODEL)


@pytest.mark.parametrize(("size", "num_frames"), [((50, 32), 5), ((48, 0), 5), ((48, 32), 6)])
def test_sizes_the_model_cannot_have_are_refused(folder, tmp_path, size, num_frames):
    with pytest.raises(ConfigError, match=r"multiples of 16|4k\+1"):
        make_cache(MODEL, folder, tmp_path / "cache", size=size, num_frames=num_frames)


def test_every_sample_is_seen_once_before_any_is_seen_again():
    at = sample_order(7, seed=3)
    epochs = [[at(7 * epoch + i) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = sample_order(7, seed=3)
    assert [again(i) for i in range(14, 21)] == epochs[2]
    assert [sample_order(7, seed=4)(i) for i in range(7)] != epochs[0]


def test_the_command_caches_and_says_what_is_wrong(folder, tmp_path, capsys):
    arguments = ["train", "cache", "--model", "debug", "--data", str(folder), "--out", str(tmp_path / "cache")]
    assert main([*arguments, "--size", "48x32", "--num-frames", "5"]) == 0
    assert len(LatentCache(tmp_path / "cache", MODEL)) == 3
    assert main([*arguments, "--size", "48x32", "--num-frames", "9"]) == 2
    assert "num_frames=5 there, 9 here" in capsys.readouterr().err
