"""Wan's diffusion transformer with one timestep per latent frame.

Parameters, their names and the loaders are diffusers' ``WanTransformer3DModel``; the forward is ours.
Tokens stay laid out as (B, F, S, E), frame by frame, so that what depends on a frame's timestep is
computed once per frame, (B, F, 6, E), and broadcast over the frame's tokens: diffusers, given a
timestep per token, computes and stores it for each of them.

The module knows of one device. Two attributes are all that parallelism replaces: ``attention`` and
``token_shard`` (``pusa_dist.parallel``).
"""

import functools
import math
from typing import Any, Protocol

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn

from pusa_dist.config import TransformerConfig
from pusa_dist.geometry import PATCH
from pusa_dist.model.attention import AttentionFn, local_attention
from pusa_dist.model.rope import rotary_table, rotate


class TokenShard(Protocol):
    """Which of every frame's tokens this rank holds."""

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's part: (B, F, S_frame, X) -> (B, F, S_rank, X)."""
        ...

    def join(self, tokens: Tensor) -> Tensor:
        """Every rank's parts on every rank: (B, F, S_rank, X) -> (B, F, S_frame, X)."""
        ...


class WholeFrames:
    """One rank holds every token."""

    def split(self, tokens: Tensor) -> Tensor:
        """Return the tokens unchanged."""
        return tokens

    def join(self, tokens: Tensor) -> Tensor:
        """Return the tokens unchanged."""
        return tokens


class VectorTimestepBlock(WanTransformerBlock):
    """A block whose tokens are laid out (B, F, S, E) and modulated per frame."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor, modulation: Tensor, rotary: Tensor, attention: AttentionFn
    ) -> Tensor:
        """Self-attention over all frames, cross-attention to the text, feed-forward.

        Args:
            hidden_states: (B, F, S, E).
            context: (B, L, E), the embedded text.
            modulation: (B, F, 6, E), the projected time embedding.
            rotary: (1, F * S, 1, D / 2) complex64.
            attention: runs the self-attention.

        Returns:
            (B, F, S, E).
        """
        table = self.scale_shift_table.float() + modulation.float()  # (B, F, 6, E)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = table.unsqueeze(3).unbind(2)  # (B, F, 1, E)

        normed = _modulate(self.norm1, hidden_states, shift_sa, scale_sa)
        attended = _self_attention(self.attn1, normed.flatten(1, 2), rotary, attention)
        hidden_states = _add_gated(hidden_states, attended.view_as(hidden_states), gate_sa)

        normed = self.norm2(hidden_states).flatten(1, 2)
        attended = _cross_attention(self.attn2, normed, context)
        hidden_states = hidden_states + attended.view_as(hidden_states)

        normed = _modulate(self.norm3, hidden_states, shift_ff, scale_ff)
        return _add_gated(hidden_states, self.ffn(normed), gate_ff)


class VectorTimestepTransformer(WanTransformer3DModel):
    """The transformer: latents, a timestep per latent frame and a text embedding to a velocity.

    Attributes:
        attention: runs every block's self-attention; replaced to run it over several ranks.
        token_shard: which tokens of a frame this rank holds; replaced likewise.
    """

    # The decorated signature is what diffusers' configuration machinery reads.
    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.__class__ = VectorTimestepBlock  # the same parameters under another forward
        del self.rope  # its tables are not part of a checkpoint; ours are made per forward, in float64
        self.attention: AttentionFn = local_attention
        self.token_shard: TokenShard = WholeFrames()

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Velocity (noise minus data) of the latents.

        Collective over the sequence ranks when the model is parallelized.

        Args:
            latents: (B, C, F, H, W), any float dtype; H and W are even.
            timestep: (B, F) float32 in 0..1000, one for each latent frame of each sample.
            context: (B, L, text_dim), the encoded prompt.

        Returns:
            (B, C, F, H, W) in the dtype of the weights.
        """
        dtype = self.proj_out.weight.dtype
        frames, height, width = latents.shape[2:]
        rows, columns = height // PATCH, width // PATCH

        hidden_states = self.embed_patches(latents.to(dtype))
        temb, modulation = self.embed_time(timestep)
        context = self.condition_embedder.text_embedder(context.to(dtype))
        table = rotary_table(self.config["attention_head_dim"], frames, rows, columns, latents.device)
        rotary = self.token_shard.split(table).flatten(1, 2).unsqueeze(2)  # (1, F * S, 1, D / 2)

        for block in self.blocks:
            hidden_states = block(hidden_states, context, modulation, rotary, self.attention)

        patches = self.token_shard.join(self.project_out(hidden_states, temb))
        return join_patches(patches, rows, columns)

    def embed_patches(self, latents: Tensor) -> Tensor:
        """Embed this rank's 1x2x2 patches: (B, C, F, H, W) -> (B, F, S_rank, E)."""
        # Convolving with a stride of the kernel's size is a linear map of each patch. Cutting before
        # embedding lets a rank embed its own patches only.
        weight = self.patch_embedding.weight.flatten(1)  # (E, C * 4)
        return nn.functional.linear(self.token_shard.split(cut_patches(latents)), weight, self.patch_embedding.bias)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Embed one timestep per frame: (B, F) -> (B, F, E) and its projection (B, F, 6, E)."""
        embedder = self.condition_embedder
        waves = sinusoid(timestep, self.config["freq_dim"]).to(embedder.time_embedder.linear_1.weight.dtype)
        temb = embedder.time_embedder(waves).to(embedder.time_proj.weight.dtype)
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))

    def project_out(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Output patches of this rank's tokens: (B, F, S_rank, E) -> (B, F, S_rank, 4 * C)."""
        table = self.scale_shift_table.float() + temb.float().unsqueeze(2)  # (B, F, 2, E)
        shift, scale = table.unsqueeze(3).unbind(2)
        return self.proj_out(_modulate(self.norm_out, hidden_states, shift, scale))


