"""What stands beside a video: read its saved run, tidy up where its process was killed."""

from __future__ import annotations

from pathlib import Path

from wanflow.cli.keeping import sheet_of, state_of
from wanflow.config import RequestError
from wanflow.files import remove
from wanflow.outputs import CLAIM, leftovers
from wanflow.pipeline import Run
from wanflow.request import CompleteRequest


def preview_of(target: Path) -> Path:
    """Return where the preview of a video is that nobody named."""
    return target.with_name(target.stem + ".preview.png")


def sweep(target: Path) -> None:
    """Remove the claims and half-written files of a process that is gone."""
    for path in (target, state_of(target), preview_of(target), sheet_of(target)):
        for left in (*leftovers(path), path.with_name(path.name + CLAIM)):
            remove(left)


def saved(target: Path, request: CompleteRequest) -> Run:
    """Read the saved run of a video.

    Raises:
        RequestError: where it is damaged, or another request's.
    """
    file, again = state_of(target), "delete it, and the video begins at its first step"
    try:
        run = Run.load(file)
    except RequestError as error:
        raise RequestError(f"{error}; {again}") from None
    if run.request != request:
        raise RequestError(f"{file} holds another run; {again}")
    return run


def finish(target: Path, sheet: bool) -> None:
    """Do what comes after a video is published; draw its sheet where it is missing."""
    remove(state_of(target))
    remove(preview_of(target))
    if sheet and not sheet_of(target).exists():
        from wanflow.clipfiles import contact_sheet, read_frames

        contact_sheet(read_frames(target)[0], sheet_of(target))
