"""Pictures and clips brought to the video's size, against recordings of what Pusa's scripts do."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pusa_dist.media.clips import fit_clip
from pusa_dist.media.frames import to_model_range
from pusa_dist.media.images import fit_image

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_an_image_is_stretched_as_recorded():
    case = load_file(GOLDENS / "image_preprocess.safetensors")
    pixels = fit_image(case["image_uint8_hwc"], 48, 32, "stretch")
    given = to_model_range(pixels[None])[None]
    assert given.shape == case["vae_input"].shape
    assert given.dtype == np.float32
    levels = np.abs(given - case["vae_input"]) * 127.5
    assert levels.max() <= 1


@pytest.mark.parametrize("name", ["frame0", "frame1"])
def test_a_clip_is_cropped_and_resized_as_recorded(name):
    case = load_file(GOLDENS / "v2v_preprocess.safetensors")
    rgb = np.ascontiguousarray(case[f"{name}_bgr_uint8"][..., ::-1])
    fitted = fit_clip(rgb[None], 1280, 720, "crop")[0, ::8, ::8]
    difference = fitted.astype(int) - case[f"{name}_out_rgb_720x1280_every8th"]
    assert np.abs(difference).max() <= 2
