"""Store a video as the kind of file that its name asks for, such as mp4, webm, mkv or gif."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

from wanflow.config import RequestError
from wanflow.files import publish, remove, temporary
from wanflow.media import (
    H264,
    RECIPE_KEY,
    Encoding,
    VideoWriter,
    Writer,
    check_target,
    explained,
    one_frame,
    png,
    with_texts,
)

if TYPE_CHECKING:
    from typing import Unpack

    import av

    from wanflow import options
    from wanflow.pipeline import Frames


@dataclass(frozen=True)
class Codec:
    """One of ffmpeg's encoders. pixels: the usual first. crf: the usual and the largest."""

    encoder: str
    pixels: tuple[str, ...]
    crf: tuple[int, int] | None = None
    settings: Mapping[str, str] | None = None


YUV = ("yuv420p", "yuv422p", "yuv444p")
CODECS = {
    "h264": Codec(H264.codec, YUV, (10, 51), H264.settings),
    "hevc": Codec("libx265", YUV, (12, 51), {"x265-params": "log-level=none"}),
    "vp9": Codec("libvpx-vp9", YUV, (15, 63), {"b": "0", "row-mt": "1", "cpu-used": "2"}),
    "ffv1": Codec("ffv1", ("bgr0",), None, {"level": "3", "slicecrc": "1", "g": "1"}),
    "gif": Codec("gif", ("pal8",)),
    "apng": Codec("apng", ("rgb24",), None, {"pred": "mixed"}),
    "png": Codec("png", ("rgb24",)),
}
BITEXACT = {"fflags": "+bitexact"}  # without a random identity
# {suffix: (ffmpeg's container, its codecs, its options)}
KINDS: dict[str, tuple[str, tuple[str, ...], Mapping[str, str]]] = {
    ".mp4": (H264.container, ("h264", "hevc"), H264.options),
    ".webm": ("webm", ("vp9",), BITEXACT),
    ".mkv": ("matroska", ("ffv1", "h264", "hevc", "vp9"), BITEXACT),
    ".gif": ("gif", ("gif",), {}),
    ".apng": ("apng", ("apng",), {"plays": "0"}),
    ".png": ("", ("png",), {}),  # of one frame
    "": ("", ("png",), {}),  # a folder with a PNG for each frame
}


def writer_of(path: Path, **encoding: Unpack[options.Encoding]) -> Writer:
    """Return what writes a file of this name, see `choose_encoding`."""
    chosen = choose_encoding(path, **encoding)
    if not path.suffix:
        return FrameFolder
    kinds = {"gif": GifWriter, "apng": ApngWriter}
    return partial(kinds.get(chosen.container, VideoWriter), encoding=chosen)


def choose_encoding(
    path: Path,
    codec: str | None = None,
    crf: int | None = None,
    pixel_format: str | None = None,
    **unknown: object,
) -> Encoding:
    """Return how a file of this name is stored; None takes what is usual there.

    Raises:
        RequestError: for a suffix that no kind has, and for what such a file cannot hold.
    """
    for name in unknown:
        raise RequestError(
            f"save does not know {name}; it knows overwrite, codec, crf and pixel_format"
        )
    suffix = path.suffix.lower()
    if suffix not in KINDS or path.name.lower() in KINDS:
        raise RequestError(
            f"{path}: unknown kind of file; the name ends in {', '.join(filter(None, KINDS))}, or"
            " has no suffix for a folder of frames"
        )
    container, codecs, options = KINDS[suffix]
    _refuse_other("codec", codec, codecs, path)
    chosen = CODECS[codec or codecs[0]]
    _refuse_other("pixel_format", pixel_format, chosen.pixels, path)
    settings = dict(chosen.settings or {})
    if chosen.crf is not None:
        usual, largest = chosen.crf
        settings["crf"] = str(usual if crf is None else crf)
    if crf is not None and (chosen.crf is None or type(crf) is not int or not 0 <= crf <= largest):
        valid = f"a whole number from 0 to {largest}" if chosen.crf else "no crf"
        raise RequestError(f"crf {crf!r}: {path.name} takes {valid}")
    return Encoding(container, chosen.encoder, pixel_format or chosen.pixels[0], settings, options)