def new_transformer(config: TransformerConfig) -> VectorTimestepTransformer:
    """A transformer of the given shape, on the default device (``torch.device("meta")`` included)."""
    return VectorTimestepTransformer(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of the timestep at ``dim / 2`` wavelengths: (B, F) -> (B, F, dim) float64."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) * (-math.log(10000.0) / half)
    angle = timestep.double().unsqueeze(-1) * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def cut_patches(latents: Tensor) -> Tensor:
    """Latents to the 1x2x2 patches of every frame: (B, C, F, H, W) -> (B, F, H/2 * W/2, C * 4)."""
    patches = latents.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # (B, C, F, h, 2, w, 2)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def join_patches(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Output patches to latents: (B, F, rows * columns, 4 * C) -> (B, C, F, rows * 2, columns * 2)."""
    grid = patches.unflatten(3, (PATCH, PATCH, -1)).unflatten(2, (rows, columns))  # (B, F, h, w, 2, 2, C)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def _modulate(norm: nn.Module, hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # Statistics and modulation in float32, one rounding, as diffusers does.
    return torch.addcmul(shift, norm(hidden_states.float()), 1 + scale).to(hidden_states.dtype)


def _add_gated(hidden_states: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(hidden_states, update, gate).to(hidden_states.dtype)  # in float32, as the gate is


def _self_attention(layer: WanAttention, x: Tensor, rotary: Tensor, attention: AttentionFn) -> Tensor:
    heads = (layer.heads, -1)
    # The norms run over the whole width, before it is split into heads.
    query = rotate(layer.norm_q(layer.to_q(x)).unflatten(2, heads), rotary)
    key = rotate(layer.norm_k(layer.to_k(x)).unflatten(2, heads), rotary)
    value = layer.to_v(x).unflatten(2, heads)
    return layer.to_out[0](attention(query, key, value).flatten(2))


def _cross_attention(layer: WanAttention, x: Tensor, context: Tensor) -> Tensor:
    heads = (layer.heads, -1)
    query = layer.norm_q(layer.to_q(x)).unflatten(2, heads)
    key = layer.norm_k(layer.to_k(context)).unflatten(2, heads)
    value = layer.to_v(context).unflatten(2, heads)
    return layer.to_out[0](local_attention(query, key, value).flatten(2))
