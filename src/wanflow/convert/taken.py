"""Refuse a place for weights that is taken; without torch."""

from __future__ import annotations

import os
from pathlib import Path

from wanflow.checkpoint.parts import ENDINGS
from wanflow.config import RequestError

# File endings in a folder that --overwrite may replace; any other shows that it is no model's.
REPLACEABLE = {*ENDINGS, ".json", ".model", ".md", ".txt", ".part", ""}


def refuse_folder(out: Path, overwrite: bool) -> None:
    """Raise a RequestError for a place that is taken, or holds more than a model."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise RequestError(f"{out} exists; name another place, or give --overwrite")
    for file in out.rglob("*") if out.is_dir() else ():
        if file.is_file() and file.suffix not in REPLACEABLE:
            raise RequestError(
                f"{out} holds {file.relative_to(out)}, so it is more than a model, and --overwrite"
                " does not replace it; name another place"
            )
