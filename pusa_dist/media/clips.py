"""Clips: MP4, MOV and WebM bytes to frames, one at a time."""

import io
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

import av
import cv2
import numpy as np

from pusa_dist.errors import RequestError
from pusa_dist.media.frames import Frame, fit_frame
from pusa_dist.request import Fit

# Demuxers by name, so that bytes cannot pose as a playlist that makes FFmpeg open other files or addresses.
MP4_DEMUXER, WEBM_DEMUXER = "mov", "matroska"
# What cameras, phones, browsers and editors write.
CLIP_CODECS = ("h264", "hevc", "vp8", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "prores")
EBML_MAGIC = b"\x1a\x45\xdf\xa3"


def demuxer_of(data: bytes) -> str:
    """FFmpeg's demuxer for a clip, by content."""
    return WEBM_DEMUXER if data.startswith(EBML_MAGIC) else MP4_DEMUXER


def open_clip(data: bytes, ignore_edits: bool = False) -> "av.container.InputContainer":
    """Open a clip for reading; what FFmpeg does not understand raises ``av.FFmpegError``.

    Args:
        data: a whole file.
        ignore_edits: MP4: also give the samples that an edit list hides from players.
    """
    demuxer = demuxer_of(data)
    options = {"ignore_editlist": "1"} if ignore_edits and demuxer == MP4_DEMUXER else {}
    return av.open(io.BytesIO(data), mode="r", format=demuxer, options=options, metadata_errors="ignore")


def video_streams(container: "av.container.InputContainer") -> list["av.VideoStream"]:
    """The streams that show moving pictures: cover art, which is a video stream of one picture, is none."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def iter_frames(data: bytes) -> Iterator[Frame]:
    """Frames (H, W, 3) of a clip in order, upright as its display rotation says; one is in memory at a time.

    Raises:
        RequestError: the clip cannot be decoded, or is not shown as its pixels are stored (``check_plain``).
    """
    try:
        with open_clip(data) as container:
            stream = video_streams(container)[0]
            stream.thread_count = 1
            for frame in container.decode(stream):
                check_plain(stream, frame)
                yield upright(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), frame.rotation)
    except RequestError:  # which is a ValueError
        raise
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise RequestError(f"the clip cannot be decoded ({error})", None, "invalid_clip") from error


def check_plain(stream: "av.VideoStream", frame: "av.VideoFrame") -> None:
    """Raise RequestError if a player would show something else than the frame's colours, pixel by pixel.

    That is with pixels that are not square, which would come out stretched, and with transparency, of which
    only the colours beneath would be left.
    """
    ratio = Fraction(stream.sample_aspect_ratio or 1)  # none: unknown, which players take as square
    # Encoders that round a size write ratios such as 4320:4319, which are less than a pixel from square.
    if abs(ratio - 1) * frame.width >= 1:
        raise RequestError(
            f"the clip's pixels are {ratio.numerator}:{ratio.denominator} (sample aspect ratio), not square; "
            "convert it to square pixels (ffmpeg -vf scale=iw*sar:ih,setsar=1)",
            None,
            "unsupported_media",
        )
    # In WebM transparency is a second picture beside each, which the decoder is not given: only a tag tells.
    if stream.metadata.get("alpha_mode") == "1" or any(part.is_alpha for part in frame.format.components):
        raise RequestError(
            "the clip is transparent in parts (it has an alpha channel); put it on a background and send it without",
            None,
            "unsupported_media",
        )


def upright(pixels: Frame, rotation: int) -> Frame:
    """Turn a frame counter-clockwise by the ``rotation`` degrees its stream asks a player for."""
    return np.ascontiguousarray(np.rot90(pixels, rotation // 90))


def select_frames(frames: Iterator[Frame], start: int, stop: int | None) -> Iterator[Frame]:
    """``frames[start:stop]`` of an iterator, holding no more than the frames of a negative start.

    Raises:
        RequestError: there are fewer frames.
    """
    wanted = -start if stop is None else stop - start
    chosen: Iterator[Frame] = islice(frames, start, stop) if start >= 0 else iter(deque(frames, maxlen=-start))
    for number in range(wanted):
        frame = next(chosen, None)
        if frame is None:
            raise RequestError(
                f"the clip ends after {number} of the {wanted} frames needed; give a longer clip",
                None,
                "clip_too_short",
            )
        yield frame


def fit_clip_frame(pixels: Frame, width: int, height: int, fit: Fit) -> Frame:
    """One frame of a clip brought to (height, width, 3) with OpenCV's 8x8 Lanczos filter."""
    return fit_frame(pixels, width, height, fit, _lanczos4)


def _lanczos4(pixels: Frame, width: int, height: int) -> Frame:
    resized = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_LANCZOS4)
    return np.asarray(resized, np.uint8)
