"""Pictures of strangers: every kind that is read, every kind that is refused, damaged files."""

from __future__ import annotations

import os
import random
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.picture_mutations import KINDS, damaged
from PIL import Image, ImageCms

from wanflow import pictures
from wanflow.config import RequestError
from wanflow.front import requests_of, with_pictures
from wanflow.pictures import open_picture
from wanflow.request import Picture, Request

Pixels = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(path: Path, picture: Pixels | Image.Image, **options: Any) -> Path:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


def refusal(value: object, name: str = "image") -> str:
    with pytest.raises(RequestError) as caught:
        open_picture(value, name)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message


# --- what is read ---


def test_a_file_an_image_and_an_array_are_one_picture(tmp_path: Path, pixels: Pixels) -> None:
    file = saved(tmp_path / "a.png", pixels)
    with Image.open(file) as image:
        found = [open_picture(value) for value in (file, str(file), image, pixels)]
    for picture in found:
        assert np.array_equal(picture.pixels, pixels) and picture.pixels.dtype == np.uint8
        assert (picture.width, picture.height) == (9, 6)
        assert picture.sha256 == found[0].sha256 and len(picture.sha256) == 64
    assert [picture.file for picture in found] == [str(file), str(file), "", ""]
    assert open_picture(found[0]) is found[0]


def test_the_hash_is_of_pixels_and_shape(tmp_path: Path, pixels: Pixels) -> None:
    first = open_picture(pixels).sha256
    assert open_picture(pixels.reshape(9, 6, 3)).sha256 != first
    assert open_picture(saved(tmp_path / "a.jpg", pixels)).sha256 != first
    changed = pixels.copy()
    changed[5, 8, 2] ^= 1
    assert open_picture(changed).sha256 != first
    assert first == pictures.digest(pixels[:, ::-1][:, ::-1])  # not contiguous


def test_a_picture_is_not_the_array_it_came_from(pixels: Pixels) -> None:
    image = Image.fromarray(pixels)
    found = [open_picture(pixels), open_picture(image)]
    pixels[:] = 0
    image.paste(0, (0, 0, 9, 6))
    assert all(picture.pixels.any() for picture in found)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_formats(tmp_path: Path, kind: str) -> None:
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    pixels = np.stack([grey] * 3, axis=2)
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(tmp_path / "name.txt", pixels, format=kind, **options)  # the content counts
    found = open_picture(file).pixels.astype(int)
    assert np.abs(found - pixels).max() <= (3 if kind == "JPEG" else 0)


CORNERS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]], np.uint8)
# What is stored under an orientation, by its definition: where row 0 and column 0 are seen.
STORED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.T,
    6: np.rot90(CORNERS),
    7: CORNERS[::-1, ::-1].T,
    8: np.rot90(CORNERS, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    large = STORED[orientation].repeat(16, axis=0).repeat(16, axis=1) * 20
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    file = saved(tmp_path / "a", large, format=kind, exif=exif, **options)
    expected = CORNERS.repeat(16, axis=0).repeat(16, axis=1) * 20
    with file.open("rb") as opened, Image.open(opened) as image:
        for value in (file, image):
            found = open_picture(value).pixels[..., 0]
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)


WHITE = np.full(3, 255)
RED = np.array([200, 0, 0])


