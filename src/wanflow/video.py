"""Extend the core's `Video`, which knows mp4 and PNG, by every kind of file."""

from __future__ import annotations

import os
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from wanflow import api
from wanflow.config import RequestError
from wanflow.encoding import choose_encoding, writer_of
from wanflow.media import Frames, Writer
from wanflow.untrusted import user_path
from wanflow.wording import without_flags

if TYPE_CHECKING:
    from typing import Unpack

    from wanflow import options

WAITING = 2  # chunks: one is encoded, one waits, and a third is computed


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
    """Write frames as they come, into the kind of file that the name asks for.

    A thread encodes, while the caller's computes the next frames.
    """
    return api.save_frames(path, chunks, fps, recipe, overwrite, in_thread(writer_of(path)))


def in_thread(writer: Writer) -> Writer:
    """Return a writer that encodes in a thread, at most `WAITING` chunks behind.

    What the thread raises ends the block: at the next `write`, or at the end. Where the block
    raises, chunks that wait are dropped. The file is closed once the thread has ended.
    """

    @contextmanager
    def opened(*args: Any) -> Iterator[_Waiting]:
        with writer(*args) as file:
            thread = ThreadPoolExecutor(1, thread_name_prefix="wanflow-encode")
            waiting = _Waiting(partial(thread.submit, file.write))
            try:
                yield waiting
                waiting.shrink_to(0)
            finally:
                thread.shutdown(cancel_futures=True)

    return opened


class _Waiting:
    """The chunks that are not in the file yet; `submit` hands one to the thread."""

    def __init__(self, submit: Callable[[Frames], Future[None]]) -> None:
        self._submit, self._chunks = submit, deque[Future[None]]()

    def write(self, frames: Frames) -> None:
        """Hand frames over, once there is room."""
        self.shrink_to(WAITING - 1)
        self._chunks.append(self._submit(frames))

    def shrink_to(self, count: int) -> None:
        """Wait until so many chunks are left; raise what encoding one has raised."""
        while len(self._chunks) > count or (self._chunks and self._chunks[0].done()):
            self._chunks.popleft().result()
