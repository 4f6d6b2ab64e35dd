"""Pictures of how training goes: frames in a grid, one clip a row, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def to_frames(video: Tensor) -> NDArray[np.uint8]:
    """Clips (B, 3, T, H, W) in [-1, 1] as (B, T, H, W, 3) bytes, as the service makes them."""
    pixels = ((video.float().clamp(-1, 1) + 1.0) * 127.5).byte()
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 4, 1).cpu().numpy())


def write_grid(clips: Sequence[NDArray[np.uint8]], path: Path, every: int = 2, scale: int = 2) -> None:
    """One row per clip (T, H, W, 3), every ``every``-th frame from the first on, pixels ``scale`` times as large."""
    rows = [np.concatenate(list(np.pad(clip[::every], ((0, 0), (0, 1), (0, 1), (0, 0)))), axis=1) for clip in clips]
    grid = np.concatenate(rows).repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)


def psnr(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of every frame: (..., H, W, 3) to (...)."""
    error = (frames.astype(np.float64) - truth.astype(np.float64)) ** 2
    return 10 * np.log10(255.0**2 / np.maximum(error.mean((-3, -2, -1)), 1e-10))
