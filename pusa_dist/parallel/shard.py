"""Which tokens a rank holds: every frame of a slice of space.

Tokens are ordered (frame, space). Cutting space, not time, keeps all frames on every rank, so the
per-frame modulation broadcasts over a rank's tokens as it does over whole frames. Slices differ by
at most one token per frame; nothing is padded, because attention would attend to padding.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pusa_dist.errors import ConfigError
from pusa_dist.geometry import shard_sizes


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where the tokens of one forward are.

    Attributes:
        num_frames: F.
        sizes: tokens of a frame per sequence rank; sequence rank = ring rank * ulysses_degree + ulysses rank.
        ulysses_degree: ranks of the inner axis.
    """

    num_frames: int
    sizes: tuple[int, ...]
    ulysses_degree: int

    @property
    def is_even(self) -> bool:
        """Whether every rank holds equally many tokens."""
        return len(set(self.sizes)) == 1

    def ulysses_lengths(self, ring_rank: int) -> tuple[int, ...]:
        """Tokens (all frames) of each rank in the ulysses group at ``ring_rank``."""
        start = ring_rank * self.ulysses_degree
        return tuple(self.num_frames * size for size in self.sizes[start : start + self.ulysses_degree])

    def ring_lengths(self) -> tuple[int, ...]:
        """Tokens each ring position holds together: the lengths of the K/V blocks that go round."""
        return tuple(sum(self.ulysses_lengths(rank)) for rank in range(len(self.sizes) // self.ulysses_degree))


class SequenceShard:
    """This rank's slice of every frame: the model's ``TokenShard`` on a mesh.

    It remembers the layout of the forward that is running, from ``split`` at its start, because
    attention sees only this rank's tokens and must know how many the others have.

    Args:
        ring_group: outer sequence axis.
        ulysses_group: inner sequence axis.
    """

    def __init__(self, ring_group: ProcessGroup, ulysses_group: ProcessGroup) -> None:
        self.ring_group = ring_group
        self.ulysses_group = ulysses_group
        self.ring_rank = dist.get_rank(ring_group)
        self.ulysses_rank = dist.get_rank(ulysses_group)
        self.ulysses_degree = dist.get_world_size(ulysses_group)
        self.degree = dist.get_world_size(ring_group) * self.ulysses_degree
        self.rank = self.ring_rank * self.ulysses_degree + self.ulysses_rank
        self.layout = TokenLayout(0, (0,) * self.degree, self.ulysses_degree)

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's tokens of every frame, as a view.

        Args:
            tokens: (B, F, S_frame, X).

        Returns:
            (B, F, S_rank, X).

        Raises:
            ConfigError: a frame has fewer tokens than there are ranks to share them.
        """
        num_frames, frame_tokens = tokens.shape[1:3]
        if frame_tokens < self.degree:
            raise ConfigError(
                f"a frame of {frame_tokens} tokens cannot be shared by ring_degree * ulysses_degree = {self.degree} "
                f"ranks; use at most {frame_tokens}, or larger frames"
            )
        sizes = shard_sizes(frame_tokens, self.degree)
        self.layout = TokenLayout(num_frames, sizes, self.ulysses_degree)
        return tokens.narrow(2, sum(sizes[: self.rank]), sizes[self.rank])

    def join(self, tokens: Tensor) -> Tensor:
        """Whole frames again, equal on every rank. Collective over both sequence axes.

        Args:
            tokens: (B, F, S_rank, X), this rank's part.

        Returns:
            (B, F, S_frame, X).
        """
        num_frames = self.layout.num_frames
        row = [length // num_frames for length in self.layout.ulysses_lengths(self.ring_rank)]
        rows = [length // num_frames for length in self.layout.ring_lengths()]
        return all_gather_tokens(all_gather_tokens(tokens, row, self.ulysses_group), rows, self.ring_group)


def all_gather_tokens(tokens: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
    """Concatenate every rank's tokens along dim 2, in rank order. Collective over ``group``.

    Args:
        tokens: (B, F, sizes[rank], X).
        sizes: tokens of each rank; they may differ, which gloo's all_gather cannot do but its
            all-to-all can.
        group: the ranks.

    Returns:
        (B, F, sum(sizes), X).
    """
    if len(sizes) == 1:
        return tokens
    batch, num_frames, mine, width = tokens.shape
    per_token = batch * num_frames * width
    sent = tokens.reshape(-1).repeat(len(sizes))
    received = tokens.new_empty(per_token * sum(sizes))
    dist.all_to_all_single(
        received, sent, [per_token * size for size in sizes], [per_token * mine] * len(sizes), group=group
    )
    parts = received.split([per_token * size for size in sizes])
    return torch.cat(
        [part.view(batch, num_frames, size, width) for part, size in zip(parts, sizes, strict=True)], dim=2
    )
