"""Training's whole-clip pass of the VAE is the product's chunked one, with gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pusa_dist.checkpoint.vae import diffusers_names, new_vae, original_names
from pusa_dist.config import VaeConfig
from pusa_dist.model.vae import decode_chunks, encode
from pusa_dist.training.export import fold_statistics
from pusa_dist.training.samples import psnr, write_grid
from pusa_dist.training.vae import Phase, VaeOptions, start_as_passthrough, train_vae, unnormalised, vae_loss
from pusa_dist.training.whole_clip import _NormSilu, decode_unclamped, encode_moments

SHAPE = unnormalised(VaeConfig(base_dim=4, z_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1))


def _vae(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return new_vae(SHAPE)


def _video(frames: int = 9, side: int = 16) -> Tensor:
    return torch.rand(2, 3, frames, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_one_pass_equals_the_chunks_of_inference(frames: int) -> None:
    vae, video = _vae(), _video(frames)
    latents, _ = encode_moments(vae, video)
    torch.testing.assert_close(latents, encode(vae, video), atol=1e-5, rtol=1e-4)
    decoded = torch.cat(list(decode_chunks(vae, latents.detach())), dim=2)
    torch.testing.assert_close(decode_unclamped(vae, latents).clamp(-1, 1), decoded, atol=1e-5, rtol=1e-4)


def test_the_fused_norm_has_the_gradients_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 3, 2, 2, generator=generator, requires_grad=True)
    gamma = torch.randn(5, 1, 1, 1, generator=generator, requires_grad=True)
    weight = torch.randn(x.shape, generator=generator)
    plain = nn.functional.silu(nn.functional.normalize(x, dim=1) * 5**0.5 * gamma)
    expected = torch.autograd.grad((plain * weight).sum(), (x, gamma))
    found = torch.autograd.grad((_NormSilu.apply(x, gamma) * weight).sum(), (x, gamma))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_statistics_folded_into_the_weights_normalise_the_latents_and_change_no_pixel() -> None:
    vae, video = _vae(), _video()
    before = decode_unclamped(vae, encode_moments(vae, video)[0])
    latents = encode_moments(vae, video)[0]
    mean, std = latents.mean((0, 2, 3, 4)).detach(), latents.std((0, 2, 3, 4)).detach()
    fold_statistics(vae, mean, std)
    folded = encode_moments(vae, video)[0]
    torch.testing.assert_close(folded.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(folded.std((0, 2, 3, 4)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(decode_unclamped(vae, folded), before, atol=1e-4, rtol=1e-3)


def test_published_names_are_read_back() -> None:
    for num_res_blocks in (1, 2):
        state = new_vae(replace(SHAPE, num_res_blocks=num_res_blocks)).state_dict()
        published = original_names(state, num_res_blocks)
        assert "decoder.upsamples.0.residual.0.gamma" in published
        assert "encoder.downsamples.0.residual.2.weight" in published
        assert diffusers_names(published, num_res_blocks).keys() == state.keys()


def test_a_signal_passes_before_the_first_step() -> None:
    """Through layers drawn at random alone, an edge in the picture leaves hardly a trace at the other end."""
    vae = _vae()
    start_as_passthrough(vae)
    video = torch.full((1, 3, 5, 32, 32), -1.0)
    video[..., 16:] = 1.0
    with torch.no_grad():
        latents = encode_moments(vae, video)[0]
    assert (latents[..., 0] - latents[..., -1]).abs().max() > 0.01


def test_the_loss_is_smaller_after_a_few_steps_and_the_run_is_repeatable(tmp_path) -> None:  # type: ignore[no-untyped-def]
    options = VaeOptions(phases=(Phase(steps=12, batch_size=2, frames=5, side=16),), num_clips=4)
    options = replace(options, loop=replace(options.loop, steps=12, warmup=2, lr=3e-3, sample_every=100, bf16=False))
    first = train_vae(SHAPE, replace(options, loop=replace(options.loop, sample_every=12)), tmp_path / "a")
    again = train_vae(SHAPE, options, tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "a" / "vae-000012.png").exists()
    video = _video(5)
    losses = [vae_loss(vae, video, options, torch.Generator().manual_seed(0))["loss"] for vae in (first, _vae())]
    assert losses[0] < losses[1]


def test_grids_and_their_quality(tmp_path) -> None:  # type: ignore[no-untyped-def]
    clip = np.zeros((5, 8, 8, 3), np.uint8)
    write_grid([clip, clip], tmp_path / "grid.png")
    assert psnr(clip, clip + 255).tolist() == [0.0] * 5
    assert (psnr(clip, clip) > 90).all()
