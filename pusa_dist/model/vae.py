"""Video frames to latents and back, one causal chunk at a time.

The layers are those of diffusers' ``AutoencoderKLWan``; the loop over time is ours. Pixel frame 0 is
a chunk of its own, every four further frames are the next one, and a causal convolution needs of the
past only the two frames its cache holds. Here the caches belong to the call, not to the module, so a
decode can be paused, frames of it used, and other encodes and decodes run on the same module meanwhile.
Tiles, if asked for, are inside a chunk: the first frames exist before the second latent is touched.

Letters: B batch, C latent channels, F latent frames, h w latent size, T pixel frames, H W pixel size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from torch import Tensor, nn

from pusa_dist.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE

Size = tuple[int, int]


def encode(vae: AutoencoderKLWan, video: Tensor, tile: Size | None = None, tile_stride: Size | None = None) -> Tensor:
    """Latents of a clip: the mean of the distribution, normalised per channel.

    Args:
        vae: the autoencoder; nothing is kept in it.
        video: (B, 3, T, H, W) in [-1, 1]. Frames past the last 4k+1 make no latent.
        tile: (height, width) of a tile in latent cells; None encodes whole frames.
        tile_stride: distance between tiles in latent cells.

    Returns:
        (B, C, F, h, w) in the dtype of ``video``. The first n latents do not depend on later frames.
    """
    stop = video.shape[2] - (video.shape[2] - 1) % TEMPORAL_STRIDE
    bounds = [0, *range(1, stop + 1, TEMPORAL_STRIDE)]
    chunks = (video[:, :, start:end] for start, end in pairwise(bounds))
    return torch.cat(list(encode_chunks(vae, chunks, tile, tile_stride)), dim=2)


@torch.no_grad()
def encode_chunks(
    vae: AutoencoderKLWan, chunks: Iterable[Tensor], tile: Size | None = None, tile_stride: Size | None = None
) -> Iterator[Tensor]:
    """Latent frames (B, C, 1, h, w) of a clip given as chunks (B, 3, 1, H, W), then (B, 3, 4, H, W) each."""
    causal: _TiledPass | None = None
    for chunk in chunks:
        height, width = (side // SPATIAL_STRIDE for side in chunk.shape[-2:])
        causal = causal or _TiledPass(vae.encoder, (height, width), tile, tile_stride, SPATIAL_STRIDE, 1)
        moments = vae.quant_conv(causal(chunk))
        mean, inverse_std = _statistics(vae, moments)
        yield (moments.chunk(2, dim=1)[0] - mean) * inverse_std


@torch.no_grad()
def decode_chunks(
    vae: AutoencoderKLWan, latents: Tensor, tile: Size | None = None, tile_stride: Size | None = None
) -> Iterator[Tensor]:
    """Pixel frames of normalised latents, as soon as each latent frame is decoded.

    Args:
        vae: the autoencoder; nothing is kept in it, so several of these may be consumed in turns.
        latents: (B, C, F, h, w), normalised.
        tile: (height, width) of a tile in latent cells; None decodes whole frames.
        tile_stride: distance between tiles in latent cells; tiles overlap and are blended linearly.

    Yields:
        (B, 3, 1, H, W) for the first latent frame, then (B, 3, 4, H, W) each, clamped to [-1, 1].
    """
    causal = _TiledPass(vae.decoder, (latents.shape[-2], latents.shape[-1]), tile, tile_stride, 1, SPATIAL_STRIDE)
    mean, inverse_std = _statistics(vae, latents)
    for frame in latents.split(1, dim=2):
        yield causal(vae.post_quant_conv(frame / inverse_std + mean)).clamp_(-1.0, 1.0)


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    # The reciprocal is rounded to the activations' dtype, as in Pusa: dividing by it is not the same as
    # multiplying by the standard deviation.
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config["latents_mean"]).to(like).view(shape)
    inverse_std = (1.0 / torch.tensor(vae.config["latents_std"])).to(like).view(shape)
    return mean, inverse_std


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of latent cells, and how far its edges fade into its neighbours."""

    top: int
    bottom: int
    left: int
    right: int
    fade: tuple[int, int, int, int]
    """Cells over which the top, bottom, left and right edge fade; 0 at the edge of the frame."""

    def cut(self, x: Tensor, scale: int) -> Tensor:
        """This rectangle of a tensor with ``scale`` elements per latent cell."""
        rows = slice(self.top * scale, self.bottom * scale)
        return x[..., rows, slice(self.left * scale, self.right * scale)]

    def weight(self, scale: int) -> Tensor:
        """Blend weights (rows, columns): linear ramps, the lower of the two directions."""
        top, bottom, left, right = (length * scale for length in self.fade)
        rows = _ramp((self.bottom - self.top) * scale, top, bottom)
        columns = _ramp((self.right - self.left) * scale, left, right)
        return torch.minimum(rows[:, None], columns[None, :])


