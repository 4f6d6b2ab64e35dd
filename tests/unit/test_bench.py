import json

import pytest
import torch

from pusa_dist import bench
from pusa_dist.config import TransformerConfig
from pusa_dist.errors import ConfigError
from pusa_dist.trace import Trace

SMALL = TransformerConfig(
    num_layers=1, num_attention_heads=2, attention_head_dim=8, ffn_dim=16, text_dim=8, freq_dim=16
)


def test_both_forwards_compute_the_same_from_the_same_storage():
    ours, theirs = bench.forward_pair(SMALL, (16, 3, 4, 6), text_tokens=5)
    with torch.inference_mode():
        assert (ours() - theirs()).abs().max() < 1e-5
    model = bench.new_transformer(SMALL)
    twin = bench.diffusers_twin(model)
    assert twin.proj_out.weight.data_ptr() == model.proj_out.weight.data_ptr()


def test_a_figure_is_the_least_of_rounds_taken_in_turn():
    order = []
    seconds = bench.fastest([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["a", "b"] * 3
    assert all(0 <= one < 1 for one in seconds)


def test_fewer_than_five_rounds_are_refused():
    with pytest.raises(ConfigError, match="rounds=4: use at least 5"):
        bench.run(print, rounds=4)


@pytest.mark.parametrize(("is_good", "status", "word"), [(True, 0, "ok"), (False, 1, "MISSED")])
def test_the_table_says_what_was_missed_and_the_exit_status_too(monkeypatch, tmp_path, is_good, status, word):
    monkeypatch.setattr(bench, "speed_rows", lambda rounds: [bench.Row("ratio", 1.5, "", "at least 1.2", is_good)])
    monkeypatch.setattr(bench, "trace_rows", lambda: [bench.Row("flops", 2.0, "TFLOP", "2", True)])
    monkeypatch.setattr(bench, "checkpoint_rows", lambda rounds: [])
    lines = []
    path = tmp_path / "bench.json"
    assert bench.run(lines.append, json_path=path) == status
    assert lines[2] == f"| ratio | 1.5 | at least 1.2 | {word} |"
    assert lines[3] == "| flops | 2 TFLOP | 2 | ok |"
    assert [row["is_good"] for row in json.loads(path.read_text())] == [is_good, True]


def test_a_per_token_forward_of_the_full_model_would_miss_the_trace(monkeypatch):
    monkeypatch.setattr(bench, "meta_transformer", lambda config: config)
    per_token = 32760 * 6 * 5120
    monkeypatch.setattr(
        bench,
        "trace_forward",
        lambda model, shape: Trace(int(1678e12), per_token, (32760, 6, 5120), "aten.add.Tensor", 32760),
    )
    rows = bench.trace_rows()
    assert [row.is_good for row in rows] == [True, False, False, False]


@pytest.mark.parametrize(("seconds", "is_good"), [(0.08, True), (0.09, False)])
def test_a_checkpoint_may_take_a_fiftieth_of_the_steps_between_two(monkeypatch, seconds, is_good):
    monkeypatch.setattr(bench, "fastest", lambda calls, rounds: [seconds])
    size, cost, *_ = bench.checkpoint_rows(5)
    assert "checkpoint of 16 MiB" in size.name
    assert cost.is_good == is_good  # ten steps of 2 x 1678 TFLOP at 7912 TFLOP/s are 4.24 s
