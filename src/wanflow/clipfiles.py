"""Read the frames and the recipe of videos and pictures, and draw contact sheets.

The files are from strangers; what writes ours is in `media`. Frames are uint8 [T, H, W, 3], RGB.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from wanflow.config import RequestError
from wanflow.media import EXACT, RECIPE_KEY, save_picture
from wanflow.untrusted import open_regular, parse_json, printable, read_bytes

if TYPE_CHECKING:
    from wanflow.pipeline import Frames

# Formats that are read. Without this list ffmpeg also takes text files (drawn as ANSI art) and
# playlists of other files.
READABLE = "mp4,webm,avi,gif,apng,png_pipe,jpeg_pipe,webp_pipe"
PNG_MAGIC, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SEGMENT = b"\x18\x53\x80\x67"  # of Matroska; its length follows
RECIPE_LENGTH = 1 << 20  # characters
PICTURE_BYTES = 512 << 20
MAX_PIXELS = 1 << 28  # of a frame: 16384 * 16384, the largest that wanflow makes
MAX_BYTES = 4 << 30  # of all frames at once
GAP = 4  # pixels between the pictures of a contact sheet
SHEET_FRAMES = 20
LABEL = 14  # pixels: the height of a frame's number on a sheet
# Pixels: the longer side of a picture on a sheet; an integer factor scales it into this range.
SHEET_SIDE = (192, 480)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the recipe inside a video, picture or folder of frames that wanflow made.

    Raises:
        RequestError: if there is none, or the file is missing, damaged or something else.
    """
    if path.is_dir():
        recipe_file = path / "recipe.json"
        texts = (
            {RECIPE_KEY: read_bytes(recipe_file).decode(errors="replace")}
            if recipe_file.exists()
            else {}
        )
    elif _is_png(path):
        texts = _png_texts(path)
    else:
        with _opened(path) as (container, _):
            texts = {key.lower(): text for key, text in container.metadata.items()}
            key, _, text = texts.get("comment", "").partition("=")  # in a GIF
            texts = {key: text} | texts
    if RECIPE_KEY not in texts:
        raise RequestError(f"{path} holds no wanflow recipe: another program made or re-encoded it")
    try:
        recipe = parse_json(texts[RECIPE_KEY], path, RECIPE_LENGTH)
    except RequestError as error:
        raise RequestError(f"{error}; its wanflow recipe is damaged") from None
    if not isinstance(recipe, dict):
        raise RequestError(f"{printable(path)}: its wanflow recipe is damaged")
    return recipe


def read_frames(path: Path) -> tuple[Frames, float]:
    """Return the frames of a video or PNG, uint8 [T, H, W, 3], and the frames per second.

    Of a folder, its PNG files by name, at the rate that its recipe says.

    Raises:
        RequestError: if the file is missing, damaged or no video.
    """
    if path.is_dir():
        pictures = [read_frames(file)[0] for file in sorted(path.glob("*.png"))]
        if len({picture.shape for picture in pictures}) != 1:
            raise RequestError(f"{path} holds no PNG files, or of several sizes")
        request = read_recipe(path).get("request")
        fps = request.get("fps") if isinstance(request, dict) else None
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1000:
            raise RequestError(f"{path}: its recipe names no frames per second")
        return np.concatenate(pictures), float(fps)
    with _opened(path) as (container, stream):
        frames, size = [], 0
        for frame in container.decode(stream):
            frames.append(_pixels(frame))
            size += frames[-1].nbytes
            if size > MAX_BYTES:
                raise RequestError(f"{printable(path)}: its frames take more than 4 GiB")
        rate = stream.average_rate
        if not frames or not rate:
            raise RequestError(f"{path} holds no frames")
        return np.stack(frames), float(rate)


def stream_frames(path: Path) -> Iterator[tuple[float, Frames]]:
    """Yield each frame as it is decoded: seconds since the first one, and uint8 [H, W, 3].

    Raises:
        RequestError: if the file is missing, damaged or no video.
    """
    with _opened(path) as (container, stream):
        begin: float | None = None
        for number, frame in enumerate(container.decode(stream)):
            at = frame.time
            if at is None:
                at = number / float(stream.average_rate or 1)
            begin = at if begin is None else begin
            yield at - begin, _pixels(frame)


