"""Show the stages of a run: a table, a document for programs, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from wanflow.screen import table_lines
from wanflow.units import measured, memory_size

if TYPE_CHECKING:
    from wanflow.bench.stages import Stage

HEAD = ("stage", "measured", "planned", "TFLOP/s", "of the plan's", "peak", "planned peak")
WIDTH, ROW, LEFT, EDGE = 1000, 44, 320, 16  # pixels of the plot
BLUE, GREY, INK, PAPER = (38, 99, 180), (176, 184, 192), (20, 24, 28), (255, 255, 255)


def rows(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """Return a row of `HEAD` for each stage."""
    return [
        (
            one.name,
            measured(one.seconds),
            "" if one.planned is None else measured(one.planned),
            "" if one.rate is None else f"{one.rate / 1e12:.3g}",
            "" if one.share is None or one.rate is None else f"{one.share:.0%}",
            "" if one.peak is None else memory_size(one.peak),
            "" if one.planned_peak is None else memory_size(one.planned_peak),
        )
        for one in stages
    ]


def lines(title: str, stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """Return the table as lines for the terminal, each with a style."""
    head, *others = table_lines(HEAD, rows(stages), "lrrrrrr")
    return [("bold", title), ("dim", head), *(("", line) for line in others)]


def bars(title: str, stages: Sequence[Stage]) -> bytes:
    """Return a PNG: two bars for each stage, what was measured and what the plan expects."""
    from PIL import Image, ImageDraw, ImageFont

    height = 2 * EDGE + ROW * (len(stages) + 2)
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    draw.text((EDGE, EDGE), title, INK, font)
    longest = max((max(one.seconds, one.planned or 0.0) for one in stages), default=0.0) or 1.0
    room = WIDTH - LEFT - 8 * EDGE
    for number, one in enumerate(stages):
        top = EDGE + ROW * (number + 1)
        draw.text((EDGE, top + 4), one.name, INK, font)
        for offset, seconds, colour in ((0, one.seconds, BLUE), (15, one.planned, GREY)):
            if seconds is None:
                continue
            right = LEFT + max(2, round(room * seconds / longest))
            draw.rectangle((LEFT, top + offset, right, top + offset + 12), colour)
            draw.text((right + 6, top + offset - 3), measured(seconds), INK, font)
    base = height - ROW
    for left, text, colour in ((LEFT, "measured", BLUE), (LEFT + 140, "planned", GREY)):
        draw.rectangle((left, base + 4, left + 12, base + 16), colour)
        draw.text((left + 20, base), text, INK, font)
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def as_json(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return the stages for programs."""
    return [one.as_dict() for one in stages]
