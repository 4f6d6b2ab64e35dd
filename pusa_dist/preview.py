"""What a video looks like so far, without decoding: a linear map from latents to colours.

Close to every latent vector stands for the mean colour of the 8x8 pixels (and four frames) it covers, so
a matrix of (C + 1, 3) numbers draws a recognisable picture. The matrix is fitted by least squares to what
the loaded VAE itself encodes and decodes, so it fits any VAE and no constants are copied from anywhere.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pusa_dist.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, num_pixel_frames
from pusa_dist.media.frames import Frame

Array = NDArray[np.float32]
Encode = Callable[[Frame], Array]
"""Frames (T, H, W, 3) to latents (C, F, H/8, W/8)."""
Decode = Callable[[Array], Iterator[Frame]]
"""Latents (C, F, H, W) to frames, chunk by chunk."""

NUM_CLIPS = 8
CLIP_SIDE, CLIP_LATENTS = 64, 3
RIDGE = 1e-3
"""Keeps the map finite where a VAE leaves latent channels unused."""
MAX_SIDE = 256
"""Pixels of a preview's longer side."""
QUALITY = 60
"""Of WebP, of 100."""


@dataclass(frozen=True, slots=True)
class LatentColours:
    """The fitted map; applies to one latent frame as to another."""

    matrix: Array
    """(C + 1, 3): what each channel adds to red, green and blue of 0..255; the last row is the constant."""

    @classmethod
    def fit(cls, encode: Encode, decode: Decode) -> "LatentColours":
        """Fit to a VAE: moving scenes are encoded, and the latents' colours are those they decode to."""
        inputs, colours = [], []
        for clip in training_clips():
            latents = encode(clip)
            inputs.append(_rows(latents))
            colours.append(_mean_colours(np.concatenate(list(decode(latents)))).reshape(-1, 3))
        x, y = np.concatenate(inputs).astype(np.float64), np.concatenate(colours).astype(np.float64)
        penalty = RIDGE * len(x) * np.diag([1.0] * (x.shape[1] - 1) + [0.0])
        return cls(np.linalg.solve(x.T @ x + penalty, x.T @ y).astype(np.float32))

    def frames(self, latents: Array) -> Frame:
        """Colours (F, H, W, 3) of latents (C, F, H, W), one pixel for each of their places."""
        colours = _rows(latents) @ self.matrix
        return np.asarray(colours.clip(0, 255).round().reshape(*latents.shape[1:], 3), np.uint8)


def to_webp(frames: Frame, fps: int) -> bytes:
    """A small WebP of latent frames (F, H, W, 3): a still for one, else a looping animation in the video's time."""
    height, width = frames.shape[1:3]
    scale = min(SPATIAL_STRIDE, max(1.0, MAX_SIDE / max(height, width)))
    size = (round(width * scale), round(height * scale))
    first, *rest = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    buffer = io.BytesIO()
    animation: dict[str, Any] = {
        "save_all": True,
        "append_images": rest,
        "duration": round(1000 * TEMPORAL_STRIDE / fps),
        "loop": 0,
    }
    first.save(buffer, "WEBP", quality=QUALITY, method=2, **(animation if rest else {}))
    return buffer.getvalue()


def training_clips() -> Iterator[Frame]:
    """Clips (T, H, W, 3) of soft coloured grounds with patches that drift over them, always the same ones."""
    random = np.random.default_rng(0)
    num_frames = num_pixel_frames(CLIP_LATENTS)
    for _ in range(NUM_CLIPS):
        ground = _smooth(random, 3)
        frames = np.repeat(ground[None], num_frames, axis=0)
        for _ in range(3):
            colours, side = _smooth(random, 2), int(random.integers(8, 28))
            place, speed = random.uniform(0, 40, 2), random.uniform(-3, 3, 2)
            for time in range(num_frames):
                top, left = (place + speed * time).clip(0, CLIP_SIDE - side).astype(int)
                frames[time, top : top + side, left : left + side] = colours[:side, :side]
        yield frames


def _smooth(random: np.random.Generator, coarseness: int) -> Frame:
    """A picture of side CLIP_SIDE that is smooth between ``coarseness`` squared random colours."""
    coarse = Image.fromarray(random.integers(0, 256, (coarseness, coarseness, 3), np.uint8))
    return np.asarray(coarse.resize((CLIP_SIDE, CLIP_SIDE), Image.Resampling.BICUBIC))


def _rows(latents: Array) -> Array:
    """(C, F, H, W) to (F * H * W, C + 1) with ones at the end."""
    flat = latents.reshape(latents.shape[0], -1).T
    return np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1, dtype=np.float32)


def _mean_colours(frames: Frame) -> Array:
    """(T, H, W, 3) pixels to (F, H/8, W/8, 3): the mean over what each latent covers."""
    t, height, width, _ = frames.shape
    small = frames.reshape(t, height // SPATIAL_STRIDE, SPATIAL_STRIDE, width // SPATIAL_STRIDE, SPATIAL_STRIDE, 3)
    means = small.mean(axis=(2, 4), dtype=np.float32)
    later = means[1:].reshape(-1, TEMPORAL_STRIDE, *means.shape[1:]).mean(axis=1)
    return np.concatenate([means[:1], later])
