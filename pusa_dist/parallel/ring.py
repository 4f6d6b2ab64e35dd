"""Ring attention: queries stay, blocks of keys and values go round.

While a rank attends to the block it holds, that block is already on its way to the next rank and
the previous rank's is arriving. Partial results are merged by their log-sum-exp in float32: in
bfloat16 its rounding alone would move a merge weight by per cents at video lengths.

Ref: Ring Attention, arXiv:2310.01889; the merge is FlashAttention's, arXiv:2205.14135.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

AttentionWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    group: ProcessGroup,
    attend: AttentionWithLse,
) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks. Collective over ``group``.

    Args:
        query: (B, S_rank, N, D); key and value likewise.
        key: see query.
        value: see query.
        lengths: tokens of each rank, ``lengths[rank] == S_rank``; they may differ.
        group: P ranks.
        attend: attention to one block, with its log-sum-exp (B, S, N) in float32, natural log.

    Returns:
        (B, S_rank, N, D) in the dtype of ``query``.
    """
    degree, rank = len(lengths), dist.get_rank(group)
    block = torch.stack((key, value))
    merged: Tensor | None = None
    lse: Tensor | None = None
    for hop in range(degree):
        arriving = _pass_on(block, lengths[(rank - hop - 1) % degree], group) if hop + 1 < degree else None
        part, part_lse = attend(query, block[0], block[1])
        if merged is None or lse is None:
            merged, lse = part.float(), part_lse
        else:
            merged, lse = merge(merged, lse, part, part_lse)
        if arriving is not None:
            block = arriving()
    assert merged is not None, "a ring has at least one rank"
    return merged.to(query.dtype)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, from the attention to each.

    Args:
        out: (B, S, N, D) float32, attention to the first set.
        lse: (B, S, N) float32, its log-sum-exp.
        part: (B, S, N, D), attention to the second set.
        part_lse: (B, S, N) float32.

    Returns:
        The same pair for both sets together, in float32.
    """
    total = torch.logaddexp(lse, part_lse)
    weight, part_weight = (lse - total).exp().unsqueeze(-1), (part_lse - total).exp().unsqueeze(-1)
    return out * weight + part.float() * part_weight, total


def _pass_on(block: Tensor, arriving_length: int, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start sending ``block`` to the next rank and receiving the previous rank's.

    Returns:
        Waits for both and returns the received block (2, B, arriving_length, N, D). It keeps
        ``block`` alive, and whoever calls this must leave it unchanged, until then.
    """
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    two, batch, _, heads, head_dim = block.shape
    received = block.new_empty(two, batch, arriving_length, heads, head_dim)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % degree),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % degree),
        ]
    )

    def wait(sent: Tensor = block) -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait
