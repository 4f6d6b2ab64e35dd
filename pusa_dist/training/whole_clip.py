"""The VAE over whole clips at once, with gradients.

Inference goes chunk by chunk and keeps caches (``pusa_dist.model.vae``). Every layer being causal, the
same numbers come out of one pass over the whole clip: what the caches hold is what stands before a chunk,
and zeros before the first. Only the two layers that change the frame rate treat the first frame apart.
One pass has larger kernels and a graph to differentiate, so training uses this one; a test holds the two equal.

Letters as in ``pusa_dist.model.vae``: B, C, F latent frames, T = 4 (F - 1) + 1 pixel frames.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn


def encode_moments(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance, (B, C, F, h, w) each and not normalised, of a clip (B, 3, T, H, W) in [-1, 1]."""
    encoder: Any = vae.encoder
    x = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        x = _halve_rate(layer, x) if isinstance(layer, WanResample) else _residual(layer, x)
    x = encoder.conv_out(_norm_silu(encoder.norm_out, _middle(encoder.mid_block, x)))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames (B, 3, T, H, W) of latents that are not normalised; not clamped, which would stop gradients."""
    decoder: Any = vae.decoder
    x = _middle(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x)
        for layer in block.upsamplers or ():
            x = _double_rate(layer, x)
    frames: Tensor = decoder.conv_out(_norm_silu(decoder.norm_out, x))
    return frames


def _middle(block: Any, x: Tensor) -> Tensor:
    first, *others = block.resnets
    x = _residual(first, x)
    for attention, resnet in zip(block.attentions, others, strict=True):
        x = _residual(resnet, attention(x))
    return x


def _residual(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, WanResidualBlock)
    inner = block.conv1(_norm_silu(block.norm1, x))
    return block.conv2(_norm_silu(block.norm2, inner)) + block.conv_shortcut(x)


def _halve_rate(layer: WanResample, x: Tensor) -> Tensor:
    x = _each_frame(layer.resample, x)
    if layer.mode != "downsample3d" or x.shape[2] == 1:
        return x
    # The first frame is kept; each later output sees the last frame before its pair.
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)


def _double_rate(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        # The first frame is kept and unseen by the others, of which each becomes two.
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, F - 1, h, w)
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    return _each_frame(layer.resample, x)


def _each_frame(network: nn.Module, x: Tensor) -> Tensor:
    frames = network(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _norm_silu(norm: WanRMS_norm, x: Tensor) -> Tensor:
    out: Tensor = _NormSilu.apply(x, norm.gamma)  # type: ignore[no-untyped-call]
    return out


class _NormSilu(torch.autograd.Function):
    """SiLU of the channel norm, in a third of the memory traffic of the layers one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        """``x`` (B, C, ...) scaled to root mean square 1 over its channels, times ``gamma``, through SiLU."""
        mean_square = x.square().sum(1, keepdim=True, dtype=torch.float32) / x.shape[1]
        scale = mean_square.clamp_min(1e-24).rsqrt().to(x.dtype)
        normed = x * scale
        gamma = gamma.to(x.dtype)
        ctx.save_for_backward(normed, scale, gamma)
        return nn.functional.silu(normed * gamma, inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``gamma``."""
        normed, scale, gamma = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad, normed * gamma)
        along = grad * normed
        grad_gamma = along.sum((0, *range(2, grad.dim())), dtype=torch.float32).view_as(gamma)
        along.mul_(gamma)
        share = along.sum(1, keepdim=True, dtype=torch.float32).div_(grad.shape[1]).to(grad.dtype)
        grad = grad * gamma
        return grad.addcmul_(normed, share, value=-1).mul_(scale), grad_gamma
