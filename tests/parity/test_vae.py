"""Our causal loop over the VAE's layers against recordings of Wan's, and what the loop promises."""

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pusa_dist.checkpoint.load import load_exactly
from pusa_dist.checkpoint.vae import build_vae, diffusers_names, new_vae
from pusa_dist.config import ModelConfig, VaeConfig, load_model_config
from pusa_dist.errors import CheckpointError, ConfigError
from pusa_dist.model.vae import decode_chunks, encode, tiles_of

GOLDENS = Path(__file__).parents[1] / "goldens"
TILE, STRIDE = (4, 4), (2, 2)


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.safetensors")


@pytest.fixture(scope="module")
def vae():
    shape = json.loads((GOLDENS / "vae_weights.json").read_text())
    module = new_vae(
        VaeConfig(
            base_dim=shape["vae_dim"],
            z_dim=shape["z_dim"],
            dim_mult=tuple(shape["dim_mult"]),
            num_res_blocks=shape["num_res_blocks"],
        )
    )
    load_exactly(module, diffusers_names(golden("vae_weights"), shape["num_res_blocks"]), "golden VAE")
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def debug() -> ModelConfig:
    return load_model_config("debug")


def latents_of_seed(seed: int, num_frames: int, height: int = 6, width: int = 8) -> torch.Tensor:
    return torch.randn(1, 16, num_frames, height, width, generator=torch.Generator().manual_seed(seed))


def whole(chunks) -> torch.Tensor:
    return torch.cat(list(chunks), dim=2)


@pytest.mark.parametrize(
    ("video", "tiling", "recorded"),
    [
        (slice(None), (), "latents"),
        (slice(0, 1), (), "latents_first_frame_only"),
        (slice(None), (TILE, STRIDE), "latents_tiled"),
    ],
)
def test_encoding_equals_the_recording(vae, video, tiling, recorded):
    case = golden("vae")
    torch.testing.assert_close(encode(vae, case["video"][:, :, video], *tiling), case[recorded], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("tiling", "recorded"), [((), "decoded"), ((TILE, STRIDE), "decoded_tiled")])
def test_decoding_equals_the_recording(vae, tiling, recorded):
    expected = (golden("vae") | golden("vae_tiled"))[recorded]
    frames = whole(decode_chunks(vae, golden("vae")["decode_input"], *tiling))
    torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)


def test_the_first_latents_do_not_depend_on_later_frames(vae):
    video = golden("vae")["video"]
    assert torch.equal(encode(vae, video[:, :, :5]), encode(vae, video)[:, :, :2])
    # Frames 6..8 are no whole group: they make no latent and change none.
    assert torch.equal(encode(vae, video[:, :, :8]), encode(vae, video[:, :, :5]))


def test_frames_exist_before_the_last_latent_is_decoded(vae):
    latents = latents_of_seed(0, 3)
    seen = []
    handle = vae.decoder.register_forward_hook(lambda *_: seen.append(1))
    try:
        chunks = decode_chunks(vae, latents)
        first = next(chunks)
        assert (first.shape[2], len(seen)) == (1, 1)
        assert next(chunks).shape[2] == 4
        assert len(seen) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize("tiling", [(), (TILE, STRIDE)])
def test_paused_decodes_and_an_encode_in_between_give_the_bits_they_give_alone(vae, tiling):
    video = golden("vae")["video"][:, :, :5]
    all_latents = [latents_of_seed(seed, 3) for seed in (1, 2)]
    alone = [whole(decode_chunks(vae, latents, *tiling)) for latents in all_latents]
    encoded_alone = encode(vae, video)

    running = [decode_chunks(vae, latents, *tiling) for latents in all_latents]
    parts = [[], []]
    for _ in range(3):
        for which, chunks in enumerate(running):
            parts[which].append(next(chunks))
            assert torch.equal(encode(vae, video), encoded_alone)
    for expected, got in zip(alone, parts, strict=True):
        assert torch.equal(torch.cat(got, dim=2), expected)


