"""The map from latents to colours: found where it exists, useful where it does not, small as a file."""

import io

import numpy as np
import pytest
from PIL import Image

from pusa_dist.config import load_model_config
from pusa_dist.preview import MAX_SIDE, LatentColours, to_webp, training_clips
from pusa_dist.video_codec import VideoCodec

random = np.random.default_rng(7)
MIXING = random.normal(0, 0.02, (3, 6)).astype(np.float32)


def linear_encode(frames):
    """A VAE whose latents are linear in the colours: means of what they cover, mixed into six channels."""
    blocks = frames.reshape(len(frames), frames.shape[1] // 8, 8, frames.shape[2] // 8, 8, 3).mean(axis=(2, 4))
    groups = [blocks[:1], *np.split(blocks[1:], len(blocks[1:]) // 4)]
    means = np.stack([group.mean(axis=0) for group in groups])
    return np.moveaxis((means - 128) @ MIXING, -1, 0).astype(np.float32)


def linear_decode(latents):
    colours = np.moveaxis(latents, 0, -1) @ np.linalg.pinv(MIXING) + 128
    large = colours.repeat(8, axis=1).repeat(8, axis=2).clip(0, 255).round().astype(np.uint8)
    yield large[:1]
    for frame in large[1:]:
        yield np.repeat(frame[None], 4, axis=0)


def test_a_linear_vae_is_found_exactly():
    colours = LatentColours.fit(linear_encode, linear_decode)
    assert colours.matrix.shape == (7, 3)
    picture = random.integers(20, 235, (1, 5, 9, 3))
    clip = picture.repeat(8, axis=1).repeat(8, axis=2).repeat(5, axis=0).astype(np.uint8)
    drawn = colours.frames(linear_encode(clip))
    assert drawn.shape == (2, 5, 9, 3)
    assert np.abs(drawn.astype(int) - picture).max() <= 2


def test_colours_beyond_the_range_are_cut_off():
    colours = LatentColours(np.array([[1e6, -1e6, 0], [0, 0, 7]], np.float32))
    assert colours.frames(np.ones((1, 1, 1, 1), np.float32)).tolist() == [[[[255, 0, 7]]]]


def test_training_clips_are_always_the_same_and_of_whole_latents():
    one, other = list(training_clips()), list(training_clips())
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
    assert {clip.shape for clip in one} == {(9, 64, 64, 3)}


@pytest.fixture(scope="module")
def codec():
    return VideoCodec(load_model_config("debug"), "cpu")


def test_previews_of_the_loaded_vae_resemble_what_it_decodes(codec):
    encode = codec_encode(codec)
    colours = codec.fit_colours()
    assert colours.matrix.shape == (17, 3)
    # Another scene than any it was fitted to, and another size.
    scene = np.asarray(Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((96, 80)))
    clip = np.stack([np.roll(scene, 3 * time, axis=1) for time in range(5)])
    latents = encode(clip)
    decoded = np.concatenate(list(codec.decode(as_tensor(latents))))
    shown = np.stack([decoded[0], decoded[1:].mean(axis=0)])
    pooled = shown.reshape(2, 10, 8, 12, 8, 3).mean(axis=(2, 4))
    drawn = colours.frames(latents)
    assert drawn.shape == pooled.shape
    assert np.corrcoef(drawn.ravel(), pooled.ravel())[0, 1] > 0.6
    # Chance is none: the same colours at other places do not resemble it.
    shuffled = random.permutation(drawn.reshape(-1, 3)).reshape(drawn.shape)
    assert np.corrcoef(shuffled.ravel(), pooled.ravel())[0, 1] < 0.4


def codec_encode(codec):
    import torch

    return lambda frames: torch.stack(list(codec.encode_frames(iter(frames))), dim=1).float().numpy()


def as_tensor(latents):
    import torch

    return torch.from_numpy(latents)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 8, 8, 3), (64, 64)), ((21, 60, 104, 3), (MAX_SIDE, 148)), ((1, 90, 160, 3), (MAX_SIDE, 144))],
)
def test_a_preview_is_a_small_webp_in_the_videos_time(shape, size):
    ramp = np.linspace(0, 255, shape[1] * shape[2]).reshape(1, *shape[1:3], 1)
    frames = np.broadcast_to(ramp, shape).astype(np.uint8) + 40 * np.arange(shape[0], dtype=np.uint8).reshape(
        -1, 1, 1, 1
    )
    data = to_webp(frames, fps=16)
    assert len(data) < 60_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == ("WEBP", size, shape[0])
        image.load()
        if shape[0] > 1:
            assert image.info["duration"] == 250
            assert image.info["loop"] == 0
