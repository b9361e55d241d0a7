"""Tidy up beside a video whose process was killed."""

from __future__ import annotations

from pathlib import Path

from wanflow.cli.keeping import sheet_of, state_of
from wanflow.files import remove
from wanflow.outputs import CLAIM, leftovers


def preview_of(target: Path) -> Path:
    """Return where the preview of a video is that nobody named."""
    return target.with_name(target.stem + ".preview.png")


def sweep(target: Path) -> None:
    """Remove the claims and half-written files of a process that is gone."""
    for path in (target, state_of(target), preview_of(target), sheet_of(target)):
        for left in (*leftovers(path), path.with_name(path.name + CLAIM)):
            remove(left)


def finish(target: Path, sheet: bool) -> None:
    """Do what comes after a video is published; draw its sheet where it is missing."""
    remove(state_of(target))
    remove(preview_of(target))
    if sheet and not sheet_of(target).exists():
        from wanflow.clipfiles import contact_sheet, read_frames

        contact_sheet(read_frames(target)[0], sheet_of(target))