def tiles_of(size: Size, tile: Size | None, tile_stride: Size | None) -> list[Tile]:
    """Cover a frame of ``size`` latent cells; one tile without fading if ``tile`` is None or holds it all."""
    if tile is None:
        return [Tile(0, size[0], 0, size[1], (0, 0, 0, 0))]
    assert tile_stride is not None, "VaeConfig sees to it"
    rows, columns = (_spans(*each) for each in zip(size, tile, tile_stride, strict=True))
    return [Tile(r[0], r[1], c[0], c[1], (r[2], r[3], c[2], c[3])) for r in rows for c in columns]


def _spans(size: int, tile: int, stride: int) -> list[tuple[int, int, int, int]]:
    # (start, end, fade at start, fade at end); a span is left out when the one before reached the edge.
    starts = [s for s in range(0, size, stride) if s == 0 or s - stride + tile < size]
    fade = tile - stride
    return [(s, min(s + tile, size), fade if s else 0, fade if s + tile < size else 0) for s in starts]


def _ramp(length: int, rise: int, fall: int) -> Tensor:
    weight = torch.ones(length)
    up, down = min(rise, length), min(fall, length)
    if up:
        weight[:up] = (torch.arange(up) + 1) / rise
    if down:
        weight[-down:] = torch.minimum(weight[-down:], ((torch.arange(down) + 1) / fall).flip(0))
    return weight


class _CausalPass:
    """One run of the encoder or decoder over the chunks of one clip; owns that run's caches."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._caches: list[Tensor | str | None] = [None] * _num_causal_convolutions(network)

    def __call__(self, chunk: Tensor) -> Tensor:
        # The network replaces the entries of the list; the index list is its cursor and starts anew.
        out: Tensor = self._network(chunk, feat_cache=self._caches, feat_idx=[0])
        return out


def _num_causal_convolutions(network: nn.Module) -> int:
    return sum(isinstance(module, WanCausalConv3d) for module in network.modules())


class _TiledPass:
    """A causal pass per tile, blended within every chunk."""

    def __init__(
        self, network: nn.Module, size: Size, tile: Size | None, stride: Size | None, scale_in: int, scale_out: int
    ) -> None:
        self._tiles = tiles_of(size, tile, stride)
        self._passes: list[Callable[[Tensor], Tensor]] = [_CausalPass(network) for _ in self._tiles]
        self._scale_in, self._scale_out = scale_in, scale_out
        self._size = size

    def __call__(self, chunk: Tensor) -> Tensor:
        if len(self._tiles) == 1:
            return self._passes[0](chunk)
        total: Tensor | None = None
        weights = chunk.new_zeros([side * self._scale_out for side in self._size])
        for tile, causal in zip(self._tiles, self._passes, strict=True):
            part = causal(tile.cut(chunk, self._scale_in))
            weight = tile.weight(self._scale_out).to(part)
            if total is None:
                total = part.new_zeros([*part.shape[:3], *weights.shape])
            tile.cut(total, self._scale_out).add_(part * weight)
            tile.cut(weights, self._scale_out).add_(weight)
        assert total is not None  # a frame has at least one tile
        return total.div_(weights)
