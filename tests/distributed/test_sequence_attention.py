"""Attention over ranks equals attention on one, on plain tensors: uneven shards, keys that drift."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pusa_dist.config import ParallelConfig
from pusa_dist.model.attention import attention_with_lse
from pusa_dist.parallel import ring
from pusa_dist.parallel.attention import SequenceAttention
from pusa_dist.parallel.mesh import lay_out
from pusa_dist.parallel.ring import merge
from pusa_dist.parallel.shard import SequenceShard, TokenLayout
from pusa_dist.parallel.ulysses import heads_to_tokens, tokens_to_heads

HEADS, HEAD_DIM = 12, 8
# (B, F, tokens of a frame): 35 divide by none of 2, 3 and 4; of 5, some ranks hold a single one.
SHAPES = [(2, 3, 35), (1, 1, 5)]

# (cfg, ring, ulysses)
DEGREES = {
    2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    3: [(1, 1, 3), (1, 3, 1)],
    4: [(1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)],
}


def drifting_inputs(batch, frames, frame_tokens):
    """Queries, keys and values (B, F, S, N, D); keys and values grow along the sequence.

    Each rank's keys then have a log-sum-exp of their own, so that a merge that ignores it is wrong.
    """
    generator = torch.Generator().manual_seed(5)
    query, key, value = torch.randn(3, batch, frames, frame_tokens, HEADS, HEAD_DIM, generator=generator)
    drift = torch.linspace(0.2, 2.0, frame_tokens).view(1, 1, -1, 1, 1)
    return query, key * drift, value * drift


def exact(qkv):
    query, key, value = (x.flatten(1, 2).transpose(1, 2).double() for x in qkv)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).unflatten(1, qkv[0].shape[1:3]).float()


def attend_on_ranks(place, degrees):
    place.join(ParallelConfig(ulysses_degree=place.world_size))
    found = []
    for cfg, outer, inner in degrees:
        mesh = lay_out(ParallelConfig(cfg_degree=cfg, ring_degree=outer, ulysses_degree=inner), "cpu", 60)
        shard = SequenceShard(mesh.get_group("ring"), mesh.get_group("ulysses"))
        found.append([attend(shard, drifting_inputs(*shape)) for shape in SHAPES])
    return found


def attend(shard, qkv):
    """Tokens of a frame on this rank, and the whole result, twice."""
    attention = SequenceAttention(shard)
    mine = [shard.split(x.flatten(3)) for x in qkv]
    outs = []
    for _ in range(2):
        out = attention(*(x.flatten(1, 2).unflatten(2, (HEADS, HEAD_DIM)) for x in mine))
        whole = shard.join(out.flatten(2).view_as(mine[0]))
        outs.append(whole.unflatten(3, (HEADS, HEAD_DIM)))
    return mine[0].shape[2], *outs


@pytest.mark.parametrize("world_size", sorted(DEGREES))
def test_every_product_of_degrees_attends_as_one_rank_does(run_ranks, world_size):
    ranks = run_ranks(world_size, attend_on_ranks, DEGREES[world_size])
    for index, degrees in enumerate(DEGREES[world_size]):
        for case, shape in enumerate(SHAPES):
            results = [rank[index][case] for rank in ranks]
            expected = exact(drifting_inputs(*shape))
            for _, once, again in results:
                assert (once - expected).abs().max() < 1e-5, f"{degrees} {shape}"
                assert torch.equal(once, again), f"{degrees} {shape} does not repeat"
                assert torch.equal(once, results[0][1]), f"{degrees} {shape}: ranks differ"
            held = [result[0] for result in results]
            assert sum(held) == shape[2] * degrees[0], f"{degrees}: ranks hold {held} tokens of a frame"
            assert max(held) - min(held) <= 1


def order_of_events(place):
    mesh = place.join(ParallelConfig(ring_degree=3))
    shard = SequenceShard(mesh.get_group("ring"), mesh.get_group("ulysses"))
    query, key, value = (shard.split(x.flatten(3)).flatten(1, 2) for x in drifting_inputs(1, 2, 7))
    query, key, value = (x.unflatten(2, (HEADS, HEAD_DIM)) for x in (query, key, value))
    events = []
    start = ring.dist.batch_isend_irecv

    def recorded_start(operations):
        events.append("send")
        return start(operations)

    def recorded_attend(q, k, v):
        events.append(f"attend {k.shape[1]}")
        return attention_with_lse(q, k, v)

    ring.dist.batch_isend_irecv = recorded_start
    ring.ring_attention(query, key, value, shard.layout.ring_lengths(), shard.ring_group, recorded_attend)
    return events


def test_a_block_is_on_its_way_before_it_is_attended_to(run_ranks):
    ranks = run_ranks(3, order_of_events)
    # 7 tokens over 3 ranks in 2 frames: blocks of 6, 4 and 4 tokens. The last block goes nowhere.
    assert ranks[0] == ["send", "attend 6", "send", "attend 4", "attend 4"]
    assert ranks[1] == ["send", "attend 4", "send", "attend 6", "attend 4"]
    assert ranks[2] == ["send", "attend 4", "send", "attend 4", "attend 6"]


def test_merging_needs_each_parts_log_sum_exp():
    query, key, value = (x.flatten(1, 2) for x in drifting_inputs(2, 3, 35))
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


class Copied(TorchDispatchMode):
    """Counts the elements that copies write."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("stack", "cat", "clone", "copy_", "_to_copy"):
            self.num_elements += out.numel()
        return out


@pytest.mark.parametrize("batch", [1, 2])
def test_ulysses_copies_no_more_than_its_messages_need(monkeypatch, batch):
    """To the heads: once into the message and once out of it; back: once out, and in only what a batch interleaves."""
    lengths, heads = (5, 5, 5), 6
    monkeypatch.setattr("torch.distributed.all_to_all_single", lambda to, sent, *_, **__: to.view(-1).set_(sent))
    monkeypatch.setattr("torch.distributed.get_rank", lambda _: 0)
    qkv = torch.randn(3, batch, 5, heads, 4)
    with Copied() as copied:
        query, _, _ = tokens_to_heads(*qkv, lengths, None)
    assert copied.num_elements == 2 * qkv.numel()
    with Copied() as copied:
        heads_to_tokens(query, lengths, None)
    assert copied.num_elements == (1 if batch == 1 else 2) * query.numel()
