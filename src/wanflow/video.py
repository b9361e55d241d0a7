"""Write frames into files: `Video.save`, and frames that are saved as they come."""

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
from wanflow.media import Writer, one_frame, recipe_tags, save_picture
from wanflow.pipeline import Frames
from wanflow.sanity import refuse_constant
from wanflow.untrusted import user_path
from wanflow.wording import without_flags

if TYPE_CHECKING:
    from typing import Unpack

    from wanflow import options

WAITING = 2  # chunks: one is encoded, one waits, and a third is computed


class Video(api.Video):
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and its recipe."""

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
            self._check(choose_encoding(target := user_path(path), **encoding).pixels)
            writer = writer_of(target, **encoding)
            if not len(self.frames):
                return target
            frames = iter([self.frames])
            return save_frames(target, frames, self.fps, self.recipe, overwrite, writer)

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
    path: Path,
    chunks: Iterator[Frames],
    fps: float,
    recipe: dict[str, Any],
    overwrite: bool,
    writer: Writer | None = None,
) -> Path:
    """Write frames as they come; the file appears under its name when it is complete.

    Args:
        path: the file.
        chunks: frames [T, H, W, 3], at least one.
        fps: frames per second.
        recipe: goes into the file.
        overwrite: replace what is there.
        writer: None: what the name asks for, in a thread, while the caller's computes frames.

    Raises:
        OutputError: when all frames are one constant; nothing is left under `path`.
    """
    writer = writer or in_thread(writer_of(path))
    tags = recipe_tags(recipe, str(recipe.get("request", {}).get("prompt", "")))
    first = next(chunks)
    if path.suffix.lower() == ".png":
        total = len(first) + sum(map(len, chunks))
        if total != 1:
            raise RequestError(one_frame(path, total))
        refuse_constant(int(first.min()), int(first.max()))
        save_picture(path, first[0], tags, overwrite)
        return path
    low, high = int(first.min()), int(first.max())
    height, width = first.shape[1:3]
    with writer(path, width, height, fps, tags, overwrite) as opened:
        opened.write(first)
        for chunk in chunks:
            opened.write(chunk)
            low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        refuse_constant(low, high)
    return path


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
