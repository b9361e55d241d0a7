"""Open pictures of strangers: every file, PIL image or array becomes 8-bit RGB pixels and a hash.

What the eye sees counts: the orientation in the EXIF data is applied, and transparency lies on
white. An embedded ICC profile is not applied, as in the official code: the numbers are parity.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from wanflow.config import RequestError
from wanflow.request import Picture, PictureRecord
from wanflow.untrusted import open_regular, picture_path, printable

Pixels = npt.NDArray[np.uint8]

# Pillow decodes these itself, in this order; EPS and PDF, which start another program, are not read
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
READ = "JPEG, PNG, WebP, BMP, TIFF and GIF"
MOST_BYTES = 512 << 20
MOST_PIXELS = 100_000_000
SHORTEST_SIDE = 4  # pixels
LONGEST_RATIO = 16  # of the sides
BITS = 258  # TIFF's tag of the bits of a number


def open_picture(value: object, name: str = "image") -> Picture:
    """Return the pixels of a picture, and their hash.

    Equal pixels have equal hashes, whether they come from a PNG file, a PIL image or an array; a
    file that was encoded again with loss has another.

    Args:
        value: a path, a PIL image, or a uint8 array: [H, W, 3], [H, W, 4] with alpha, or [H, W]; or
            the record of a picture, whose file must still hold it.
        name: of the value in messages that have no path to name.

    Raises:
        RequestError: for anything else, a damaged, animated or oversized picture, and pixels whose
            range is not known; in one line.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, PictureRecord):
        return _again(value, name)
    if isinstance(value, str | os.PathLike):
        file = os.fsdecode(value)
        return _picture(_read_file(picture_path(file, name)), file)
    if isinstance(value, Image.Image):
        with _damage(name):
            return _picture(_rgb(value, name), "")
    if isinstance(value, np.ndarray):
        return _picture(_rgb(_of_array(value, name), name), "")
    hint = "; of a tensor: tensor.cpu().numpy()" if hasattr(value, "numpy") else ""
    raise RequestError(
        f"{name}: {type(value).__name__} is no picture; give a path, a PIL image or a uint8 array"
        f" [H, W, 3]{hint}"
    )


def wanted(record: PictureRecord, name: str) -> str:
    """Return the words that ask for the picture of a recipe."""
    return f"name the picture of {record} with --{name} FILE"


def _again(record: PictureRecord, name: str) -> Picture:
    """Return the picture of a record; RequestError that asks for it where its file has another."""
    try:
        found = open_picture(record.file, name)
    except RequestError as error:
        raise RequestError(f"{error}; {wanted(record, name)}") from None
    if found.sha256 != record.sha256:
        raise RequestError(
            f"{printable(record.file)} is another picture ({found.record}); {wanted(record, name)},"
            f" or make another video: `wanflow generate --recipe VIDEO --{name} FILE`"
        )
    return found


def digest(pixels: Pixels) -> str:
    """Return the SHA-256 of `HEIGHTxWIDTH`, a line break, and the bytes of pixels [H, W, 3]."""
    height, width = pixels.shape[:2]
    found = hashlib.sha256(f"{height}x{width}\n".encode())
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()


def _picture(pixels: Pixels, file: str) -> Picture:
    height, width = pixels.shape[:2]
    return Picture(digest(pixels), width, height, file, pixels)