def halves(mode: str) -> Image.Image:
    """A red picture whose left half is transparent, and whose right half is opaque."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[:, 4:, 3] = 200, 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_alpha_lies_on_white(mode: str) -> None:
    found = open_picture(halves(mode)).pixels
    assert np.array_equal(found[0, 0], WHITE) and not np.array_equal(found[0, 7], WHITE)


def test_half_transparent_is_mixed_with_white() -> None:
    array = np.full((4, 4, 4), (200, 0, 0, 51), np.uint8)
    assert open_picture(array).pixels[0, 0].tolist() == [244, 204, 204]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("key", [0, b"\x00\xff"])
def test_palette_transparency(tmp_path: Path, kind: str, key: int | bytes) -> None:
    if kind == "GIF" and isinstance(key, bytes):
        pytest.skip("a GIF has one transparent colour")
    image = Image.fromarray(np.tile(np.array([0, 1], np.uint8).repeat(4), (8, 1))).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    file = saved(tmp_path / "a", image, format=kind, transparency=key)
    found = open_picture(file).pixels
    assert np.array_equal(found[0, 0], WHITE) and np.array_equal(found[0, 7], RED)


@pytest.mark.parametrize(
    ("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("I;16", 0x0707), ("1", 0)]
)
def test_one_transparent_colour_without_a_palette(tmp_path: Path, mode: str, key: Any) -> None:
    grey = np.tile(np.array([7, 90], np.uint8).repeat(4), (8, 1))
    image = Image.fromarray(grey * np.uint16(257)) if mode == "I;16" else Image.fromarray(grey)
    if mode == "1":
        image = image.point(lambda value: 255 * (value > 50))
    image = image if mode == "I;16" else image.convert(mode)
    found = open_picture(saved(tmp_path / "a.png", image, transparency=key)).pixels
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == (255 if mode == "1" else 90)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("step", [256, 257])  # a byte shifted up, and a byte scaled up
def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path, kind: str, step: int) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    file = saved(tmp_path / "a", (values * step).astype(np.uint16), format=kind)
    assert np.array_equal(open_picture(file).pixels[..., 1], values)
    with Image.open(file) as image:
        assert np.array_equal(open_picture(image).pixels[..., 1], values)


def test_thirty_two_bit_integers_of_sixteen_bits() -> None:
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(open_picture(Image.fromarray(values * 257)).pixels[..., 1], values)
    for wrong in (values, values * 257 - 1, values * 70_000):
        assert "mode I; save it as PNG of 8 or 16 bits" in refusal(Image.fromarray(wrong))


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG of the given rows (each with its filter byte in front)."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_sixteen_bit_colour_keeps_its_range(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">12H", *[0, 0x80FF, 0xFFFF] * 4)
    file = tmp_path / "a.png"
    file.write_bytes(png(4, 4, row * 4, bits=16))
    assert open_picture(file).pixels[3, 3].tolist() == [0, 0x80, 0xFF]


def test_cmyk(tmp_path: Path) -> None:
    """Also as a JPEG, which holds it inverted, with Adobe's mark."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for file in (saved(tmp_path / "a.jpg", red), saved(tmp_path / "a.tif", red)):
        assert np.abs(open_picture(file).pixels.astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "RGBX"])
def test_other_modes(mode: str) -> None:
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    assert np.abs(open_picture(white).pixels.astype(int) - 255).max() <= 1


def test_floating_point_has_no_known_range() -> None:
    assert "image: floating-point pixels" in refusal(Image.new("F", (8, 8)))


def test_a_colour_profile_is_not_applied(tmp_path: Path, pixels: Pixels) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = saved(tmp_path / "a.png", pixels, icc_profile=profile)
    assert np.array_equal(open_picture(file).pixels, pixels)


