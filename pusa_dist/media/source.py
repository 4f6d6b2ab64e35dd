"""Uploaded bytes to frames at the size of the video: what decodes for the VAE, here or in another process."""

from collections.abc import Generator
from typing import Protocol

from pusa_dist.media.clips import fit_clip_frame, iter_frames, select_frames
from pusa_dist.media.frames import Frame
from pusa_dist.media.images import fit_image, read_image
from pusa_dist.request import Fit

Frames = Generator[Frame, None, None]


class FrameSource(Protocol):
    """Decodes whole files; both methods raise RequestError for what cannot be decoded."""

    def image(self, data: bytes, width: int, height: int, fit: Fit) -> Frame:
        """A picture as (height, width, 3)."""
        ...

    def clip(self, data: bytes, start: int, stop: int | None, width: int, height: int, fit: Fit) -> Frames:
        """Frames ``start:stop`` of a clip, (height, width, 3) each; a negative start counts from its end.

        Close it if you leave it early.
        """
        ...


class InProcess:
    """Decodes in this process: for files of one's own."""

    def image(self, data: bytes, width: int, height: int, fit: Fit) -> Frame:
        """See ``FrameSource.image``."""
        return fit_image(read_image(data), width, height, fit)

    def clip(self, data: bytes, start: int, stop: int | None, width: int, height: int, fit: Fit) -> Frames:
        """See ``FrameSource.clip``."""
        # Fitted before they are selected: a tail is held until the clip's end is seen, at the video's size.
        fitted = (fit_clip_frame(frame, width, height, fit) for frame in iter_frames(data))
        yield from select_frames(fitted, start, stop)
