"""What every command's flags are made of."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from wanflow.weights.source import Part


class Parser(argparse.ArgumentParser):
    """One line of error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


def yes_or_no(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "y", "t"):
        return True
    if text.lower() in ("false", "no", "0", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def text_cache(named: str | None) -> str | None:
    """The folder of encoded prompts: the one that is named, the user's cache, or none."""
    if named is not None:
        return None if named == "none" else named
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return str(Path(base or "~/.cache").expanduser() / "wanflow" / "text")


def given_parts(args: argparse.Namespace) -> dict[Part, Path]:
    """The parts that were named by hand."""
    files: dict[Part, Path | None] = {"high": args.high, "low": args.low, "t5": args.t5, "vae": args.vae, "tokenizer": args.tokenizer}
    return {part: file for part, file in files.items() if file is not None}
