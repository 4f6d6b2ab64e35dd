"""Attention over a sequence that is spread over ranks: Ulysses, ring, and their product."""

import torch.distributed as dist
from torch import Tensor

from pusa_dist.model.attention import attention_with_lse, local_attention
from pusa_dist.parallel.ring import ring_attention
from pusa_dist.parallel.shard import SequenceShard
from pusa_dist.parallel.ulysses import heads_to_tokens, tokens_to_heads


class SequenceAttention:
    """The model's ``AttentionFn`` on a mesh: heads are exchanged inside, K/V go round outside.

    Args:
        shard: knows the groups and, during a forward, how many tokens each rank holds.
    """

    def __init__(self, shard: SequenceShard) -> None:
        self.shard = shard

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's queries to the whole sequence. Collective over both sequence axes.

        Args:
            query: (B, S_rank, N, D); key and value likewise.
            key: see query.
            value: see query.

        Returns:
            (B, S_rank, N, D).
        """
        shard = self.shard
        lengths = shard.layout.ulysses_lengths(shard.ring_rank)
        assert query.shape[1] == lengths[shard.ulysses_rank], "tokens do not match the layout of this forward"
        query, key, value = tokens_to_heads(query, key, value, lengths, shard.ulysses_group)
        if dist.get_world_size(shard.ring_group) == 1:
            out = local_attention(query, key, value)
        else:
            out = ring_attention(query, key, value, shard.layout.ring_lengths(), shard.ring_group, attention_with_lse)
        return heads_to_tokens(out, lengths, shard.ulysses_group)
