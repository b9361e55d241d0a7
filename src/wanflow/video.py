"""Extend the core's `Video`, which knows mp4 and PNG, by every kind of file."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from wanflow import api
from wanflow.config import RequestError
from wanflow.encoding import choose_encoding, writer_of
from wanflow.media import Frames
from wanflow.untrusted import user_path
from wanflow.wording import without_flags

if TYPE_CHECKING:
    from typing import Unpack

    from wanflow import options


class Video(api.Video):
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and its recipe."""

    writer_of = staticmethod(writer_of)

    def save(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        **encoding: Unpack[options.Encoding],
    ) -> Path:
        """Write the video with its recipe inside; return the path.

        Write nothing where there are no frames, as in all processes but the first.

        Args:
            path: ends in .mp4, .webm, .mkv (lossless), .gif, .apng, or .png for a single frame; a
                name without a suffix becomes a folder of PNG files.
            overwrite: replace what is there.
            **encoding: codec, crf and pixel_format, of those that the file can hold.

        Raises:
            RequestError: for another suffix or encoding, or a place that cannot be written.
        """
        with without_flags():
            self._check(choose_encoding(user_path(path), **encoding).pixels)
            return super().save(path, overwrite, **encoding)

    def _check(self, pixels: str) -> None:
        """Raise RequestError for frames that no file of these pixels can hold."""
        frames, shape = self.frames, self.frames.shape
        if frames.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise RequestError(
                f"frames are {frames.dtype} {list(shape)}; expected uint8 [T, H, W, 3]"
            )
        if pixels in ("yuv420p", "yuv422p") and (shape[1] % 2 or shape[2] % 2):
            raise RequestError(
                f"frames of {shape[2]}*{shape[1]}: {pixels} needs even sides; take pixel_format"
                " yuv444p, or an .mkv"
            )

    def _repr_html_(self) -> str:
        """Return the video as notebooks show it."""
        if not len(self.frames):
            return repr(self)
        with TemporaryDirectory() as folder:
            data = self.save(Path(folder, "video.mp4")).read_bytes()
        source = f"data:video/mp4;base64,{b64encode(data).decode()}"
        return f'<video controls autoplay loop muted src="{source}"></video>'


def save_frames(
    path: Path, chunks: Iterator[Frames], fps: float, recipe: dict[str, Any], overwrite: bool
) -> Path:
    """Write frames as they come, into the kind of file that the name asks for."""
    return api.save_frames(path, chunks, fps, recipe, overwrite, writer_of(path))
