"""A folder of clips and captions to learn from, laid out as the public code wants it.

folder/metadata.csv     columns file_name and text, one row a clip
folder/train/...        the clips: MP4, MOV or WebM
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pusa_dist.errors import ConfigError, RequestError
from pusa_dist.media.clips import iter_frames, select_frames
from pusa_dist.media.frames import Frame, fit_frame

METADATA, CLIPS = "metadata.csv", "train"
COLUMNS = ("file_name", "text")


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of the metadata."""

    path: Path
    file_name: str
    text: str


def read_footage(folder: Path) -> list[Clip]:
    """The clips of a folder, in the order of its metadata.

    Raises:
        ConfigError: there is no such table, or rows of it cannot be used; all of them are named.
    """
    path = folder / METADATA
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path} has no column {', '.join(missing)}; its first line should be file_name,text")
            rows = [(table.line_num, row["file_name"] or "", row["text"] or "") for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); give a folder with {METADATA} (file_name,text) and the clips in {CLIPS}/"
        ) from error
    if not rows:
        raise ConfigError(f"{path} lists no clip; add a row for each file in {CLIPS}/")
    clips = [Clip(folder / CLIPS / name, name, text.strip()) for _, name, text in rows]
    problems = [
        f"line {line}: {problem}" for (line, *_), clip in zip(rows, clips, strict=True) if (problem := _problem(clip))
    ]
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}; mend or remove these lines")
    return clips


def _problem(clip: Clip) -> str | None:
    if not clip.file_name:
        return "no file_name"
    if not clip.text:
        return f"{clip.file_name} has no text"
    if Path(clip.file_name).is_absolute() or ".." in Path(clip.file_name).parts:
        return f"{clip.file_name} is outside of {CLIPS}/"
    return None if clip.path.is_file() else f"{CLIPS}/{clip.file_name} does not exist"


def frames_of(clip: Clip, width: int, height: int, num_frames: int) -> Iterator[Frame]:
    """The first frames of a clip, each resized to cover the size and cropped around its centre.

    The filter is Pillow's bilinear one, which averages when it shrinks; a user's clip at generation is
    brought to size by another, as the public code does.

    Args:
        clip: whose.
        width: in pixels.
        height: in pixels.
        num_frames: how many.

    Yields:
        uint8 (height, width, 3).

    Raises:
        RequestError: the clip cannot be decoded or is too short.
    """
    try:
        data = clip.path.read_bytes()
    except OSError as error:
        raise RequestError(f"the clip cannot be read ({error.strerror})", None, "invalid_clip") from error
    try:
        for frame in select_frames(iter_frames(data), 0, num_frames):
            yield fit_frame(frame, width, height, "crop", _bilinear)
    except RequestError as error:
        if error.code != "clip_too_short":
            raise
        raise RequestError(f"{error.message}, or cache fewer frames", None, error.code) from error


def _bilinear(pixels: Frame, width: int, height: int) -> Frame:
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.uint8)
