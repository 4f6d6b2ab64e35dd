"""Still pictures: PNG, JPEG and WebP bytes to pixels of the video's size."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from pusa_dist.errors import RequestError
from pusa_dist.media.frames import Frame, fit_frame
from pusa_dist.request import Fit

# What Pillow raises on bytes that only begin like an image: its plugins parse with struct, slices and zlib.
BROKEN_IMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def read_image(data: bytes) -> Frame:
    """Pixels (H, W, 3) of a picture, upright as its EXIF says, transparency shown on white.

    Raises:
        RequestError: the bytes are not a whole PNG, JPEG or WebP.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except BROKEN_IMAGE as error:
        raise RequestError(f"the image cannot be decoded ({error})", None, "invalid_image") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: keep the upper 8, which a plain conversion would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def fit_image(pixels: Frame, width: int, height: int, fit: Fit) -> Frame:
    """A picture (H, W, 3) brought to (height, width, 3) with Pillow's Lanczos filter."""
    return fit_frame(pixels, width, height, fit, _lanczos)


def _lanczos(pixels: Frame, width: int, height: int) -> Frame:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
