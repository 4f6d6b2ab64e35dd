"""What an uploaded file is, by its content alone, and whether it can be used at all.

The gateway asks this, in a process that can be killed (``pusa_dist.media.decoders``), before anything is
stored. Sizes are read from headers and checked before pixels are decoded, only named formats are given to
their decoders, and no more than one decoded frame is held. Everything is decoded once, so that a truncated
file is refused here and does not fail a job later.
"""

import io
import struct
from collections.abc import Iterator

import av
from PIL import Image

from pusa_dist.errors import RequestError
from pusa_dist.media.clips import (
    CLIP_CODECS,
    EBML_MAGIC,
    MP4_DEMUXER,
    check_plain,
    demuxer_of,
    open_clip,
    video_streams,
)
from pusa_dist.media.images import BROKEN_IMAGE, IMAGE_FORMATS
from pusa_dist.request import MediaInfo

MIN_SIDE = 16
MAX_SIDE = 4096
MAX_PIXELS = 4096 * 4096
MAX_CLIP_FRAMES = 1025
MAX_CLIP_SECONDS = 600.0

_ACCEPTED = "send an image as PNG, JPEG or WebP, or a clip as MP4, MOV or WebM"
_DAMAGED = "the {} is damaged or truncated; send the whole file"
_PNG_MAGIC, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
# Still pictures in the container of MP4 (HEIC, AVIF).
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
_SEGMENT_ID = b"\x18\x53\x80\x67"


def probe(data: bytes, param: str | None = None) -> MediaInfo:
    """Recognise, check and fully decode an uploaded image or clip.

    Args:
        data: the whole file; its name and declared type play no part.
        param: the field it came in, for the error.

    Returns:
        Its kind, its size as it is shown (EXIF and display rotation applied) and its number of frames.

    Raises:
        RequestError: it cannot be used. Codes: ``unsupported_media``, ``animated_image``, ``invalid_image``,
            ``image_too_small``, ``image_too_large``, ``invalid_clip``, ``clip_too_small``, ``clip_too_large``,
            ``clip_too_long``.
    """
    try:
        return _probe(data)
    except RequestError as error:
        raise RequestError(f"{param or 'the file'}: {error.message}", param, error.code) from error


