"""Frames to an MP4 that every browser plays, the same bytes for the same frames."""

from pathlib import Path
from types import TracebackType
from typing import Self

import av
from av.video.reformatter import ColorRange, Colorspace

from pusa_dist.media.frames import Frame

# One thread and no version strings: neither the machine's load nor the library's name reaches the bytes.
# x264's fastest routines differ between processors and with what was in memory before.
_ENCODER = {"crf": "17", "preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}
_CONTAINER = {"movflags": "+faststart", "fflags": "+bitexact"}
_BT709 = 1


class Mp4Writer:
    """Writes H.264 (yuv420p, BT.709) as the frames come; memory does not grow with the clip.

    Use it as a context manager, or call ``close``: the file is playable only then. Left by an error,
    the context manager removes the file.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: int) -> None:
        """Open ``path`` for a video of even ``width`` and ``height`` at ``fps`` whole frames a second."""
        self._path = Path(path)
        self._container = av.open(str(path), mode="w", format="mp4", options=_CONTAINER)
        stream = self._container.add_stream("libx264", rate=fps, options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        self._stream = stream
        self._num_frames = 0

    def write(self, frames: Frame) -> None:
        """Append frames, uint8 (T, H, W, 3)."""
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts = self._num_frames
            self._num_frames += 1
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds and the index, which goes to the front of the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._container.close()
            self._path.unlink(missing_ok=True)
