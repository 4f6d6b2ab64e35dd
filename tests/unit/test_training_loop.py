"""The loop: interrupted runs end as others do; averaged weights; the log."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pusa_dist.training.loop import CHECKPOINT, LOG, Average, LoopOptions, rate, read_log, train

OPTIONS = LoopOptions(steps=12, batch_size=4, lr=0.05, warmup=2, ema=0.5, save_every=4, log_every=3, sample_every=6)


class _Killed(Exception):
    pass


def _model() -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def _run(folder: Path, options: LoopOptions = OPTIONS, die_at: int | None = None) -> nn.Linear:
    model = _model()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == die_at:
            raise _Killed
        x = torch.randn(options.batch_size, 3, generator=generator)
        return {"loss": (model(x) - x[:, :2]).square().mean()}

    train(model, loss, options, folder)
    return model


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("die_at", [1, 4, 10])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, die_at: int) -> None:
    whole = _run(tmp_path / "whole")
    with pytest.raises(_Killed):
        _run(tmp_path / "broken", die_at=die_at)
    assert _equal(_run(tmp_path / "broken"), whole)
    assert _equal(_run(tmp_path / "broken"), whole), "a finished run is left as it is"


_SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_training_loop as this
this._run(Path(sys.argv[1]), die_at=None) if sys.argv[3] == "no" else this._killed_hard(Path(sys.argv[1]))
"""


def _killed_hard(folder: Path) -> None:
    model = _model()

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(OPTIONS.batch_size, 3, generator=generator)
        return {"loss": (model(x) - x[:, :2]).square().mean()}

    train(model, loss, OPTIONS, folder)


def test_a_killed_process_continues_from_its_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(Path(__file__).parent), "yes"]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 4
    assert _equal(_run(tmp_path), _run(tmp_path / "whole"))


def test_the_result_is_the_average_and_samples_see_it(tmp_path: Path) -> None:
    model, seen = _model(), []

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": model.weight.sum() + model.bias.sum()}

    train(model, loss, OPTIONS, tmp_path, lambda step: seen.append((step, model.weight[0, 0].item())))
    assert [step for step, _ in seen] == [6, 12]
    assert seen[-1][1] == model.weight[0, 0].item()
    last = torch.load(tmp_path / CHECKPOINT, weights_only=True)["weights"][0][0, 0].item()
    assert last < model.weight[0, 0].item() < 0.5, "the average lags behind"


def test_weights_are_themselves_again_after_a_sample_that_fails() -> None:
    model = _model()
    parameters = list(model.parameters())
    average = Average(parameters, 0.5)
    for state in average.state:
        state.fill_(0.25)

    def seen() -> set[float]:
        return {value.item() for p in parameters for value in p.flatten()}

    def sample() -> None:
        with average.in_place(parameters):
            assert seen() == {0.25}
            raise _Killed

    with pytest.raises(_Killed):
        sample()
    assert seen() == {0.5}


def test_the_log_has_a_line_every_few_steps(tmp_path: Path) -> None:
    _run(tmp_path)
    lines = list(read_log(tmp_path / LOG))
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"norm", "samples_per_s"} <= lines[0].keys()


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100, 10) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] < 0.01
    assert [rate(step, 50, 10) for step in range(100)][50:] == [rate(step, 50, 10) for step in range(50)]