def check_output(path: Path, overwrite: bool, frames: int | None = None) -> None:
    """Make the folders of a video; refuse it before any work is done for it.

    Args:
        path: its name.
        overwrite: it may replace a file, or a folder of frames.
        frames: how many it will have.

    Raises:
        RequestError: as `choose_encoding` and `check_target`, for a folder with other files, and
            for a picture of several frames.
    """
    import av  # noqa: F401 (a run that cannot be written must not begin)

    choose_encoding(path)
    if path.suffix.lower() == ".png" and frames is not None and frames > 1:
        raise RequestError(one_frame(path, frames))
    if path.suffix or not path.is_dir():
        return check_target(path, overwrite)
    with explained(path):
        names = sorted(entry.name for entry in path.iterdir())
    other = [name for name in names if not re.fullmatch(r"\d{5,}\.png|recipe\.json", name)]
    if other:
        raise RequestError(f"{path} holds {other[0]}, no frame; choose another folder")
    if names and not overwrite:
        raise RequestError(f"{path} holds frames; choose another folder, or set overwrite")


def _refuse_other(name: str, value: str | None, valid: tuple[str, ...], path: Path) -> None:
    if value is not None and value not in valid:
        raise RequestError(f"{name} {value!r}: {path.name} takes {', '.join(valid)}")


class ApngWriter(VideoWriter):
    """Writes an animated PNG; ffmpeg writes no texts into it."""

    def seal(self, part: Path) -> None:
        """Insert the texts."""
        part.write_bytes(with_texts(part.read_bytes(), self.metadata))


class GifWriter(VideoWriter):
    """Writes a GIF with the 256 colours that fit each frame best, and the recipe as a comment."""

    def __enter__(self) -> Self:
        import av.filter

        super().__enter__()
        self._filters = av.filter.Graph()
        form = av.VideoFormat("rgb24", self.width, self.height)
        source = self._filters.add_buffer(
            None, self.width, self.height, form, time_base=1 / self.rate
        )
        both, sink = self._filters.add("split"), self._filters.add("buffersink")
        colours = self._filters.add("palettegen", "stats_mode=single")
        use = self._filters.add("paletteuse", "new=1")
        self._filters.link_nodes(source, both, colours)
        both.link_to(use, 1, 0)
        colours.link_to(use, 0, 1)
        self._filters.link_nodes(use, sink).configure()
        self._shown = count()
        return self

    def convert(self, rgb: av.VideoFrame) -> av.VideoFrame:
        """Return a frame with a palette of its own."""
        rgb.pts, rgb.time_base = next(self._shown), 1 / self.rate
        self._filters.vpush(rgb)
        return self._filters.vpull()

    def seal(self, part: Path) -> None:
        """Insert a comment between the header, with its palette if it has one, and a frame."""
        data = part.read_bytes()
        text = f"{RECIPE_KEY}={self.metadata.get(RECIPE_KEY, '')}".encode()
        blocks = (text[at : at + 255] for at in range(0, len(text), 255))
        comment = b"".join(bytes([len(block)]) + block for block in blocks)
        end = 13 + (6 << (data[10] & 7) if data[10] & 0x80 else 0)
        part.write_bytes(data[:end] + b"!\xfe" + comment + b"\0" + data[end:])


class FrameFolder(VideoWriter):
    """Writes a folder: `00000.png` and so on, and `recipe.json`."""

    def __enter__(self) -> Self:
        check_output(self.path, self.overwrite)
        self._part = temporary(self.path)
        with explained(self.path):
            self._part.mkdir()
        self._numbers = count()
        return self

    def write(self, frames: Frames) -> None:
        """Append frames [T, H, W, 3]."""
        with explained(self.path):
            for frame in frames:
                (self._part / f"{next(self._numbers):05}.png").write_bytes(png(frame, {}))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with explained(self.path):
                if kind is None:
                    (self._part / "recipe.json").write_text(self.metadata[RECIPE_KEY])
                    check_output(self.path, self.overwrite)  # again: other files may have come
                    publish(self._part, self.path, overwrite=self.overwrite)
        finally:
            with suppress(OSError):
                remove(self._part)
