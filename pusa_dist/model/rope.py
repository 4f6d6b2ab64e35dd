"""Rotary embedding over (frame, row, column), as a table of unit complex numbers.

A head's D channels are D/2 interleaved pairs: the first pairs turn with the frame index, the next
with the row, the last with the column. Angles are computed in float64 and rounded once, in float32
whatever the model's dtype.
"""

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode the frame, the row and the column: 128 -> 44, 42, 42."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rotary_table(head_dim: int, frames: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Rotation of every token of a clip.

    Args:
        head_dim: D.
        frames: F.
        rows: tokens of a frame's column.
        columns: tokens of a frame's row.
        device: where the table is made.

    Returns:
        (1, F, rows * columns, D / 2) complex64.
    """
    grid = (frames, rows, columns)
    parts = []
    for axis, (dim, length) in enumerate(zip(axis_dims(head_dim), grid, strict=True)):
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        parts.append(_axis_rotation(dim, length, device).view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(1, 2).unsqueeze(0)


def _axis_rotation(dim: int, length: int, device: torch.device) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), THETA**-exponent)
    return torch.complex(angle.cos(), angle.sin()).to(torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of queries or keys.

    Args:
        x: (B, S, N, D).
        table: (1, S, 1, D / 2) complex64.

    Returns:
        (B, S, N, D) in the dtype of ``x``, rounded once.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
