"""Extend the core's `Video`, which knows mp4 and PNG, by every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanflow import api
from wanflow.encoding import writer_of
from wanflow.media import Frames


class Video(api.Video):
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and its recipe."""

    writer_of = staticmethod(writer_of)


def save_frames(
    path: Path, chunks: Iterator[Frames], fps: float, recipe: dict[str, Any], overwrite: bool
) -> Path:
    """Write frames as they come, into the kind of file that the name asks for."""
    return api.save_frames(path, chunks, fps, recipe, overwrite, writer_of(path))
