"""Attention over ranks equals attention on one, on plain tensors: uneven shards, keys that drift."""

import pytest
import torch

from pusa_dist.config import ParallelConfig
from pusa_dist.model.attention import attention_with_lse
from pusa_dist.parallel.attention import SequenceAttention
from pusa_dist.parallel.mesh import lay_out
from pusa_dist.parallel.ring import merge
from pusa_dist.parallel.shard import SequenceShard, TokenLayout

BATCH, FRAMES, FRAME_TOKENS, HEADS, HEAD_DIM = 2, 3, 35, 12, 8

# (cfg, ring, ulysses); 35 tokens a frame divide by none of 2, 3 and 4.
DEGREES = {
    2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    3: [(1, 1, 3), (1, 3, 1)],
    4: [(1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)],
}


def drifting_inputs():
    """Queries, keys and values (B, F, S, N, D); keys and values grow along the sequence.

    Each rank's keys then have a log-sum-exp of their own, so that a merge that ignores it is wrong.
    """
    generator = torch.Generator().manual_seed(5)
    query, key, value = torch.randn(3, BATCH, FRAMES, FRAME_TOKENS, HEADS, HEAD_DIM, generator=generator)
    drift = torch.linspace(0.2, 2.0, FRAME_TOKENS).view(1, 1, -1, 1, 1)
    return query, key * drift, value * drift


def exact(qkv):
    query, key, value = (x.flatten(1, 2).transpose(1, 2).double() for x in qkv)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).unflatten(1, (FRAMES, FRAME_TOKENS)).float()


def attend_on_ranks(place, degrees):
    qkv = drifting_inputs()
    place.join(ParallelConfig(cfg_degree=1, ring_degree=1, ulysses_degree=place.world_size))
    found = []
    for cfg, ring, ulysses in degrees:
        mesh = lay_out(ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses), "cpu", 60)
        shard = SequenceShard(mesh.get_group("ring"), mesh.get_group("ulysses"))
        attention = SequenceAttention(shard)
        query, key, value = (shard.split(x.flatten(3)).unflatten(3, (HEADS, HEAD_DIM)) for x in qkv)
        outs = []
        for _ in range(2):
            out = attention(*(x.flatten(1, 2) for x in (query, key, value)))
            whole = shard.join(out.unflatten(1, (FRAMES, -1)).flatten(3))
            outs.append(whole.unflatten(3, (HEADS, HEAD_DIM)))
        found.append((query.shape[2], outs))
    return found


@pytest.mark.parametrize("world_size", sorted(DEGREES))
def test_every_product_of_degrees_attends_as_one_rank_does(run_ranks, world_size):
    expected = exact(drifting_inputs())
    degrees = DEGREES[world_size]
    ranks = run_ranks(world_size, attend_on_ranks, degrees)
    for index, degree in enumerate(degrees):
        for rank, results in enumerate(ranks):
            _, (once, again) = results[index]
            assert (once - expected).abs().max() < 1e-5, f"{degree} on rank {rank}"
            assert torch.equal(once, again), f"{degree} on rank {rank} does not repeat"
            assert torch.equal(once, ranks[0][index][1][0]), f"{degree}: rank {rank} differs from rank 0"
        held = [results[index][0] for results in ranks]
        assert sum(held) == FRAME_TOKENS * degree[0], f"{degree}: ranks hold {held} tokens of a frame"
        assert max(held) - min(held) <= 1


def test_merging_needs_each_parts_log_sum_exp():
    query, key, value = (x.flatten(1, 2) for x in drifting_inputs())
    parts = [
        attention_with_lse(query, k, v) for k, v in zip(key.split([40, 65], 1), value.split([40, 65], 1), strict=True)
    ]
    (out, lse), (part, part_lse) = parts
    expected = attention_with_lse(query, key, value)
    merged, total = merge(out, lse, part, part_lse)
    assert (merged - expected[0]).abs().max() < 1e-5
    assert (total - expected[1]).abs().max() < 1e-5
    plain, _ = merge(out, torch.zeros_like(lse), part, torch.zeros_like(lse))
    assert (plain - expected[0]).abs().max() > 0.1


def test_a_layout_knows_what_every_rank_holds():
    layout = TokenLayout(num_frames=2, sizes=(3, 3, 2, 2), ulysses_degree=2)
    assert layout.ulysses_lengths(0) == (6, 6)
    assert layout.ulysses_lengths(1) == (4, 4)
    assert layout.ring_lengths() == (12, 8)
    assert not layout.is_even
