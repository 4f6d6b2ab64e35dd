"""Attention over whole sequences: what runs on one device, and the seam that parallelism replaces.

Tensors are (B, S, N, D): batch, tokens, heads, head dim. No mask, no dropout, scale ``D ** -0.5``.
"""

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value, each (B, S, N, D), to the attended values, (B, S, N, D)."""


def local_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention on this device, by diffusers' attention backend: ``DIFFUSERS_ATTN_BACKEND``, or PyTorch's choice.

    Args:
        query: (B, S, N, D).
        key: (B, L, N, D); L may differ from S.
        value: (B, L, N, D).
    """
    return dispatch_attention_fn(query, key, value)


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention together with what is needed to merge it with attention over other keys.

    Args:
        query: (B, S, N, D).
        key: (B, L, N, D).
        value: (B, L, N, D).

    Returns:
        The attended values (B, S, N, D), and the natural logarithm of the sum of the exponentiated
        scaled scores, (B, S, N) float32.
    """
    heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]  # (B, N, S, D)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[:2]
    else:  # the flash kernels of CUDA take half precision only
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(*heads_first, None, True)[:2]
    # The efficient kernel pads the queries of its log-sum-exp.
    lse = lse[..., : query.shape[1]].float()
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()