def test_arrays(pixels: Pixels) -> None:
    grey = open_picture(pixels[..., 0]).pixels
    assert np.array_equal(grey, np.stack([pixels[..., 0]] * 3, axis=2))
    opaque = np.concatenate([pixels, np.full((6, 9, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(open_picture(opaque).pixels, pixels)
    assert np.array_equal(open_picture(pixels[::-1, ::2]).pixels, pixels[::-1, ::2])


def test_a_photo_with_more_pictures_behind_it(tmp_path: Path) -> None:
    photo, depth = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "black")
    file = saved(tmp_path / "a.jpg", photo, format="MPO", save_all=True, append_images=[depth])
    with Image.open(file) as image:
        assert image.format == "MPO"
    assert (open_picture(file).pixels > 250).all()


# --- what is refused ---


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    file = saved(tmp_path / "a", frames[0], format=kind, save_all=True, append_images=frames[1:])
    with Image.open(file) as image:
        for value in (file, image):
            assert "several frames or pages; give one of them" in refusal(value)
        assert open_picture(image.copy()).width == 16
    single = saved(tmp_path / "b", frames[0], format=kind, save_all=True)
    assert open_picture(single).width == 16


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "(array * 255).round()"),
        (np.zeros((3, 8, 8), np.float32), "(array * 255).round()"),
        (np.zeros((3, 8, 9), np.uint8), "array.transpose(1, 2, 0)"),
        (np.zeros((1, 8, 8, 3), np.uint8), "an array 1x8x8x3 of uint8; give uint8 [H, W, 3]"),
        (np.zeros((8, 8, 2), np.uint8), "an array 8x8x2"),
        (np.zeros(8, np.uint8), "an array 8 of"),
        (np.zeros((8, 8, 3), np.uint16), "of uint16"),
        (np.zeros((8, 8, 3), bool), "of bool"),
        (np.zeros((0, 8, 3), np.uint8), "8 x 0 pixels"),
        (np.zeros((8, 8), object), "of object"),
        ([[0]], "list is no picture; give a path, a PIL image or a uint8 array"),
        (b"a.png", "bytes is no picture"),
        (torch.zeros(3, 8, 8), "Tensor is no picture; give a path, a PIL image or a uint8 array"),
        (torch.zeros(3, 8, 8), "of a tensor: tensor.cpu().numpy()"),
        ("", "image: an empty name; give the path of a picture"),
        (" ", "image: an empty name"),
        ("https://example.com/a.png", "image: https://example.com/a.png is an address"),
        ("data:image/png;base64,AAAA", "save the picture first, and give its path"),
        (None, "NoneType is no picture"),
    ],
)
def test_what_is_no_picture(array: object, words: str) -> None:
    assert words in refusal(array) and refusal(array, "last_image").startswith("last_image: ")


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (4, 65), (1000, 4)])
def test_sides(tmp_path: Path, size: tuple[int, int]) -> None:
    assert f"{size[0]} x {size[1]} pixels" in refusal(Image.new("RGB", size))
    assert f"{size[0]} x {size[1]} pixels" in refusal(
        saved(tmp_path / "a.png", Image.new("L", size))
    )


def test_the_smallest_and_the_longest() -> None:
    assert open_picture(Image.new("RGB", (4, 64))).height == 64


@pytest.mark.parametrize(
    ("width", "height"), [(10_001, 10_000), (13_000, 13_000), (60_000, 60_000), (2**31 - 1, 4)]
)
def test_a_bomb_is_not_decoded(tmp_path: Path, width: int, height: int) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(width, height, b"\0"))
    assert "more than 100 megapixels" in refusal(file)


def test_a_bomb_of_zlib(tmp_path: Path) -> None:
    """Rows for more than the header says, and a text that grows a thousandfold."""
    file = tmp_path / "a.png"
    file.write_bytes(png(8, 8, bytes(64 << 20)))
    begin = time.perf_counter()
    assert open_picture(file).width == 8 and time.perf_counter() - begin < 30


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"hello, this is text", "not a picture in JPEG, PNG, WebP"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "not a picture"),
        (b"%PDF-1.4\n", "not a picture"),
        (b"P6 8 8 255\n" + bytes(192), "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "save it as PNG or JPEG"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    message = refusal(file)
    assert words in message and message.startswith(f"{file}: ")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_files_that_are_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = saved(tmp_path / "a", noise, format=kind)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert f"{file}: " in refusal(file)


def test_irregular_files(tmp_path: Path, pixels: Pixels) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "a pipe, a socket or a device"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "a pipe, a socket or a device"),
        (tmp_path / "gone.png", "there is no such file"),
        ("a\0b.png", "null character"),
        ("~nobody-of-that-name/a.png", "not a usable path"),
    ):
        assert words in refusal(path)
    (tmp_path / "link").symlink_to(saved(tmp_path / "a.png", pixels))
    assert open_picture(tmp_path / "link").width == 9