def contact_sheet(
    frames: Frames,
    path: Path,
    columns: int | None = None,
    count: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PNG of frames [T, H, W, 3] in a grid, row by row, each with its number from 1.

    Args:
        columns: pictures in a row; by default the sheet is about 16:10.
        count: pictures, evenly spaced from the first frame to the last; by default up to 20.
        overwrite: replace an existing file.

    Raises:
        RequestError, OSError: as `VideoWriter`.
    """
    total = min(len(frames), count or SHEET_FRAMES)
    numbers = np.linspace(0, len(frames) - 1, total).round().astype(int)
    labels = [str(number + 1) for number in numbers]
    save_picture(path, grid(frames[numbers], labels, columns), {}, overwrite)


def grid(pictures: Frames, labels: Sequence[str] = (), columns: int | None = None) -> Frames:
    """Return pictures [N, H, W, 3] in a grid, row by row, each with its label, as one picture."""
    from PIL import Image

    total, side = len(pictures), max(pictures.shape[1:3])
    if side > SHEET_SIDE[1]:
        factor = math.ceil(side / SHEET_SIDE[1])
        small = [Image.fromarray(picture).reduce(factor) for picture in pictures]
        pictures = np.stack([np.asarray(picture) for picture in small])
    factor = max(1, SHEET_SIDE[0] // side)
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = pictures.shape[1:3]
    columns = columns or min(total, max(1, round(math.sqrt(1.6 * total * height / width))))
    rows = math.ceil(total / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 32, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
        if labels:
            label = _label(labels[index])[:height, :width]
            sheet[top : top + label.shape[0], left : left + label.shape[1]] = label
    return sheet


def _label(text: str) -> Frames:
    """Return a text in white on black, uint8 [LABEL, W, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    width = int(font.getlength(text)) + 4
    picture = Image.new("RGB", (width, LABEL))
    ImageDraw.Draw(picture).text((2, 1), text, "white", font)
    return np.asarray(picture, dtype=np.uint8)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of an input into a RequestError of one line."""
    try:
        yield
    except RequestError:
        raise
    except FileNotFoundError:
        raise RequestError(f"{path}: there is no such file") from None
    except (
        av.FFmpegError,
        ValueError,
        IndexError,
        SyntaxError,  # Pillow's for a damaged chunk
        RuntimeError,
        EOFError,
        ArithmeticError,
        MemoryError,
        struct.error,
        zlib.error,
    ) as error:  # before OSError: some of ffmpeg's are both
        raise RequestError(
            f"{path} is no video or picture, or is damaged"
            f" ({getattr(error, 'strerror', None) or error})"
        ) from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    kind, options = _is_png(path), {"format_whitelist": READABLE, "max_pixels": str(MAX_PIXELS)}
    # Through a file object, so that no name is taken for an address, such as `a:b.mp4`.
    with (
        _readable(path),
        open_regular(path) as file,
        av.open(file, "r", kind, options, metadata_errors="replace") as container,
    ):
        if not container.streams.video:
            raise RequestError(f"{path} holds no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # The index stands first in our files, so one that was cut off opens well and would only
        # miss its end.
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if end > path.stat().st_size or _cut_off(path, container.format.name):
            raise RequestError(f"{path} is cut off: copy or download it again")
        yield container, stream


def _cut_off(path: Path, kind: str) -> bool:
    """Return whether a file misses its end, of kinds that would only show fewer frames."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(4096)
        file.seek(max(0, size - 4096))
        tail = file.read()
    if kind == "gif":
        return not tail.rstrip(b"\0").endswith(b";")
    if kind == "apng":
        return PNG_END not in tail
    place = begin.find(SEGMENT) + len(SEGMENT)
    if "matroska" not in kind or place < len(SEGMENT) or place >= len(begin):
        return False
    # The number of leading zeros is that of the bytes that follow; all ones: unknown, a stream.
    width = 9 - begin[place].bit_length()
    length = int.from_bytes(begin[place : place + width], "big") & ((1 << 7 * width) - 1)
    return length != (1 << 7 * width) - 1 and place + width + length > size


def _pixels(frame: av.VideoFrame) -> Frames:
    """Return a decoded frame as RGB, uint8 [H, W, 3]."""
    rgb = frame.to_ndarray(format="rgb24", interpolation=EXACT)
    return np.asarray(rgb, dtype=np.uint8)


def _is_png(path: Path) -> str | None:
    """Return ffmpeg's name for a PNG file, still or animated; None for any other."""
    with _readable(path), open_regular(path) as file:
        if file.read(len(PNG_MAGIC)) != PNG_MAGIC:
            return None
        return "apng" if b"acTL" in file.read(1 << 20) else "png_pipe"


def _png_texts(path: Path) -> dict[str, str]:
    """Return the texts of a PNG, after checking every chunk."""
    from PIL import Image

    if path.stat().st_size > PICTURE_BYTES:
        raise RequestError(f"{printable(path)}: more than 512 MiB, too long for a picture")
    try:
        with _readable(path), Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
            found = dict(picture.info)
    except Image.DecompressionBombError:
        raise RequestError(f"{printable(path)}: more pixels than a picture has") from None
    with _readable(path):
        if PNG_END not in path.read_bytes():  # Pillow does not read the last checksum
            raise RequestError(f"{path} is cut off: copy or download it again")
        return {str(key): text for key, text in found.items() if isinstance(text, str)}
