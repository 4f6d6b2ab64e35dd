"""The shipped small model: loaded like any other, of the stated size, and right about what it was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pusa_dist.checkpoint.lora import build_lora
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.checkpoint.vae import build_vae
from pusa_dist.config import load_model_config
from pusa_dist.prompt_encoder import PromptEncoder
from pusa_dist.training.preview import preview
from pusa_dist.training.samples import psnr
from pusa_dist.training.vae import reconstruct, to_video
from pusa_dist.world.caption import caption
from pusa_dist.world.render import render
from pusa_dist.world.scene import scene

MODEL = load_model_config("tiny")
FOLDER = Path(MODEL.weights.root or "")
SCENES = [scene(seed, "held-out") for seed in range(100, 106)]


def test_it_fits_into_fifteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 15e6


def test_its_files_have_the_published_names() -> None:
    expected = {
        "transformer": "blocks.0.self_attn.q.weight",
        "vae": "decoder.upsamples.0.residual.0.gamma",
        "text_encoder": "blocks.0.attn.q.weight",
        "pusa_lora": "blocks.0.self_attn.q.lora_A.default.weight",
    }
    for name, key in expected.items():
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            assert key in file.keys()  # noqa: SIM118 - the handle is not a mapping


def test_the_base_is_the_same_model_without_the_adaptation() -> None:
    base = load_model_config("tiny-base")
    assert base.lora is None
    assert (base.weights, base.transformer, base.vae, base.defaults) == (
        MODEL.weights,
        MODEL.transformer,
        MODEL.vae,
        MODEL.defaults,
    )


def test_unseen_clips_come_back_from_the_autoencoder() -> None:
    clips = np.stack([render(one) for one in SCENES[:2]])
    vae = build_vae(MODEL, device="cpu", precision="fp32")
    quality = psnr(reconstruct(vae, to_video(torch.from_numpy(clips))), clips)
    assert quality.mean() > 32
    assert quality.min() > 29, "no frame is bad"


@pytest.mark.parametrize("first_frame", [False, True])
def test_most_held_out_prompts_come_out_right(tmp_path: Path, first_frame: bool) -> None:
    """Six seeds, of which the table (``make quality``) has hundreds: a broken file or loader fails, luck does not."""
    transformer = build_transformer(MODEL, "main", device="cpu", precision="fp32")
    lora = build_lora(MODEL, "main", transformer)
    assert lora is not None
    assert MODEL.lora is not None
    lora.set_alpha(MODEL.lora.alpha["main"])
    prompts = PromptEncoder(MODEL, "cpu")
    contexts = torch.stack([prompts.encode(caption(one)) for one in SCENES])
    negative = prompts.encode(MODEL.defaults.negative_prompt)[None]
    vae = build_vae(MODEL, device="cpu", precision="fp32")
    seen = preview(
        MODEL, transformer, vae, SCENES, (contexts, negative), tmp_path / "grid.png", first_frame=first_frame
    )
    assert seen["colour"] >= 5 / 6
    assert seen["direction"] >= 5 / 6
    assert seen["all"] >= 4 / 6
    if first_frame:
        assert seen["last_px"] < 4