def _probe(data: bytes) -> MediaInfo:
    if not data:
        raise RequestError(f"the file is empty; {_ACCEPTED}", None, "unsupported_media")
    if data.startswith((_PNG_MAGIC, b"\xff\xd8\xff", b"GIF87a", b"GIF89a")):
        return _probe_image(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _probe_image(data)
    if data.startswith(EBML_MAGIC) or (data[4:8] in _MP4_FIRST_BOXES and data[8:12] not in _PICTURE_BRANDS):
        return _probe_clip(data)
    raise RequestError(f"the file is of no kind that is accepted here; {_ACCEPTED}", None, "unsupported_media")


def _probe_image(data: bytes) -> MediaInfo:
    try:
        with Image.open(io.BytesIO(data), formats=(*IMAGE_FORMATS, "GIF")) as image:
            _check_size(image.width, image.height, "image")
            # A JPEG may carry further pictures (MPO, as phones write them); its first is the photograph.
            if image.format in ("PNG", "WEBP", "GIF") and getattr(image, "is_animated", False):
                raise RequestError("the image is animated; send a still image, or an MP4", None, "animated_image")
            if image.format == "GIF":
                raise RequestError(f"the image is a GIF; {_ACCEPTED}", None, "unsupported_media")
            turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
            image.load()
            width, height = (image.height, image.width) if turned else image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(_too_large("image"), None, "image_too_large") from error
    except RequestError:
        raise
    except BROKEN_IMAGE as error:
        raise RequestError(_DAMAGED.format("image"), None, "invalid_image") from error
    if data.startswith(_PNG_MAGIC) and _PNG_END not in data:
        raise RequestError(_DAMAGED.format("image"), None, "invalid_image")
    return MediaInfo(kind="image", width=width, height=height, num_frames=1)


def _probe_clip(data: bytes) -> MediaInfo:
    if _is_truncated(data):
        raise RequestError(_DAMAGED.format("clip"), None, "invalid_clip")
    try:
        return _decode_clip(data)
    except RequestError:
        raise
    except (av.FFmpegError, ValueError, LookupError, OSError) as error:
        raise RequestError(_DAMAGED.format("clip"), None, "invalid_clip") from error


def _decode_clip(data: bytes) -> MediaInfo:
    with open_clip(data) as container:
        stream = _only_stream(container)
        _check_size(stream.codec_context.width, stream.codec_context.height, "clip")
        _check_duration(container, stream)
        stream.thread_count = 1
        num_frames = 0
        size: tuple[int, int] | None = None
        for frame in _whole_frames(container, stream):
            num_frames += 1
            if num_frames > MAX_CLIP_FRAMES:
                raise RequestError(
                    f"the clip has more than {MAX_CLIP_FRAMES} frames; send a shorter one", None, "clip_too_long"
                )
            check_plain(stream, frame)
            shown = _shown_size(frame)
            if size not in (None, shown):
                raise RequestError("the clip's frames differ in size; convert it to one size", None, "invalid_clip")
            size = shown
        promised = stream.frames
    if size is None:
        raise RequestError("the clip has no frames", None, "invalid_clip")
    if num_frames < promised and _num_samples(data) < promised:
        raise RequestError(
            f"the clip is truncated: it promises {promised} frames and has {num_frames}; send the whole file",
            None,
            "invalid_clip",
        )
    return MediaInfo(kind="clip", width=size[0], height=size[1], num_frames=num_frames)


def _only_stream(container: "av.container.InputContainer") -> "av.VideoStream":
    streams = video_streams(container)
    if len(streams) != 1:
        raise RequestError(f"the clip has {len(streams)} video streams; send one with one", None, "invalid_clip")
    context = streams[0].codec_context
    if context is None or context.name not in CLIP_CODECS:  # None: FFmpeg has no decoder for it
        codec = "an unknown format" if context is None else context.name
        raise RequestError(f"the clip is coded as {codec}; convert it to H.264", None, "unsupported_media")
    return streams[0]


def _check_duration(container: "av.container.InputContainer", stream: "av.VideoStream") -> None:
    """As the container and the stream claim it; what they claim is not to be met by decoding."""
    claims = []
    if container.duration is not None:
        claims.append(container.duration / av.time_base)
    if stream.duration is not None and stream.time_base is not None:
        claims.append(float(stream.duration * stream.time_base))
    if any(seconds > MAX_CLIP_SECONDS for seconds in claims):
        raise RequestError(
            f"the clip lasts more than {MAX_CLIP_SECONDS:g} s; send a shorter one", None, "clip_too_long"
        )


def _whole_frames(container: "av.container.InputContainer", stream: "av.VideoStream") -> Iterator["av.VideoFrame"]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise RequestError(_DAMAGED.format("clip"), None, "invalid_clip")
        yield from packet.decode()


def _shown_size(frame: "av.VideoFrame") -> tuple[int, int]:
    _check_size(frame.width, frame.height, "clip")
    if frame.rotation % 90:
        raise RequestError(
            f"the clip is to be shown turned by {frame.rotation} degrees; convert it to an upright one",
            None,
            "unsupported_media",
        )
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _num_samples(data: bytes) -> int:
    """Samples that are really in the file, those that an edit list hides included."""
    with open_clip(data, ignore_edits=True) as container:
        return sum(packet.size > 0 for packet in container.demux(video_streams(container)[0]))


def _is_truncated(data: bytes) -> bool:
    """Whether the container's own lengths reach beyond the end of the file."""
    return _boxes_end(data) > len(data) if demuxer_of(data) == MP4_DEMUXER else _segment_end(data) > len(data)


def _boxes_end(data: bytes) -> int:
    """Where the last top-level box of an MP4 ends by its header."""
    offset = 0
    while offset + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        if length == 1 and offset + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, offset + 8)
        if length == 0:  # to the end of the file, wherever that is
            return len(data)
        if not data[offset + 4 : offset + 8].isalnum():  # padding or notes that some cameras append
            return offset
        if length < 8:
            raise RequestError(_DAMAGED.format("clip"), None, "invalid_clip")
        offset += length
    return offset


def _segment_end(data: bytes) -> int:
    """Where the segment of a WebM ends by its header; the file's end if it does not say (live recordings)."""
    start = data.find(_SEGMENT_ID, 0, 1024)
    if start < 0 or start + 5 > len(data):
        raise RequestError(_DAMAGED.format("clip"), None, "invalid_clip")
    first = data[start + 4]
    length_bytes = 9 - first.bit_length()  # EBML: the position of the first set bit is the number's length
    value = int.from_bytes(data[start + 4 : start + 4 + length_bytes], "big") & ((1 << 7 * length_bytes) - 1)
    unknown = value == (1 << 7 * length_bytes) - 1
    return len(data) if unknown else start + 4 + length_bytes + value


def _check_size(width: int, height: int, kind: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise RequestError(
            f"the {kind} is {width}x{height}; its shorter side must have at least {MIN_SIDE} pixels",
            None,
            f"{kind}_too_small",
        )
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RequestError(f"{_too_large(kind)}; this one is {width}x{height}", None, f"{kind}_too_large")


def _too_large(kind: str) -> str:
    return f"the {kind} is too large: send at most {MAX_SIDE} pixels a side"