def test_names_that_a_terminal_obeys(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[31mred\nline.png"
    file.write_bytes(b"text")
    assert "\x1b" not in refusal(file)


def test_files_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    with file.open("wb") as sparse:
        sparse.truncate((512 << 20) + 1)
    assert "512 MiB; a picture has at most 512" in refusal(file)


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A grey TIFF of 8 x 8, with tags (number, type, count, value) changed or added."""
    known = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    entries = {number: (4, 1, value) for number, value in known.items()}
    entries |= {number: (kind, count, value) for number, kind, count, value in tags}
    folder = b"".join(struct.pack("<HHII", n, *entry) for n, entry in sorted(entries.items()))
    folder = struct.pack("<H", len(entries)) + folder + bytes(4)
    return b"II*\0" + struct.pack("<I", 72) + bytes(range(64)) + folder


@pytest.mark.parametrize(
    "tags",
    [
        [(256, 4, 1, 2**31)],
        [(257, 4, 1, 0)],
        [(258, 3, 1, 12)],
        [(258, 3, 1, 7)],
        [(258, 3, 2**32 - 1, 8)],
        [(259, 3, 1, 5)],
        [(259, 3, 1, 60000)],
        [(273, 4, 1, 2**32 - 1)],
        [(273, 4, 2**30, 8)],
        [(277, 3, 1, 60000)],
        [(279, 4, 1, 2**32 - 1)],
        [(274, 3, 1, 60000)],
        [(274, 2, 5, 8)],
        [(34665, 4, 1, 72)],
        [(339, 3, 1, 3)],
        [(700, 7, 60000, 8)],
    ],
)
def test_odd_tags_of_a_tiff(tmp_path: Path, tags: list[tuple[int, int, int, int]]) -> None:
    file = tmp_path / "a.tif"
    file.write_bytes(tiff())
    assert np.array_equal(open_picture(file).pixels[..., 0].ravel(), range(64))
    file.write_bytes(tiff(*tags))
    opened(file)


def opened(file: Path) -> Picture | None:
    """A picture, or None for a refusal in one line; within seconds."""
    begin = time.perf_counter()
    try:
        picture = open_picture(file)
    except RequestError as error:
        message = str(error)
        assert "\n" not in message and message.startswith(str(file))
        return None
    finally:
        assert time.perf_counter() - begin < 30
    assert picture.pixels.shape == (picture.height, picture.width, 3)
    return picture


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever bytes a file has: a picture or a refusal, and no word of a library (libtiff has)."""
    dice, file, outcomes = random.Random(kind), tmp_path / "a", set()
    for _ in range(150):
        file.write_bytes(damaged(dice, kind))
        outcomes.add(opened(file) is None)
    assert outcomes == {True, False}
    assert capfd.readouterr() == ("", "") or kind == "TIFF"


# --- of a request ---


def test_a_request_takes_every_kind(tmp_path: Path, pixels: Pixels) -> None:
    file = saved(tmp_path / "a.png", pixels)
    with Image.open(file) as image:
        for value in (str(file), file, image, pixels, open_picture(pixels)):
            ((one,), many) = requests_of("a", {"image": value, "last_image": value})
            assert isinstance(one.image, Picture) and isinstance(one.last_image, Picture)
            assert np.array_equal(one.image.pixels, pixels) and not many
            assert with_pictures(Request("a", image=value)).image == one.image
    assert with_pictures(Request("a")).image is None


def test_one_picture_of_a_list_is_opened_once(
    tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path / "a.png", pixels)
    real, opened = pictures._read_file, []
    monkeypatch.setattr(pictures, "_read_file", lambda path: opened.append(path) or real(path))
    requests, _ = requests_of(["a", "b", Request("c", image="gone.png")], {"image": file})
    assert len(opened) == 1 and all(one.image is requests[0].image for one in requests)
    with pytest.raises(RequestError, match=r"gone\.png: there is no such file"):
        requests_of(["a", Request("c", image="gone.png")], {})
    with pytest.raises(RequestError, match="last_image: list is no picture"):
        requests_of("a", {"last_image": [file, file]})


def test_a_record_stands_for_the_picture_in_its_file(tmp_path: Path, pixels: Pixels) -> None:
    file = saved(tmp_path / "a.png", pixels)
    kept = open_picture(file).record
    assert np.array_equal(open_picture(kept).pixels, pixels)
    saved(file, pixels[::-1])
    asked = f"name the picture of 9 x 6 pixels, sha256 {kept.sha256[:12]} with --last_image FILE"
    assert asked in refusal(kept, "last_image")
    file.unlink()
    assert asked in refusal(kept, "last_image")
