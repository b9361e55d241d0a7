"""Show a run while it goes, for `--preview`: a picture in a file, and in terminals that can."""

from __future__ import annotations

import argparse
import math
import os
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.beside import preview_of
from wanflow.files import remove
from wanflow.media import check_target
from wanflow.preview import Previewer, preview_file, strip

if TYPE_CHECKING:
    from wanflow.api import Pipeline
    from wanflow.pipeline import Frames, Progress
    from wanflow.screen import Screen

AUTO = Path("auto")  # what `--preview` stands for without a name
SHOWN = 8  # pictures of a run in a terminal, at most
COLUMNS, ROWS = 96, 12  # of one, at most


def refuse_preview(file: Path) -> None:
    """Raise RequestError for a preview that cannot be written, before any work is done for it."""
    if file != AUTO:
        check_target(preview_file(file), overwrite=True)


class Preview(Previewer):
    """Draws the preview that `--preview` asks for.

    Args:
        pipe: the model.
        target: the video, beside which an unnamed preview lies.
        args: of the command.
        screen: shows it, where the terminal can.

    Raises:
        RequestError: for a file that is in the way, or that another run is writing.
    """

    def __init__(
        self, pipe: Pipeline, target: Path, args: argparse.Namespace, screen: Screen
    ) -> None:
        self._named = args.preview != AUTO
        file = args.preview if self._named else preview_of(target)
        super().__init__(pipe, file, in_terminal(screen, os.environ))
        args.claims.take(self.file)
        screen.say(f"preview {self.file}")
        if self._named:
            args.output.document["preview"] = str(self.file)

    def conclude(self) -> None:
        """Remove a preview that nobody named, now that the video is there."""
        self.close()
        if not self._named:
            remove(self.file)


def in_terminal(
    screen: Screen, environ: Mapping[str, str]
) -> Callable[[Progress, Frames], None] | None:
    """Return what shows pictures above the bars; None where no terminal is known to show them."""
    encode = protocol_of(environ)
    if encode is None or not screen.live or screen.console.quiet:
        return None
    shown = set[int]()

    def show(progress: Progress, frames: Frames) -> None:
        part = progress.step * SHOWN // progress.steps
        if part in shown:
            return
        shown.add(part)
        data = strip(frames)
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # its IHDR
        columns, rows = cells(width, height, screen.console.width - 1)
        # Room is made first, so that nothing scrolls while the terminal draws.
        room = "\n" * rows + f"\x1b[{rows}A\x1b7"
        screen.obey(f"{room}{encode(data, columns, rows)}\x1b8\x1b[{rows}B\r")

    return show


def protocol_of(environ: Mapping[str, str]) -> Callable[[bytes, int, int], str] | None:
    """Return what encodes a PNG for this terminal; None for one that is not known to show it."""
    term = environ.get("TERM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return None  # they swallow it, or show it elsewhere
    if term in ("xterm-kitty", "xterm-ghostty"):
        return kitty
    return iterm if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm") else None


def cells(width: int, height: int, columns: int) -> tuple[int, int]:
    """Return the columns and rows of a picture; a row is as high as two columns are wide."""
    columns = max(1, min(columns, COLUMNS, 2 * ROWS * width // height))
    return columns, max(1, math.ceil(columns * height / width / 2))


def kitty(data: bytes, columns: int, rows: int) -> str:
    """Return a PNG in kitty's graphics protocol; the terminal sends no answer."""
    text = b64encode(data).decode()
    pieces = [text[at : at + 4096] for at in range(0, len(text), 4096)]
    keys = [f"a=T,f=100,C=1,c={columns},r={rows},", *[""] * (len(pieces) - 1)]
    more = [1] * (len(pieces) - 1) + [0]
    commands = zip(keys, more, pieces, strict=True)
    return "".join(f"\x1b_G{key}q=2,m={left};{piece}\x1b\\" for key, left, piece in commands)


def iterm(data: bytes, columns: int, rows: int) -> str:
    """Return a PNG as an inline image of iTerm2."""
    keys = f"inline=1;size={len(data)};width={columns};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={keys}:{b64encode(data).decode()}\x07"
