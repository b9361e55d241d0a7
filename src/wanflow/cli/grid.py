"""Draw the contact sheet of a grid: a frame of each video, rows and columns named by settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.clipfiles import GAP, SHEET_SIDE, stream_frames
from wanflow.media import save_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

Place = tuple[Any, ...]
TEXT = 15  # pixels: the size of the labels' letters
PAD = 6  # pixels around a label
WIDEST = 16_000  # pixels of a sheet's side, about
PAPER, INK, HOLE, TROUBLE = (255, 255, 255), (24, 24, 24), (232, 232, 232), (176, 0, 32)


@dataclass(frozen=True)
class Cell:
    """A video of a sheet.

    prompt: what it shows. settings: its place, by the name of each axis. file: None where it
    failed. frames: how many it has. missing: why it is not there.
    """

    prompt: str
    settings: Mapping[str, Any]
    file: Path | None
    frames: int = 1
    missing: str = ""


def draw_sheets(folder: Path, lines: Sequence[Sequence[Cell]]) -> list[Path]:
    """Draw a sheet for the videos of each prompt; return the files.

    An axis of one value is left out, unless there is no other.
    """
    sheets = []
    for number, cells in enumerate(lines, 1):
        axes = {
            name: list(dict.fromkeys(cell.settings[name] for cell in cells))
            for name in cells[0].settings
        }
        several = {name: values for name, values in axes.items() if len(values) > 1}
        axes = several or dict(list(axes.items())[-1:])
        places = {tuple(cell.settings[name] for name in axes): cell for cell in cells}
        path = folder / ("grid.png" if len(lines) == 1 else f"grid_{number}.png")
        draw(path, cells[0].prompt, axes, places)
        sheets.append(path)
    return sheets


def draw(
    path: Path, title: str, axes: Mapping[str, Sequence[Any]], cells: Mapping[Place, Cell]
) -> None:
    """Write the sheet as a PNG, in place of an earlier one.

    The last axis runs from left to right, and every combination of the others is a row.

    Args:
        path: the PNG.
        title: stands above, such as the prompt.
        axes: the values of each setting, by its name.
        cells: what is shown at each place, one value of each axis.

    Raises:
        RequestError, OSError: for a video that cannot be read, or a sheet that cannot be written.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    names, values = list(axes), list(axes.values())
    columns = list(values[-1])
    rows = list(product(*values[:-1]))
    side = min(SHEET_SIDE[1], max(32, WIDEST // max(len(columns), len(rows))))
    pictures = {place: _picture(one, side) for place, one in cells.items()}
    drawn = [one for one in pictures.values() if one is not None]
    width = max((one.width for one in drawn), default=SHEET_SIDE[0])
    height = max((one.height for one in drawn), default=SHEET_SIDE[0])
    font = ImageFont.load_default(TEXT)
    line = TEXT + 2 * PAD
    words = [", ".join(map(_label, names[:-1], row)) for row in rows]
    left = max(int(font.getlength(text)) for text in words) + (2 * PAD if words[0] else 0)
    width = max(width, *(int(font.getlength(_label(names[-1], one))) + GAP for one in columns))
    size = left + len(columns) * (width + GAP), 2 * line + len(rows) * (height + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((PAD, PAD), _fitting(title, size[0] - 2 * PAD, font), INK, font)
    for x, value in enumerate(columns):
        middle = left + x * (width + GAP) + width // 2
        pen.text((middle, line + PAD), _label(names[-1], value), INK, font, anchor="ma")
    for y, row in enumerate(rows):
        top = 2 * line + y * (height + GAP)
        pen.text((PAD, top + height // 2), words[y], INK, font, anchor="lm")
        for x, value in enumerate(columns):
            corner = left + x * (width + GAP), top
            picture = pictures.get((*row, value))
            if picture is None:
                _hole(pen, corner, (width, height), cells.get((*row, value)), font)
                continue
            spare = (width - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (corner[0] + spare[0], corner[1] + spare[1]))
    save_picture(path, np.asarray(sheet, dtype=np.uint8), {}, overwrite=True)


def _picture(one: Cell, side: int) -> Image | None:
    """Return the middle frame of a video, at most `side` pixels long."""
    from PIL import Image

    if one.file is None:
        return None
    _, frame = next(islice(stream_frames(one.file), one.frames // 2, None))
    picture = Image.fromarray(frame)
    longer = max(picture.size)
    if longer > side:
        scale = side / longer
        small = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        return picture.resize(small, Image.Resampling.LANCZOS)
    factor = max(1, min(SHEET_SIDE[0], side) // longer)
    larger = picture.width * factor, picture.height * factor
    return picture.resize(larger, Image.Resampling.NEAREST)


def _hole(
    pen: ImageDraw,
    corner: tuple[int, int],
    size: tuple[int, int],
    one: Cell | None,
    font: FreeTypeFont | BitmapFont,
) -> None:
    """Draw the place of a video that is not there, and why."""
    x, y = corner
    width, height = size
    pen.rectangle((x, y, x + width - 1, y + height - 1), HOLE, TROUBLE)
    text = _fitting("missing" if one is None else one.missing, width - 2 * PAD, font)
    pen.text((x + width // 2, y + height // 2), text, TROUBLE, font, anchor="mm")


def _label(name: str, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else f"{value}"
    return _drawable(f"{name} {shown}")


def _drawable(text: str) -> str:
    """Return a text in the letters that Pillow's own font has."""
    return " ".join(text.encode("latin-1", "replace").decode("latin-1").split())


def _fitting(text: str, width: int, font: FreeTypeFont | BitmapFont) -> str:
    text = _drawable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
