"""Make the thumbnail and the spritesheet of a video from frames taken as it passes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wanflow.clipfiles import SHEET_FRAMES, grid
from wanflow.files import write_bytes
from wanflow.pipeline import Frames
from wanflow.serve.folder import DataFolder

THUMBNAIL = 480  # pixels: the longer side
QUALITY = 80  # of WebP


class Chosen:
    """Evenly spaced frames of a video, taken as it passes."""

    def __init__(self, total: int) -> None:
        numbers = np.linspace(0, total - 1, min(total, SHEET_FRAMES)).round()
        self._numbers = {int(number) for number in numbers}
        self._frames: list[Frames] = []

    def passed(self, first: Frames, chunks: Iterator[Frames]) -> Iterator[Frames]:
        """Yield every chunk, and keep what is chosen."""
        at = 0
        for chunk in (part for group in ([first], chunks) for part in group):
            here = [frame for n, frame in enumerate(chunk, at) if n in self._numbers]
            self._frames += [frame.copy() for frame in here]
            at += len(chunk)
            yield chunk

    def write(self, folder: DataFolder, video: Path) -> None:
        """Write the pictures of a video that has passed."""
        pictures = np.stack(self._frames)
        write_webp(folder.beside(video, "thumbnail"), pictures[0], THUMBNAIL)
        sheet = grid(pictures) if len(pictures) > 1 else pictures[0]
        write_webp(folder.beside(video, "spritesheet"), sheet)


def write_webp(file: Path, pixels: Frames, side: int | None = None) -> None:
    """Write a picture [H, W, 3], at most so many pixels on its longer side."""
    from PIL import Image

    picture, data = Image.fromarray(pixels), io.BytesIO()
    if side is not None:
        picture.thumbnail((side, side))
    picture.save(data, "WEBP", quality=QUALITY)
    write_bytes(file, data.getvalue(), overwrite=True)
