"""The command line from files on disk to an MP4: every task, the edges, and mistakes in one line."""

import json
import logging

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pusa_dist.__main__ import main
from pusa_dist.media.clips import iter_frames
from pusa_dist.media.mp4 import Mp4Writer

SMALL = [
    "--model",
    "debug",
    "--size",
    "64x64",
    "--num-frames",
    "9",
    "--num-inference-steps",
    "2",
    "--seed",
    "5",
    "--prompt",
    "a kite",
]


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture, one that EXIF turns, and two clips, none of the video's size; one has exactly its 9 frames."""
    folder = tmp_path_factory.mktemp("inputs")
    pixels = np.random.default_rng(2).integers(0, 256, (9, 70, 102, 3), dtype=np.uint8)
    Image.fromarray(pixels[0, :61, :99]).save(folder / "start.png")
    turned = Image.fromarray(pixels[1, :61, :99])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "end.jpg", exif=exif)
    for name in ("one.mp4", "two.mp4"):
        with Mp4Writer(folder / name, 102, 70, 8) as writer:
            writer.write(pixels)
    return folder


@pytest.fixture
def generate(files, tmp_path, capsys):
    def run(*inputs, conditioning=(), options=()):
        """Exit status, frames of the video or None, and what was printed to stderr."""
        out = tmp_path / "out.mp4"
        arguments = [word for name in inputs for word in ("--input", str(files / name))]
        arguments += ["--conditioning", json.dumps(list(conditioning)), "--out", str(out)]
        code = main(["generate", *SMALL, *arguments, *options])
        frames = np.stack(list(iter_frames(out.read_bytes()))) if out.exists() else None
        return code, frames, capsys.readouterr().err

    return run


TASKS = {
    "text to video": ((), []),
    "image to video": (("start.png",), []),
    "start and end": (("start.png", "end.jpg"), [{"position": "start"}, {"position": "end", "noise_multiplier": 0.5}]),
    "keyframes": (("start.png", "end.jpg"), [{"position": {"frame": 4}}, {"position": 2, "fit": "letterbox"}]),
    "extension": (("one.mp4",), [{"position": 0, "source": -2}, {"position": 1, "source": -1}]),
    "completion": (("one.mp4",), [{"position": 0, "noise_multiplier": 0}, {"position": 2}]),
    "transition": (
        ("one.mp4", "two.mp4"),
        [{"input": 0, "position": 0, "source": -1}, {"input": 1, "position": 2, "source": 0}],
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_from_files_to_an_mp4(generate, task):
    inputs, conditioning = TASKS[task]
    code, frames, progress = generate(*inputs, conditioning=conditioning)
    assert code == 0
    assert frames.shape == (9, 64, 64, 3)
    assert frames.std() > 10
    assert "2/2" in progress
    if inputs:
        assert not np.array_equal(frames, generate()[1]), "what was given changed nothing"


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (["--num-frames", "1"], (1, 64, 64, 3)),
        (["--size", "16x16"], (9, 16, 16, 3)),  # a frame of one token
        (["--guidance-scale", "1"], (9, 64, 64, 3)),
        (["--model", "debug-two-expert", "--lora-alpha", '{"high": 0.5, "low": 2}'], (9, 64, 64, 3)),
    ],
)
def test_the_smallest_videos_and_unusual_settings_work(generate, options, shape):
    code, frames, _ = generate("start.png", options=options)
    assert code == 0
    assert frames.shape == shape


def test_a_model_in_bf16_runs_on_a_cpu(generate, tmp_path, debug_yaml):
    code, frames, _ = generate("start.png", options=["--model", debug_yaml(precision="bf16")])
    assert code == 0
    exact = generate("start.png")[1]
    assert 0 < np.abs(frames.astype(int) - exact).mean() < 20


def test_a_seed_repeats_byte_for_byte_and_a_drawn_one_is_printed(files, tmp_path, capsys):
    paths = [tmp_path / "one.mp4", tmp_path / "two.mp4"]
    unseeded = [word for word in SMALL if word not in ("--seed", "5")]
    assert main(["generate", *unseeded, "--out", str(paths[0])]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["generate", *unseeded, "--seed", str(told["seed"]), "--out", str(paths[1])]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with av.open(str(paths[0])) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--input", "absent.png"], "absent.png"),
        (["--prompt", "x" * 600], "prompt has 601 tokens; shorten it to at most 512"),
        (["--conditioning", "[{]"], "--conditioning is not valid JSON"),
        (["--conditioning", "{}"], "request.conditioning={}: expected"),
        (["--conditioning", '[{"input": "a", "position": 0}]'], "request.conditioning[0].input='a': expected int"),
        (["--conditioning", '[{"inputs": 0}]'], "request.conditioning[0]: unknown setting inputs"),
        (["--lora-alpha", '"strong"'], "request.lora_alpha='strong': expected"),
        (["--size", "64"], "--size=64: write WIDTHxHEIGHT"),
        (["--num-frames", "10"], "pusa.num_frames=10 is not 4k+1; use 9 or 13"),
        (["--ulysses-degree", "3"], "ulysses_degree=3 does not divide num_attention_heads=4; use one of 1, 2, 4"),
        (["--ulysses-degree", "2"], "needs 2 ranks, but world_size=1"),
        (["--size", "16x16", "--ring-degree", "2"], "a frame has 1 tokens and 2 ranks share it"),
        (["--model", "wan"], "model 'wan' is unknown; use one of debug, debug-two-expert"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(generate, options, told):
    code, frames, printed = generate(options=options)
    assert (code, frames) == (2, None)
    (line,) = [line for line in printed.splitlines() if "denoise" not in line]
    assert line.startswith("error: ")
    assert told in line


def test_a_device_that_is_not_there_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    clips = ["--data", str(tmp_path), "--out", str(tmp_path / "cache")]
    for command in (["generate", *SMALL], ["train", "base"], ["train", "cache", "--model", "debug", *clips]):
        assert main([*command, "--device", "cuda"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: device=cuda")
        assert line.endswith("this process sees no CUDA device; use cpu")


def test_a_configuration_that_cannot_be_read_is_named(generate, tmp_path, debug_yaml):
    for content in ("name: [", "[]", "\x00"):
        path = tmp_path / "broken.yaml"
        path.write_text(content)
        code, _, printed = generate(options=["--model", str(path)])
        assert (code, len(printed.splitlines())) == (2, 1), printed
        assert "broken.yaml" in printed
    code, _, printed = generate(options=["--model", debug_yaml(limits={"max_frames": "many", "max_tokens": 9})])
    assert code == 2
    assert "limits.max_frames='many': expected int" in printed


@pytest.mark.parametrize("option", ["--threads", "--repeat"])
def test_counts_below_one_are_refused(generate, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate(options=[option, "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_plan_shows_the_shards_and_refuses_what_generate_would(capsys):
    assert main(["plan", "--model", "debug", "--ring-degree", "5"]) == 0
    assert "tokens of a frame on each sequence rank: 10, 10, 10, 9, 9" in capsys.readouterr().out
    assert main(["plan", "--model", "pusa-v1-wan2.2-a14b"]) == 0
    assert "weights (bf16) on each rank's device: 62.4 GiB = 2 x (base 26.6 GiB" in capsys.readouterr().out
    assert main(["plan", "--size", "100x100"]) == 2
    assert "multiples of 16" in capsys.readouterr().err
