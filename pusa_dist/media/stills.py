"""Pictures of a finished video: thumbnail, contact sheet and the lossless frames, with repeatable bytes."""

import io
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from pusa_dist.geometry import TEMPORAL_STRIDE
from pusa_dist.media.frames import Frame

THUMBNAIL_SIDE = 320
SHEET_CELLS = 16
SHEET_SIDE = 1280
"""Longest side of the contact sheet, pixels."""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold: the clock must not reach the bytes


def thumbnail(frame: Frame) -> bytes:
    """A WebP of one frame (H, W, 3), its longer side at most 320 pixels."""
    image = _shrunk(frame, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


class SpriteSheet:
    """Collects the frames of a contact sheet while a video is decoded."""

    def __init__(self, num_frames: int) -> None:
        cells = min(num_frames, SHEET_CELLS)
        self._shown = {round(i * (num_frames - 1) / max(cells - 1, 1)) for i in range(cells)}
        self._columns = int(np.ceil(np.sqrt(cells)))
        self._rows = -(-cells // self._columns)
        self._images: list[Image.Image] = []
        self._num_seen = 0

    def write(self, frames: Frame) -> None:
        """Take the next frames, uint8 (T, H, W, 3)."""
        for frame in frames:
            if self._num_seen in self._shown:
                self._images.append(_shrunk(frame, SHEET_SIDE // self._columns, SHEET_SIDE // self._rows))
            self._num_seen += 1

    def to_jpeg(self) -> bytes:
        """The sheet of the frames seen so far."""
        width, height = self._images[0].size
        sheet = Image.new("RGB", (self._columns * width, self._rows * height))
        for index, image in enumerate(self._images):
            row, column = divmod(index, self._columns)
            sheet.paste(image, (column * width, row * height))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()


class FramesZip:
    """A zip of lossless PNGs, ``00000.png`` and on, written as the frames come.

    Those of one ``write`` are compressed on threads until the next, or ``close``, so that whoever writes need not wait.
    """

    def __init__(self, path: str | Path) -> None:
        # Stored: a PNG does not shrink any further.
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._num_frames = 0
        self._pool = ThreadPoolExecutor(TEMPORAL_STRIDE, "png")  # as many as frames come together
        self._compressing: list[Future[bytes]] = []

    def write(self, frames: Frame) -> None:
        """Append frames, uint8 (T, H, W, 3), which may not be changed before the next call."""
        self._append()
        self._compressing = [self._pool.submit(_png, frame) for frame in frames]

    def close(self) -> None:
        """Write what is still being compressed and the zip's directory; the file is complete only then."""
        with self._zip, self._pool:
            self._append()

    def _append(self) -> None:
        compressing, self._compressing = self._compressing, []
        for png in compressing:
            self._zip.writestr(zipfile.ZipInfo(f"{self._num_frames:05d}.png", _EPOCH), png.result())
            self._num_frames += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _png(frame: Frame) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _shrunk(frame: Frame, width: int, height: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((width, height), Image.Resampling.LANCZOS)
    return image