def test_a_pause_leaves_gradients_as_the_caller_had_them(vae):
    chunks = decode_chunks(vae, latents_of_seed(0, 2))
    next(chunks)
    assert torch.is_grad_enabled()
    chunks.close()
    assert torch.is_grad_enabled()


def live_bytes() -> int:
    gc.collect()
    storages = {t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_what_a_decode_holds_does_not_grow_with_the_clip(vae):
    latents = latents_of_seed(3, 6, 4, 4)
    held = {index: live_bytes() for index, _ in enumerate(decode_chunks(vae, latents)) if index in (0, 2, 5)}
    # The caches are full after the third latent frame; besides them there is one chunk of four frames.
    assert held[0] < held[2] == held[5]


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (6, 8), (7, 4), (60, 104)])
def test_tiles_cover_every_cell_and_their_weights_are_positive(size):
    total = torch.zeros(size)
    for tile in tiles_of(size, TILE, STRIDE):
        weight = tile.weight(1)
        assert weight.min() > 0
        tile.cut(total, 1).add_(weight)
    assert total.min() > 0


def test_one_tile_that_holds_the_frame_is_no_tiling(vae):
    latents = latents_of_seed(4, 2)
    plain = whole(decode_chunks(vae, latents))
    assert torch.equal(whole(decode_chunks(vae, latents, (6, 8), (3, 4))), plain)


@pytest.mark.parametrize("stride", [None, (0, 2), (5, 4)])
def test_a_stride_that_skips_cells_is_refused(stride):
    with pytest.raises(ConfigError, match=r"tile_stride.*tile=\(4, 4\)"):
        VaeConfig(tile=TILE, tile_stride=stride)


def test_a_renamed_or_misshapen_tensor_is_named(vae):
    tensors = diffusers_names(golden("vae_weights"), 2)
    tensors["encoder.conv_in.wrong"] = tensors.pop("encoder.conv_in.bias")
    tensors["decoder.conv_out.bias"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.bias") as caught:
        load_exactly(vae, tensors, "VAE")
    assert "encoder.conv_in.wrong" in str(caught.value)
    assert "decoder.conv_out.bias" in str(caught.value)


def test_published_names_map_onto_every_parameter_of_the_real_size():
    with torch.device("meta"):
        real = new_vae(load_model_config("pusa-v1-14b").vae)
    published = golden("vae_weights")  # the same blocks, narrower
    assert set(diffusers_names(published, 2)) == set(real.state_dict())
    prefixed = {f"model.{name}": tensor for name, tensor in published.items()}
    assert set(diffusers_names(prefixed, 2)) == set(real.state_dict())


def test_names_of_diffusers_pass_unchanged(vae):
    state = vae.state_dict()
    assert diffusers_names(state, 2).keys() == state.keys()


def test_debug_weights_repeat_and_show_the_latents(debug):
    first, second = (build_vae(debug, device="cpu", precision="fp32") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    frames = [whole(decode_chunks(first, latents_of_seed(seed, 2, 12, 16))) for seed in (0, 1)]
    for clip in frames:
        assert clip.isfinite().all()
        assert clip.std() > 0.1
        assert (clip.abs() == 1).float().mean() < 0.05
    assert (frames[0] - frames[1]).abs().mean() > 0.1
    given = encode(first, frames[0])
    assert 0.3 < given.std() < 3
    assert (given - encode(first, frames[1])).abs().mean() > 0.1


def test_bf16_weights_are_bf16_and_draw_no_warning(debug, caplog):
    vae = build_vae(debug, device="cpu", precision="bf16")
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    assert not caplog.records
    frames = whole(decode_chunks(vae, latents_of_seed(0, 2).bfloat16()))
    assert frames.dtype == torch.bfloat16
    reference = whole(decode_chunks(build_vae(debug, device="cpu", precision="fp32"), latents_of_seed(0, 2)))
    assert (frames.float() - reference).abs().mean() < 0.05
