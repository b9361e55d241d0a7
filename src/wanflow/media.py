"""Write mp4 video and PNG pictures, with the recipe inside them; `clipfiles` reads them.

Shapes: T frames, H height, W width in pixels; frames are uint8 [T, H, W, 3], RGB.

A file appears under its name only when it is complete (see `files`). Colours are BT.709 in limited
range, in values and in tags.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from wanflow.config import RequestError
from wanflow.files import disk_error, publish, temporary, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

Frames = npt.NDArray[np.uint8]

RECIPE_KEY = "wanflow"
# The default scaler is fast and up to 2/255 off in a flat colour.
EXACT = int(
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
# x264's macroblock tree makes files that differ from run to run on CPUs with AVX-512 (seen with
# core 165, even on one thread).
X264_PARAMS = "mbtree=0"
PNG_HEADER = 33  # bytes of the magic and the IHDR chunk; other chunks come after


class VideoWriter:
    """Writes an mp4 (H.264, yuv420p) frame by frame, within a `with` block.

    The file appears when the block ends without an exception.

    Args:
        path: the file to make, with its folders.
        width, height: pixels, even.
        fps: frames per second.
        metadata: any keys; see `recipe_tags`.
        crf: x264's quality, 0 (lossless) to 51.
        overwrite: replace an existing file.

    Raises:
        RequestError: on entering, if the file exists or its folder cannot be written.
        OSError: from `write` or at the end, if the disk is full.
        ValueError: for frames of another shape or type, or if there were none.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: float,
        metadata: Mapping[str, str],
        crf: int = 10,
        overwrite: bool = False,
    ) -> None:
        self.path, self.width, self.height, self.overwrite = path, width, height, overwrite
        self._rate = Fraction(fps).limit_denominator(1001)
        self._metadata, self._crf = dict(metadata), crf
        self._convert = VideoReformatter()
        self._count = 0

    def __enter__(self) -> Self:
        check_target(self.path, self.overwrite)
        self._part = temporary(self.path)
        with _explained(self.path):
            # ffmpeg opens the file at the first packet, which is too late to refuse.
            self._part.touch(exist_ok=False)
        options = {"movflags": "+faststart+use_metadata_tags"}
        self._container = av.open(str(self._part.absolute()), "w", format="mp4", options=options)
        self._container.metadata.update(self._metadata)
        stream = self._container.add_stream(
            "libx264", rate=self._rate, options={"crf": str(self._crf), "x264-params": X264_PARAMS}
        )
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        stream.thread_type = "AUTO"  # PyAV's default cuts frames into slices, which costs bytes
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        stream.colorspace, stream.color_range = Colorspace.ITU709, ColorRange.MPEG
        self._stream = stream
        return self

    def write(self, frames: Frames) -> None:
        """Append frames [T, H, W, 3]."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [T, {self.height},"
                f" {self.width}, 3]"
            )
        with _explained(self.path):
            for rgb in frames:
                frame = self._convert.reformat(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb)),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=EXACT,
                )
                frame.pts = self._count
                self._count += 1
                self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(Exception):
                self._container.close()
            with suppress(OSError):
                self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._count:
            raise ValueError(f"no frame was written to {self.path}")
        with _explained(self.path):
            self._container.mux(self._stream.encode(None))
            self._container.close()
            publish(self._part, self.path, overwrite=self.overwrite)


def save_picture(
    path: Path, frame: Frames, metadata: Mapping[str, str], overwrite: bool = False
) -> None:
    """Write one frame [H, W, 3] as a PNG with `metadata` (keys of 1 to 79 Latin-1 characters).

    Raises:
        RequestError, OSError: as `VideoWriter`.
    """
    check_target(path, overwrite)
    with _explained(path):
        write_bytes(path, _png(frame, metadata), overwrite=overwrite)


def check_target(path: Path, overwrite: bool) -> None:
    """Make the folders of an output; refuse it before any work is done for it.

    Raises:
        RequestError: if it exists and may not be replaced, is no plain file, its name is too long
            with the ending of a temporary file, or its folder cannot be made or written.
    """
    with _explained(path):
        if path.exists() and not path.is_file():  # renaming over /dev/null would destroy it
            raise RequestError(f"{path} is not a plain file; give the name of a file to make")
        if os.path.lexists(path) and not overwrite:
            raise RequestError(f"{path} exists; choose another name or pass --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = temporary(path)
        part.touch(exist_ok=False)
        part.unlink()


def recipe_tags(recipe: Mapping[str, Any], prompt: str) -> dict[str, str]:
    """Return a file's metadata: the recipe for `read_recipe`, and the texts that players show."""
    words = prompt.encode("utf-8", "replace").decode()  # a shell's prompt may be no Unicode text
    return {
        RECIPE_KEY: json.dumps(recipe),
        "title": "wanflow",
        "comment": words,
        "description": words,
    }


def to_uint8(video: Tensor) -> Frames:
    """Convert a video [3, T, H, W] or [1, 3, T, H, W] in -1..1 to uint8 [T, H, W, 3].

    Values are truncated, not rounded, as in the official code.
    """
    if video.ndim == 5 and video.shape[0] == 1:
        video = video[0]
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a video of shape {list(video.shape)} is not [3, T, H, W]")
    frames = video.detach().float().clamp(-1, 1).add_(1).div_(2).mul_(255).byte()
    return np.asarray(frames.permute(1, 2, 3, 0).contiguous().cpu().numpy(), dtype=np.uint8)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of an output into a RequestError, or an OSError where the disk is at fault."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        if path.exists():
            raise RequestError(f"{path} exists; choose another name or pass --overwrite") from None
        raise RequestError(f"cannot write {path}: a part of its folder's path is a file") from None
    except OSError as error:
        if (full := disk_error(error, path)) is not None:
            raise full from None
        raise RequestError(
            f"cannot write {path}: {error.strerror}; choose another folder"
        ) from None


def _png(picture: Frames, texts: Mapping[str, str]) -> bytes:
    encoder = av.VideoCodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    encoder.options = {"pred": "mixed"}
    packets = [
        *encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))),
        *encoder.encode(None),
    ]
    data = b"".join(bytes(packet) for packet in packets)
    # iTXt: keyword, 0, not compressed (2 bytes), no language, no translated keyword, text.
    chunks = (
        b"iTXt" + key.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
        for key, text in texts.items()
    )
    extra = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )
    return data[:PNG_HEADER] + extra + data[PNG_HEADER:]
