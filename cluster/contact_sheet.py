"""One picture of many videos: a row each, with what was given on the left and frames of the result on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from cluster.orders import Frames

SHOWN_FRAMES = 9
CELL_PX = 112
GAP_PX = 6
BAR_PX = 5
"""Thickness of the mark of a given frame."""
LABEL_PX = 250
TEXT_PX = 20
HEAD_PX = 64
GIVEN_COLOUR = "#1a8f3c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One given frame."""

    pixels: Frames
    """(H, W, 3)."""
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetRow:
    """One video."""

    title: str
    notes: Sequence[str]
    """Lines under the title."""
    given: Sequence[Picture]
    frames: Frames
    given_frames: frozenset[int]
    """Indices of the video's frames that were given; they are marked."""


def contact_sheet(heading: str, rows: Sequence[SheetRow]) -> Image.Image:
    """The rows under a heading, every cell with the number of its frame."""
    num_given = max(1, *(len(row.given) for row in rows))
    made_x = LABEL_PX + num_given * (CELL_PX + GAP_PX) + 4 * GAP_PX
    row_px = CELL_PX + TEXT_PX + 2 * GAP_PX
    sheet = Image.new("RGB", (made_x + SHOWN_FRAMES * (CELL_PX + GAP_PX), HEAD_PX + row_px * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, 8), heading, fill="black", font_size=18)
    draw.text((LABEL_PX, 38), "given", fill="black", font_size=16)
    draw.text((made_x, 38), "generated; green bars: frames whose latent was given", fill="black", font_size=16)
    for number, row in enumerate(rows):
        _draw_row(sheet, draw, row, HEAD_PX + number * row_px, made_x)
    return sheet


def shown_frames(num_frames: int) -> list[int]:
    """Which frames of a video are shown: evenly spread, the first and the last among them."""
    cells = min(SHOWN_FRAMES, num_frames)
    return [round(i * (num_frames - 1) / max(cells - 1, 1)) for i in range(cells)]


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, y: int, made_x: int) -> None:
    draw.line((0, y - GAP_PX, sheet.width, y - GAP_PX), fill="#d0d0d0")
    draw.text((GAP_PX, y), row.title, fill="black", font_size=17)
    draw.multiline_text((GAP_PX, y + 26), "\n".join(row.notes), fill="#404040", font_size=14, spacing=5)
    for i, picture in enumerate(row.given):
        _draw_cell(sheet, draw, picture.pixels, (LABEL_PX + i * (CELL_PX + GAP_PX), y), picture.caption, False)
    if not row.given:
        draw.text((LABEL_PX, y + CELL_PX // 2 - 8), "nothing", fill="#808080", font_size=14)
    for i, frame in enumerate(shown_frames(len(row.frames))):
        place = (made_x + i * (CELL_PX + GAP_PX), y)
        _draw_cell(sheet, draw, row.frames[frame], place, f"frame {frame}", frame in row.given_frames)


def _draw_cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    pixels: Frames,
    place: tuple[int, int],
    caption: str,
    is_given: bool,
) -> None:
    x, y = place
    picture = Image.fromarray(pixels)
    picture = picture.resize((CELL_PX, CELL_PX * picture.height // picture.width), Image.Resampling.BICUBIC)
    sheet.paste(picture.crop((0, 0, CELL_PX, min(picture.height, CELL_PX))), place)
    if is_given:
        draw.rectangle((x, y + CELL_PX, x + CELL_PX - 1, y + CELL_PX + BAR_PX - 1), fill=GIVEN_COLOUR)
    draw.text((x, y + CELL_PX + BAR_PX), caption, fill=GIVEN_COLOUR if is_given else "#606060", font_size=13)
