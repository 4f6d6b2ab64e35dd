"""``train adapt`` under torchrun: two ranks that share one model write the adapter that one process writes."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa_dist.__main__ import main
from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.training import cache
from pusa_dist.training.cache import CacheSettings

ARGUMENTS = ["train", "adapt", "--model", "debug", "--rank", "4", "--steps", "3", "--lr", "1e-3", "--threads", "1"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "cache"
    settings = CacheSettings(model="debug", revision="1", width=48, height=32, num_frames=9, precision="fp32")
    cache._begin(folder, settings, [f"clip{n}" for n in range(4)])
    for n in range(4):
        tensors = {"latents": seeded_normal((16, 3, 4, 6), 1, f"latents {n}"), "prompt": torch.ones(5, 32)}
        save_file(tensors, folder / f"clip{n}.safetensors")
    return folder


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "pusa_dist", *ARGUMENTS, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_two_ranks_write_the_adapter_that_one_process_writes(data, tmp_path):
    where = ["--data", str(data), "--out"]
    assert main([*ARGUMENTS, *where, str(tmp_path / "one"), "--batch-size", "2"]) == 0
    done = torchrun(*where, str(tmp_path / "two"), "--sharded")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / run / "adapt" / "lora.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    # B begins at zero, so that what it is after three steps is all that was learned.
    learned = [torch.cat([t.flatten() for k, t in sorted(each.items()) if "lora_B" in k]) for each in (one, two)]
    assert learned[0].abs().max() > 1e-3
    assert torch.nn.functional.cosine_similarity(*learned, dim=0) > 0.999
    assert len((tmp_path / "two" / "adapt" / "log.jsonl").read_text().splitlines()) == 3, "rank 0 alone logs"
