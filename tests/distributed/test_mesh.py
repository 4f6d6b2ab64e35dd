"""Ranks meet, know their neighbours, and refuse degrees that cannot work."""

import pytest
import torch
import torch.distributed as dist

from pusa_dist.config import ParallelConfig, TransformerConfig, load_model_config
from pusa_dist.errors import ConfigError, GangError, RequestError
from pusa_dist.model.transformer import new_transformer
from pusa_dist.parallel.apply import parallelize
from pusa_dist.parallel.mesh import AXES, check_world, free_port, join_gang, lay_out, leave_gang, num_ranks_here
from pusa_dist.parallel.shard import SequenceShard
from pusa_dist.request import RequestParams, check_request, resolve_request


def tiny_transformer(heads=4):
    config = TransformerConfig(
        num_layers=1, num_attention_heads=heads, attention_head_dim=8, ffn_dim=8, text_dim=8, freq_dim=8
    )
    return new_transformer(config).requires_grad_(False)


def neighbours(place):
    mesh = place.join(ParallelConfig(cfg_degree=2, ring_degree=2))
    ranks = {axis: dist.get_process_group_ranks(mesh.get_group(axis)) for axis in AXES}
    assert num_ranks_here() == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "ab"[place.rank == 3])
        assert num_ranks_here() == (1 if place.rank == 3 else 3)
    second = lay_out(ParallelConfig(cfg_degree=2, ulysses_degree=2), "cpu", 60)
    ranks["inner"] = dist.get_process_group_ranks(second.get_group("ulysses"))
    with pytest.raises(GangError, match="already a rank"):
        place.join(ParallelConfig(cfg_degree=2, ring_degree=2))
    four = lay_out(ParallelConfig(ulysses_degree=4), "cpu", 60)
    with pytest.raises(ConfigError, match="ulysses_degree=4 does not divide num_attention_heads=6; use one of 1, 2, 3"):
        parallelize(tiny_transformer(heads=6), four)
    with pytest.raises(ConfigError, match="a frame of 3 tokens cannot be shared"):
        SequenceShard(four.get_group("ring"), four.get_group("ulysses")).split(torch.zeros(1, 2, 3, 1))
    with pytest.raises(ConfigError, match="attention='flash': use ours or xfuser"):
        parallelize(tiny_transformer(), four, attention="flash")
    return ranks


def test_ranks_are_ordered_cfg_then_ring_then_ulysses(run_ranks):
    ranks = run_ranks(4, neighbours)
    assert [found["cfg"] for found in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [found["ring"] for found in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [found["ulysses"] for found in ranks] == [[0], [1], [2], [3]]
    assert [found["inner"] for found in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def dies(place):
    place.join(ParallelConfig(ring_degree=2), timeout_s=20)
    if place.rank == 1:
        raise ValueError("rank 1 fell over")
    dist.barrier()


def test_a_failing_rank_is_reported_with_its_own_words(run_ranks):
    with pytest.raises(AssertionError, match="rank 1 fell over"):
        run_ranks(2, dies)


def test_a_rank_that_waits_in_vain_says_for_whom():
    with pytest.raises(GangError, match=r"rank 0 could not meet the other ranks of 2 at 127\.0\.0\.1:\d+ within 1"):
        join_gang(0, 2, "127.0.0.1", free_port(), ParallelConfig(ring_degree=2), "cpu", timeout_s=1)
    assert not dist.is_initialized()
    leave_gang()


def test_the_world_must_be_the_product_of_the_degrees():
    with pytest.raises(ConfigError, match="needs 4 ranks, but world_size=3; start 4 ranks"):
        check_world(0, 3, ParallelConfig(cfg_degree=2, ring_degree=2))
    with pytest.raises(ConfigError, match="rank=2: use 0 to 1"):
        check_world(2, 2, ParallelConfig(ring_degree=2))
    check_world(1, 2, ParallelConfig(ring_degree=2))


@pytest.mark.parametrize(
    ("degrees", "named"),
    [
        ({"ulysses_degree": 3}, "use one of 1, 2, 4"),
        ({"ring_degree": 7, "ulysses_degree": 8}, "does not divide"),
        ({"ring_degree": 49}, "use at most 48"),
    ],
)
def test_degrees_that_do_not_fit_the_model_name_those_that_do(degrees, named):
    with pytest.raises(ConfigError, match=named):
        ParallelConfig(**degrees).check(load_model_config("debug"))


def test_a_frame_needs_a_token_for_every_rank():
    model = load_model_config("debug")
    small = resolve_request(RequestParams(prompt="a dot", seed=0, width=32, height=16), [], model)
    check_request(ParallelConfig(ring_degree=2), small)
    with pytest.raises(RequestError, match="a frame has 2 tokens and 3 ranks share it") as caught:
        check_request(ParallelConfig(ring_degree=3), small)
    assert (caught.value.param, caught.value.code) == ("size", "size_too_small")
