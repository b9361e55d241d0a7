"""Pictures of strangers: damaged files of every format that is read."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from helpers.strangers import Attempt
from wanflow import pictures

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "MPO")


@cache
def whole(kind: str) -> bytes:
    """A good picture of 17 x 12, with metadata where the format has some."""
    noise = np.random.default_rng(2).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E], exif[0x9286] = 6, "a description", b"a comment"
    options: dict[str, Any] = {} if kind in ("GIF", "BMP") else {"exif": exif}
    compression = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    Image.fromarray(noise).save(content, kind, **options, **compression)
    return content.getvalue()


def damaged(rng: Random, kind: str) -> bytes:
    """The picture with other bytes, most of them in its head, where the structure is; one in three
    is cut off.
    """
    data = bytearray(whole(kind))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) if rng.random() < 0.4 else min(150, len(data)))
        data[place] = rng.choice((rng.randrange(256), 0, 255, data[place] ^ 1))
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])


def picture(folder: Path) -> Attempt:
    """A damaged picture, which is opened."""
    pictures.MOST_PIXELS = 10_000_000  # as many as the memory of a test holds

    def attempt(rng: Random) -> None:
        file = folder / "picture"
        file.write_bytes(damaged(rng, rng.choice(KINDS)))
        pictures.open_picture(file)

    return attempt
