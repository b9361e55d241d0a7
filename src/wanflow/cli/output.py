"""What a command prints: its result on standard output, everything else on standard error."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from wanflow.outputs import bytes_of
from wanflow.screen import harmless, print_event, print_line, show_lines
from wanflow.units import file_size, measured, memory_size

if TYPE_CHECKING:
    from wanflow.screen import Screen

logger = logging.getLogger("wanflow")
KINDS = {"ram": "RAM", "gpu": "GPU memory"}


def output_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of every command that say how it prints."""
    add = p.add_argument_group("output").add_argument
    add(
        "--json",
        action="store_true",
        help="print one JSON document at the end, and progress as JSON lines on standard error",
    )
    add("--quiet", action="store_true", help="print the result and errors only")
    add("--verbose", action="store_true", help="also print timings, kernels and files")


class Lasting:
    """A stream for messages: where its reader, terminal or disk is gone, it drops them."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self.file.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what it holds."""
        try:
            self.file.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Send the rest nowhere, also what is still in a buffer when the process ends."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@dataclass
class Output:
    """How a command prints, and what it has made.

    document: what `--json` prints at the end. path: of the result, else standard output's one line.
    shown: the screen, once there is one.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    rank: int = 0
    document: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    shown: Screen | None = None
    began: float = field(default_factory=time.monotonic)
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    @classmethod
    def of(cls, words: list[str]) -> Output:
        """Return that of a command line, which may yet turn out to be wrong."""
        return cls("--json" in words, "--quiet" in words, "--verbose" in words)

    def begin(self, rank: int) -> None:
        """Send the log of a process to standard error, each record as one line."""
        self.rank = rank
        level = logging.DEBUG if self.verbose else logging.INFO
        level = logging.ERROR if self.quiet or self.rank else level
        root = logging.getLogger()
        for earlier in [one for one in root.handlers if isinstance(one, _LogLines)]:
            root.removeHandler(earlier)  # of another command in this process
        logging.basicConfig(level=max(level, logging.WARNING), handlers=[_LogLines(self)])
        logger.setLevel(level)

    def take(self, args: argparse.Namespace) -> None:
        """Take what the flags say, now that they are read."""
        self.json, self.quiet, self.verbose = args.json, args.quiet, args.verbose
        self.begin(self.rank)

    def guarded(self, page: bool) -> AbstractContextManager[Any]:
        """Keep what libraries print off standard output, unless the command prints a page there."""
        return nullcontext() if page and not self.json else redirect_stdout(sys.stderr)

    def screen(self, follower: bool = False) -> Screen:
        """Return what shows messages and progress; a follower shows nothing."""
        from wanflow.screen import Screen

        self.shown = Screen(self.quiet or follower, self.json)
        return self.shown

    def error(self, text: str) -> None:
        """Print what ended the command."""
        text = f"wanflow: {text}"
        if self.json:
            print_event("error", text=text)
            return
        for line in text.split("\n"):
            print_line(line)

    def alert(self, text: str) -> None:
        """Print what a person must know, `--quiet` or not."""
        if self.json:
            print_event("message", text=text)
        else:
            print_line(text)

    def page(self, lines: Iterable[tuple[str, str]], **document: Any) -> None:
        """Print (style, text) on standard output; with `--json` the document, at the end."""
        self.document |= document
        if not self.json:
            with redirect_stdout(self.stdout):
                show_lines(lines)

    def took(self) -> str:
        """Return the time so far, in words."""
        return measured(time.monotonic() - self.began)

    def spent(self) -> None:
        """Print what the command has cost so far."""
        if self.shown is not None:
            self.shown.say(self.so_far(self.shown))

    def so_far(self, screen: Screen) -> str:
        """Take what the command has cost so far into the document, and return it in words."""
        from wanflow.hardware import peak_memory

        peak, step = peak_memory(), screen.seconds_per_step
        self.document |= {
            "seconds": round(time.monotonic() - self.began, 3),
            "seconds_per_step": step and round(step, 6),
            "stages": {name: round(seconds, 3) for name, seconds in screen.stages.items()},
            "peak_memory": peak,
        }
        memory = " and ".join(
            f"{memory_size(size)} of {KINDS[kind]}" for kind, size in peak.items()
        )
        words = (self.took(), f"{measured(step)} a step" if step else "", f"peak {memory}")
        return ", ".join(filter(None, words))

    def result(self, path: Path, screen: Screen, **facts: Any) -> None:
        """Take the file or folder that the command made, and print the last line about it."""
        size = bytes_of(path)
        self.path = path
        self.document |= {"path": str(path), "bytes": size, **facts}
        screen.say(f"saved {path}: {file_size(size)} in {self.so_far(screen)}")

    def conclude(self, code: int = 0, error: str = "") -> None:
        """Print the document, or the result's path."""
        if self.rank:
            return
        if self.json:
            failed = {"error": error} if error else {}
            text = json.dumps({**self.document, **failed, "code": code}, indent=2)
            print(text, file=self.stdout, flush=True)
        elif self.path is not None and code == 0:
            _print_path(self.path, self.stdout)


def _print_path(path: Path, stdout: TextIO) -> None:
    """Print a path: its own bytes for a script, harmless letters on a terminal."""
    buffer = getattr(stdout, "buffer", None)
    if buffer is None or stdout.isatty():
        print(harmless(str(path)), file=stdout, flush=True)
        return
    stdout.flush()
    buffer.write(os.fsencode(path) + b"\n")
    buffer.flush()


class _LogLines(logging.Handler):
    """Prints each record as a line on standard error, whichever file that is by then."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        lines = [record.getMessage()]
        if record.exc_info:
            lines += "".join(traceback.format_exception(record.exc_info[1])).splitlines()
        if self.output.json:
            print_event(record.levelname.lower(), text="\n".join(lines))
            return
        for line in lines:
            print_line(f"wanflow: {line}")
