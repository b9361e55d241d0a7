"""What every command's flags are made of."""

from __future__ import annotations

import argparse
from typing import NoReturn


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
