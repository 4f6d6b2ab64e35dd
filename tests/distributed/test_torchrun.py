"""``generate`` under torchrun: the video one process makes, and mistakes told once."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pusa_dist.__main__ import main
from pusa_dist.media.clips import iter_frames

ARGUMENTS = [
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
    "--threads",
    "1",
]


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "pusa_dist", "generate", *ARGUMENTS, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.parametrize("axis", ["--ulysses-degree", "--cfg-degree"])
def test_two_ranks_make_the_video_that_one_process_makes(tmp_path, axis):
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "start.png")
    arguments = ["--prompt", "a kite", "--input", str(tmp_path / "start.png"), "--out"]
    assert main(["generate", *ARGUMENTS, *arguments, str(tmp_path / "one.mp4")]) == 0
    assert main(["generate", *ARGUMENTS, *arguments, str(tmp_path / "other.mp4"), "--seed", "6"]) == 0
    done = torchrun(*arguments, str(tmp_path / "two.mp4"), axis, "2")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "rank 0 alone reports"
    one, two, other = (np.stack([*iter_frames((tmp_path / f"{n}.mp4").read_bytes())]) for n in ("one", "two", "other"))
    assert one.shape == two.shape == (9, 64, 64, 3)
    # 1e-5 in a latent tips a pixel over to the next level here and there, and the codec what is around it.
    assert np.abs(one.astype(int) - two).mean() < 2 < 10 < np.abs(one.astype(int) - other).mean()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ulysses-degree", "3", "--prompt", "a kite"], "error: ulysses_degree=3 does not divide"),
        # Only rank 0 reads the prompt.
        (["--ulysses-degree", "2", "--prompt", "x" * 600], "error: prompt has 601 tokens"),
    ],
)
def test_a_mistake_is_told_once(tmp_path, options, told):
    done = torchrun(*options, "--out", str(tmp_path / "none.mp4"))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(told)
    assert "[rank" not in done.stderr, "a rank ended with a traceback"