def _read_file(path: Path) -> Pixels:
    where = printable(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise RequestError(
                f"{where}: {size >> 20:,} MiB; a picture has at most {MOST_BYTES >> 20}"
            )
        if not size:
            raise RequestError(f"{where}: the file is empty; give a picture: {READ}")
        # From memory: of a file, Pillow asks for as many bytes at once as a damaged length says.
        return _read(file.read(), where)


def read_picture(data: bytes, name: str, most_pixels: int = MOST_PIXELS) -> Picture:
    """Return the picture in the bytes of a file.

    Args:
        data: the bytes.
        name: of the value in messages.
        most_pixels: that it may have, by its header: nothing larger is decoded.

    Raises:
        RequestError: as `open_picture`.
    """
    if not data:
        raise RequestError(f"{name}: the file is empty; give a picture: {READ}")
    return _picture(_read(data, name, most_pixels), "")


def _read(data: bytes, where: str, most_pixels: int = MOST_PIXELS) -> Pixels:
    with _damage(where), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if most_pixels < width * height <= MOST_PIXELS:
            raise RequestError(
                f"{where}: {width} x {height} pixels; at most {most_pixels / 1e6:g} megapixels are"
                " accepted: scale it down"
            )
        return _rgb(image, where)


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turn what Pillow warns of and raises into a RequestError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; pixels are counted in `_check_size`
            yield
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(
            f"{where}: not a picture in {READ}, or a damaged one; save it as PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(where) from None
    except Exception as error:  # Pillow's readers raise errors of nearly every kind
        reason = printable(error) or type(error).__name__
        raise RequestError(f"{where}: the picture is damaged or cut off ({reason})") from None


def _rgb(image: Image.Image, where: str) -> Pixels:
    """Return a picture's pixels, uint8 [H, W, 3], upright and on white."""
    _check_size(*image.size, where)
    # A phone's JPEG of several pictures (MPO) begins with the photo; depth and others follow it.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise RequestError(
            f"{where}: several frames or pages; give one of them: a PNG file of it, or frame.copy()"
            " in Python"
        )
    bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _of_numbers(image, bits, where)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # A copy: what becomes of a caller's image changes nothing here.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(width: int, height: int, where: str) -> None:
    """Raise RequestError for sides of which no video comes, or that fill the memory."""
    if width * height > MOST_PIXELS:
        raise _too_large(where)
    short, long = sorted((width, height))
    if short < SHORTEST_SIDE or long > LONGEST_RATIO * short:
        raise RequestError(
            f"{where}: {width} x {height} pixels; the shorter side must have at least"
            f" {SHORTEST_SIDE}, the longer one at most {LONGEST_RATIO} times as many; crop it"
        )


def _too_large(where: str) -> RequestError:
    return RequestError(
        f"{where}: a picture of more than {MOST_PIXELS // 10**6} megapixels; scale it down, far"
        " fewer become a video"
    )


def _of_numbers(image: Image.Image, bits: int, where: str) -> Image.Image:
    """Return an 8-bit grey picture of one with wider numbers: the high byte, as Pillow does."""
    if image.mode == "F":
        raise RequestError(f"{where}: floating-point pixels, of no known range; save it as PNG")
    numbers = np.asarray(image)
    low, high = int(numbers.min()), int(numbers.max())
    # 32-bit integers may stand for 8, 16 or 32 bits; only 16 can be seen from them.
    if bits < 16 or (image.mode == "I" and not (low >= 0 and 255 < high < 1 << 16)):
        raise RequestError(
            f"{where}: numbers from {low} to {high} in pixels of mode {image.mode}; save it as PNG"
            " of 8 or 16 bits"
        )
    grey = (numbers >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[numbers == transparent] = 255
    return Image.fromarray(grey)


def _of_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    """Return a uint8 array as a PIL image."""
    hint = ""
    if array.dtype.kind == "f":
        hint = "; of values from 0 to 1: (array * 255).round().astype('uint8')"
    elif array.ndim == 3 and array.shape[0] in (3, 4):
        hint = "; with colours first: array.transpose(1, 2, 0)"
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,), (4,)) or array.ndim < 2:
        shape = "x".join(map(str, array.shape))
        raise RequestError(
            f"{name}: an array {shape} of {printable(array.dtype)}; give uint8 [H, W, 3],"
            f" [H, W, 4] or [H, W]{hint}"
        )
    _check_size(array.shape[1], array.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(array))
