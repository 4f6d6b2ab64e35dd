"""Ulysses: trade a slice of the tokens of all heads for all tokens of a slice of the heads.

Attention is independent per head, so after one all-to-all every rank attends over the whole
sequence for its heads, and a second all-to-all brings the tokens home. Ranks may hold different
numbers of tokens; only the heads must divide.

Ref: DeepSpeed Ulysses, arXiv:2309.14509.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def tokens_to_heads(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of this rank's heads. Collective over ``group``.

    Args:
        query: (B, S_rank, N, D); key and value likewise.
        key: see query.
        value: see query.
        lengths: tokens of each rank, ``lengths[rank] == S_rank``.
        group: P ranks; P must divide N.

    Returns:
        Three tensors (B, S, N/P, D) with S = sum(lengths), tokens in rank order.
    """
    degree = len(lengths)
    if degree == 1:
        return query, key, value
    batch, mine, num_heads, head_dim = query.shape
    heads = num_heads // degree
    # One message for q, k and v, in one copy: three (P, B, S_rank, N/P, D) -> (P, 3, B, S_rank, N/P, D)
    packed = torch.stack([x.unflatten(2, (degree, heads)).movedim(2, 0) for x in (query, key, value)], dim=1)
    per_token = 3 * batch * heads * head_dim
    received = _exchange(packed, [per_token * mine] * degree, [per_token * length for length in lengths], group)
    parts = [part.view(3, batch, -1, heads, head_dim) for part in received]
    whole = torch.cat(parts, dim=2)
    return whole[0], whole[1], whole[2]


def heads_to_tokens(out: Tensor, lengths: Sequence[int], group: ProcessGroup) -> Tensor:
    """This rank's tokens of all heads: the inverse of ``tokens_to_heads``. Collective over ``group``.

    Args:
        out: (B, S, N/P, D).
        lengths: tokens of each rank; they sum to S.
        group: P ranks.

    Returns:
        (B, S_rank, N, D); not contiguous in a batch.
    """
    degree = len(lengths)
    if degree == 1:
        return out
    batch, _, heads, head_dim = out.shape
    mine = lengths[dist.get_rank(group)]
    per_token = batch * heads * head_dim
    # Tokens before samples: what each rank gets is then in one piece, of a single sample without a copy.
    packed = out.transpose(0, 1).contiguous()
    received = _exchange(packed, [per_token * length for length in lengths], [per_token * mine] * degree, group)
    # P x (S_rank, B, N/P, D) -> (B, S_rank, N, D)
    return torch.cat([part.view(mine, batch, heads, head_dim) for part in received], dim=2).transpose(0, 1)


def _exchange(packed: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> tuple[Tensor, ...]:
    buffer = packed.new_empty(sum(received))
    dist.all_to_all_single(buffer, packed.view(-1), received, sent, group=group)
    return buffer.split(received)
