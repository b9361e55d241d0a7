"""Write videos and PNG pictures, with the recipe inside them.

`encoding` has the kinds of file that `video.Video.save` knows, and `clipfiles` reads them.

Shapes: T frames, H height, W width in pixels; frames are uint8 [T, H, W, 3], RGB.

A file appears under its name only when it is complete (see `files`). YUV is BT.709 in limited
range, in values and in tags.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from wanflow.config import RequestError
from wanflow.files import disk_error, publish, temporary, write_bytes

if TYPE_CHECKING:
    import av

    from wanflow.pipeline import Frames

RECIPE_KEY = "wanflow"
# The default scaler is fast and up to 2/255 off in a flat colour. ffmpeg's numbers of BICUBIC,
# FULL_CHR_H_INT, FULL_CHR_H_INP and ACCURATE_RND: av is imported where a file is written.
EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000
# x264's macroblock tree makes files that differ from run to run on CPUs with AVX-512 (seen with
# core 165, even on one thread).
X264_PARAMS = "mbtree=0"
PNG_HEADER = 33  # bytes of the magic and the IHDR chunk; other chunks come after


@dataclass(frozen=True)
class Encoding:
    """How ffmpeg stores a video: container and codec, each with options, and pixels."""

    container: str
    codec: str
    pixels: str
    settings: Mapping[str, str]
    options: Mapping[str, str]


H264 = Encoding(
    "mp4",
    "libx264",
    "yuv420p",
    {"crf": "10", "x264-params": X264_PARAMS},
    {"movflags": "+faststart+use_metadata_tags"},
)


class VideoWriter:
    """Writes a video frame by frame, within a `with` block.

    The file appears when the block ends without an exception.

    Args:
        path: the file to make, with its folders.
        width, height: pixels, even.
        fps: frames per second.
        metadata: any keys; see `recipe_tags`.
        overwrite: replace an existing file.
        encoding: how it is stored.

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
        overwrite: bool = False,
        encoding: Encoding = H264,
    ) -> None:
        self.path, self.width, self.height, self.overwrite = path, width, height, overwrite
        self.rate = Fraction(fps).limit_denominator(1001)
        self.metadata, self.encoding = dict(metadata), encoding
        self._count = 0

    def __enter__(self) -> Self:
        import av
        from av.video import reformatter as tags

        self._convert = tags.VideoReformatter()
        check_target(self.path, self.overwrite)
        self._part = temporary(self.path)
        with explained(self.path):
            # ffmpeg opens the file at the first packet, which is too late to refuse.
            self._part.touch(exist_ok=False)
        kind, form = self.encoding, self.encoding.pixels
        self._container = av.open(
            str(self._part.absolute()), "w", format=kind.container, options=dict(kind.options)
        )
        self._container.metadata.update(self.metadata)
        stream: Any = self._container.add_stream(
            kind.codec, rate=self.rate, options=dict(kind.settings)
        )
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, form
        stream.thread_type = "AUTO"  # PyAV's default cuts frames into slices, which costs bytes
        if form.startswith("yuv"):
            stream.color_primaries, stream.color_trc = (
                tags.ColorPrimaries.BT709,
                tags.ColorTrc.BT709,
            )
            stream.colorspace, stream.color_range = tags.Colorspace.ITU709, tags.ColorRange.MPEG
        self._stream = stream
        return self

    def write(self, frames: Frames) -> None:
        """Append frames [T, H, W, 3]."""
        import av

        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [T, {self.height},"
                f" {self.width}, 3]"
            )
        with explained(self.path):
            for rgb in frames:
                frame = self.convert(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb)))
                frame.pts = self._count
                self._count += 1
                self._container.mux(self._stream.encode(frame))

    def convert(self, rgb: av.VideoFrame) -> av.VideoFrame:
        """Return a frame in the pixels of the file."""
        from av.video.reformatter import ColorRange, Colorspace

        return self._convert.reformat(
            rgb,
            format=self.encoding.pixels,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT,
        )

    def seal(self, part: Path) -> None:
        """Change the complete file before it is published."""

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
        with explained(self.path):
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self.seal(self._part)
            publish(self._part, self.path, overwrite=self.overwrite)


Writer = Callable[[Path, int, int, float, Mapping[str, str], bool], AbstractContextManager[Any]]


def one_frame(path: Path, frames: int) -> str:
    """Return why several frames do not fit in a picture."""
    return f"{path.name}: a PNG holds one frame, and the run has {frames}; name an .mp4 or .apng"


def save_picture(
    path: Path, frame: Frames, metadata: Mapping[str, str], overwrite: bool = False
) -> None:
    """Write one frame [H, W, 3] as a PNG with `metadata` (keys of 1 to 79 Latin-1 characters).

    Raises:
        RequestError, OSError: as `VideoWriter`.
    """
    check_target(path, overwrite)
    with explained(path):
        write_bytes(path, png(frame, metadata), overwrite=overwrite)


def check_target(path: Path, overwrite: bool) -> None:
    """Make the folders of an output; refuse it before any work is done for it.

    Raises:
        RequestError: if it exists and may not be replaced, is no plain file, its name is too long
            with the ending of a temporary file, or its folder cannot be made or written.
    """
    with explained(path):
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


@contextmanager
def explained(path: Path) -> Iterator[None]:
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


def png(picture: Frames, texts: Mapping[str, str]) -> bytes:
    """Return a frame [H, W, 3] as the bytes of a PNG."""
    import av

    encoder = av.VideoCodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    encoder.options = {"pred": "mixed"}
    packets = [
        *encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))),
        *encoder.encode(None),
    ]
    return with_texts(b"".join(bytes(packet) for packet in packets), texts)


def with_texts(data: bytes, texts: Mapping[str, str]) -> bytes:
    """Return a PNG with these texts in it."""
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
