"""Files that wanflow makes: colours, metadata, and that none is ever half there or overwritten
unasked.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from typing import Any

import av
import numpy as np
import pytest
import torch

from wanflow import video
from wanflow.clipfiles import (
    GAP,
    LABEL,
    _label,
    contact_sheet,
    read_frames,
    read_recipe,
    stream_frames,
)
from wanflow.config import RequestError
from wanflow.encoding import FrameFolder
from wanflow.media import RECIPE_KEY, VideoWriter, check_target, recipe_tags, save_picture
from wanflow.pipeline import to_uint8
from wanflow.sanity import OutputError
from wanflow.train.toy import COLOURS
from wanflow.video import Video

SIDE = 64


def moving(frames: int = 9, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A soft blob on a gradient, moving: [T, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    pictures = []
    for t in range(frames):
        blob = np.exp(
            -((x - width / 4 - 2 * t) ** 2 + (y - height / 2) ** 2) / (2 * (height / 6) ** 2)
        )
        pictures.append(np.stack([40 + 180 * blob, 60 + x * 60 / width, 200 - 120 * blob], axis=-1))
    return np.stack(pictures).round().astype(np.uint8)


def write(
    path: Path,
    frames: np.ndarray,
    fps: float = 16,
    metadata: dict[str, str] | None = None,
    **options: bool,
) -> Path:
    with VideoWriter(
        path, frames.shape[2], frames.shape[1], fps, metadata or {}, **options
    ) as writer:
        writer.write(frames)
    return path


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("clip") / "clip.mp4",
        moving(),
        metadata=recipe_tags({"seed": 7}, "a blob"),
    )


def test_a_moving_clip_comes_back(clip: Path) -> None:
    frames, fps = read_frames(clip)
    assert (frames.shape, frames.dtype, fps) == ((9, SIDE, SIDE, 3), np.uint8, 16.0)
    assert psnr(frames, moving()) > 38
    assert (
        min(psnr(a, b) for a, b in zip(frames, moving(), strict=True)) > 37
    )  # none lost, doubled or out of order


def test_frames_may_come_in_pieces_and_the_file_is_the_same(clip: Path, tmp_path: Path) -> None:
    with VideoWriter(
        tmp_path / "deep" / "er" / "b.mp4", SIDE, SIDE, 16, recipe_tags({"seed": 7}, "a blob")
    ) as writer:
        for start, stop in ((0, 1), (1, 5), (5, 9)):
            # A view with odd strides, as a permuted tensor gives.
            writer.write(moving()[start:stop].transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3))
    assert (tmp_path / "deep" / "er" / "b.mp4").read_bytes() == clip.read_bytes()


@pytest.mark.parametrize("fps", [16, 8.0, 23.976, 12.5])
def test_rate_and_duration(tmp_path: Path, fps: float) -> None:
    path = write(tmp_path / "a.mp4", moving(6), fps)
    assert read_frames(path)[1] == pytest.approx(fps, rel=1e-4)
    with av.open(str(path)) as container:
        assert container.duration is not None
        assert container.duration / av.time_base == pytest.approx(6 / fps, abs=2e-3)


def test_solid_colours_come_back(tmp_path: Path) -> None:
    colours = np.array(list(COLOURS.values()), np.uint8)
    frames, _ = read_frames(
        write(tmp_path / "a.mp4", np.broadcast_to(colours[:, None, None], (8, SIDE, SIDE, 3)))
    )
    assert np.abs(frames.astype(int) - colours[:, None, None]).max() <= 3


def test_the_stored_colours_are_bt709(tmp_path: Path) -> None:
    """The YUV values in the file against the standard's own formula, and the tags that tell a
    player so.
    """
    colours = np.array(list(COLOURS.values()), np.uint8)
    path = write(tmp_path / "a.mp4", np.broadcast_to(colours[:, None, None], (8, SIDE, SIDE, 3)))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (
            stream.color_primaries,
            stream.color_trc,
            stream.colorspace,
            stream.color_range,
        ) == (1, 1, 1, 1)
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        rows = [
            frame.to_ndarray() for frame in container.decode(stream)
        ]  # [H + H/2, W]: Y, then U, then V
        stored = [
            [image[20, 20], image[SIDE + 2, 20], image[SIDE + SIDE // 4 + 2, 20]] for image in rows
        ]
    red, green, blue = colours.T / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = np.stack(
        [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748],
        axis=1,
    )
    assert np.abs(np.array(stored, float) - expected).max() <= 1.5


def test_players_can_start_at_once(clip: Path) -> None:
    data = clip.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_metadata_survives(tmp_path: Path) -> None:
    prompt = "un cœur \"rouge\", 'it''s' 一个红色的圆 \U0001f534; a=b\\c\n# two"
    recipe = {
        "request": {"prompt": prompt, "seed": 2**63 - 1, "cfg_high": 4.0},
        "long": "é" * 100_000,
        "none": None,
    }
    tags = recipe_tags(recipe, prompt) | {"a key of my own": "yes"}
    for path in (write(tmp_path / "a.mp4", moving(2), metadata=tags), tmp_path / "a.png"):
        if path.suffix == ".png":
            save_picture(path, moving(1)[0], tags)
        assert read_recipe(path) == recipe
    with av.open(str(tmp_path / "a.mp4")) as container:
        found = container.metadata
    assert found["title"] == "wanflow"
    assert found["comment"] == found["description"] == prompt
    assert found["a key of my own"] == "yes"


def test_a_prompt_that_is_no_unicode_does_not_stop_the_writing(tmp_path: Path) -> None:
    recipe = {"prompt": "caf\udce9"}  # what Python makes of a Latin-1 byte on the command line
    assert (
        read_recipe(
            write(tmp_path / "a.mp4", moving(1), metadata=recipe_tags(recipe, recipe["prompt"]))
        )
        == recipe
    )


def test_a_picture_is_lossless_and_other_programs_read_it(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    frame = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    save_picture(tmp_path / "a%d.png", frame, {"wanflow": "{}", "comment": "naïve 圆"})
    with image_module.open(tmp_path / "a%d.png") as image:
        assert np.array_equal(np.asarray(image), frame)
        assert image.text == {"wanflow": "{}", "comment": "naïve 圆"}
    assert np.array_equal(read_frames(tmp_path / "a%d.png")[0], frame[None])
    assert names(tmp_path) == ["a%d.png"]


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_an_existing_file_is_refused_or_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"mine")

    def make(overwrite: bool) -> None:
        if suffix == ".png":
            save_picture(path, moving(1)[0], {}, overwrite)
        else:
            write(path, moving(2), overwrite=overwrite)

    with pytest.raises(RequestError, match=r"exists; choose another name or pass --overwrite"):
        make(False)
    assert path.read_bytes() == b"mine"
    make(True)
    assert read_frames(path)[0].shape[1:] == (SIDE, SIDE, 3)
    assert names(tmp_path) == [path.name]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"mine")
    for written in (0, 1, 60):  # before the header, before and after the encoder's delay
        with (
            pytest.raises(KeyboardInterrupt),
            VideoWriter(path, SIDE, SIDE, 16, {}, overwrite=True) as writer,
        ):
            writer.write(moving(written) if written else moving(1)[:0])
            raise KeyboardInterrupt
        assert path.read_bytes() == b"mine"
        assert names(tmp_path) == ["a.mp4"]
    with (
        pytest.raises(ValueError, match="no frame was written"),
        VideoWriter(path, SIDE, SIDE, 16, {}, overwrite=True),
    ):
        pass
    assert names(tmp_path) == ["a.mp4"]


def test_the_target_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    link = os.link

    def watch(source: Path, target: Path) -> None:
        seen.append((len(read_frames(source)[0]), target.exists()))
        link(source, target)

    monkeypatch.setattr(os, "link", watch)
    with VideoWriter(tmp_path / "a.mp4", SIDE, SIDE, 16, {}) as writer:
        writer.write(moving(9))
        assert not (tmp_path / "a.mp4").exists()
    assert seen == [(9, False)]
    assert names(tmp_path) == ["a.mp4"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with (
        pytest.raises(RequestError, match="--overwrite"),
        VideoWriter(path, SIDE, SIDE, 16, {}) as writer,
    ):
        writer.write(moving(9))
        path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine"
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_full_disk_is_named(clip: Path, tmp_path: Path, share: float) -> None:
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "a.mp4", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(clip.stat().st_size * share), limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"disk is full or failing.*a\.mp4.*free some space"
        ) as caught:
            write(path, moving())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_bad_places_are_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    for path, words in (
        (tmp_path, "not a plain file"),
        (tmp_path / "folder.mp4", "not a plain file"),
        (tmp_path / "file" / "a.mp4", "is a file"),
        (tmp_path / ("x" * 300), "too long"),
        (Path(os.devnull), "not a plain file"),
    ):
        with pytest.raises(RequestError, match=words):
            check_target(path, overwrite=True)

    def denied(self: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", denied)  # a chmod would not stop root
    with pytest.raises(
        RequestError, match=r"cannot write .*a\.mp4: Permission denied; choose another folder"
    ):
        write(tmp_path / "a.mp4", moving(1))
    assert names(tmp_path) == ["file", "folder.mp4"]


def test_frames_of_another_kind_are_refused(tmp_path: Path) -> None:
    for frames in (moving(1, height=32), moving(1).astype(np.float32), moving(1)[0]):
        with (
            pytest.raises(ValueError, match="not uint8"),
            VideoWriter(tmp_path / "a.mp4", SIDE, SIDE, 16, {}) as writer,
        ):
            writer.write(frames)
    assert names(tmp_path) == []


@pytest.mark.parametrize("share", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("suffix", [".webm", ".mkv", ".gif", ".apng"])
def test_files_without_their_end_give_no_frames(tmp_path: Path, suffix: str, share: float) -> None:
    recipe = {"request": {"prompt": "", "fps": 16.0}}
    path = Video(moving(), 16.0, recipe).save(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(RequestError, match="cut off"):
        read_frames(path)


def test_a_video_made_by_hand(tmp_path: Path) -> None:
    video = Video(moving(2), 16.0, {})
    assert video == video and video != Video(moving(2), 16.0, {})
    assert read_recipe(video.save(tmp_path / "a.mp4")) == {}
    for frames, name, words in (
        (moving(2).astype(np.float32), "b.mp4", "expected uint8"),
        (moving(2)[0], "b", "expected uint8"),
        (moving(2, 33, 64), "b.mp4", "needs even sides"),
    ):
        with pytest.raises(RequestError, match=words):
            Video(frames, 16.0, {}).save(tmp_path / name)
    assert Video(moving(2, 33, 63), 16.0, {}).save(tmp_path / "b.mkv").exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_cut_off_files_are_refused(clip: Path, tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        save_picture(path, moving(1)[0], recipe_tags({"seed": 7}, "a blob"))
        assert read_recipe(path) == {"seed": 7}
    whole = path.read_bytes() if suffix == ".png" else clip.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    for read in (read_recipe, read_frames):
        with pytest.raises(RequestError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


KINDS = ("a.mp4", "a.webm", "a.mkv", "a.gif", "a.apng", "frames")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_all_frames_and_the_recipe(tmp_path: Path, name: str) -> None:
    frames, recipe = moving(), {"request": {"prompt": "un cœur", "fps": 16.0}, "long": "é" * 3000}
    saved = Video(frames, 16.0, recipe).save(tmp_path / name)
    found, fps = read_frames(saved)
    assert found.shape == frames.shape and read_recipe(saved) == recipe
    assert fps == pytest.approx(16, rel=0.05)  # a GIF counts hundredths of a second
    if name in ("a.mkv", "a.apng", "frames"):
        assert np.array_equal(found, frames)
    else:
        assert psnr(found, frames) > 30
    first = data_of(saved)
    with pytest.raises(RequestError, match="exists|holds frames"):
        Video(frames[:1], 16.0, recipe).save(saved)
    Video(frames, 16.0, recipe).save(saved, overwrite=True)
    assert data_of(saved) == first, "two saves differ"
    assert names(tmp_path) == [name]


def data_of(path: Path) -> list[bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file.read_bytes() for file in files]


def test_a_gif_keeps_the_time_and_frames_that_are_equal(tmp_path: Path) -> None:
    still = np.repeat(moving(1), 9, axis=0)
    saved = Video(still, 16.0, {"request": {"prompt": ""}}).save(tmp_path / "a.gif")
    times = [at for at, _ in stream_frames(saved)]
    assert np.allclose(times, np.arange(9) / 16, atol=0.006)


@pytest.mark.parametrize(
    ("name", "encoding", "words"),
    [
        ("a.mp4", {"codec": "hevc", "crf": 20, "pixel_format": "yuv444p"}, ("hevc", "yuv444p")),
        ("a.webm", {"crf": 40, "pixel_format": "yuv444p"}, ("vp9", "yuv444p")),
        ("a.mkv", {"codec": "h264"}, ("h264", "yuv420p")),
        ("a.mkv", {}, ("ffv1", "bgr0")),
    ],
)
def test_codec_and_pixels_are_chosen(
    tmp_path: Path, name: str, encoding: dict[str, Any], words: tuple[str, str]
) -> None:
    video = Video(moving(3), 16.0, {"request": {"prompt": ""}})
    with av.open(str(video.save(tmp_path / name, **encoding))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == words
    if "crf" in encoding:
        other = video.save(tmp_path / f"b{name}", **encoding | {"crf": 1})
        assert other.stat().st_size > (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    ("name", "encoding", "words"),
    [
        ("a.jpg", {}, "unknown kind of file.*mp4.*webm.*folder of frames"),
        ("a.mp4.v2", {}, "unknown kind of file"),
        (".mp4", {}, "unknown kind of file"),
        ("a.png", {}, "a PNG holds one frame.*apng"),
        ("a.mp4", {"codec": "vp9"}, "codec 'vp9': a.mp4 takes h264, hevc"),
        ("a.webm", {"codec": 5}, "codec 5: a.webm takes vp9"),
        ("a.mp4", {"crf": 52}, "crf 52: a.mp4 takes a whole number from 0 to 51"),
        ("a.mp4", {"crf": True}, "crf True"),
        ("a.mp4", {"crf": "10"}, "crf '10'"),
        ("a.gif", {"crf": 20}, "crf 20: a.gif takes no crf"),
        ("a.mkv", {"pixel_format": "yuv420p"}, "pixel_format 'yuv420p': a.mkv takes bgr0"),
        ("frames", {"codec": "h264"}, "codec 'h264': frames takes png"),
        ("~nosuchuser/a.mp4", {}, "not a usable path"),
        ("a.mp4", {"codek": "h264"}, "save does not know codek; it knows overwrite, codec"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    tmp_path: Path, name: str, encoding: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=words):
        Video(moving(2), 16.0, {"request": {"prompt": ""}}).save(name, **encoding)
    assert names(tmp_path) == []


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    video = Video(moving(2), 16.0, {"request": {"prompt": ""}})
    (tmp_path / "frames").mkdir()
    video.save(tmp_path / "frames")  # an empty one is filled
    (tmp_path / "frames" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds notes\.txt, no frame"):
        video.save(tmp_path / "frames", overwrite=True)
    assert names(tmp_path / "frames") == ["00000.png", "00001.png", "notes.txt", "recipe.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_comes_into_a_folder_meanwhile_is_kept(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "frames"
    if overwrite:
        Video(moving(2), 16.0, {"request": {"prompt": ""}}).save(path)
    with (
        pytest.raises(RequestError, match=r"holds thesis\.tex"),
        FrameFolder(path, SIDE, SIDE, 16, {RECIPE_KEY: "{}"}, overwrite=overwrite) as writer,
    ):
        writer.write(moving(3))
        path.mkdir(exist_ok=True)
        (path / "thesis.tex").write_text("mine")
    assert (path / "thesis.tex").read_text() == "mine" and names(tmp_path) == ["frames"]


def test_a_folder_of_a_stranger_is_read_with_care(tmp_path: Path) -> None:
    folder = Video(moving(2), 16.0, {"request": {"prompt": "", "fps": 16.0}}).save(tmp_path / "a")
    for text in (b"\xff\xfe", b"[" * 10_000, b"{}", b'{"request": {"fps": "16"}}'):
        (folder / "recipe.json").write_bytes(text)
        with pytest.raises(RequestError, match="recipe"):
            read_frames(folder)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "00002.png")
        with pytest.raises(RequestError, match="regular file"):
            read_frames(folder)


def test_a_folder_whose_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="constant"):
        Video(np.zeros((3, 16, 16, 3), np.uint8), 8, {"request": {"prompt": ""}}).save(
            tmp_path / "frames"
        )
    assert names(tmp_path) == []


def test_a_video_shows_itself_in_one_line() -> None:
    assert repr(Video(moving(2), 12.5, {})) == "<Video: 2 frames of 64*64 at 12.5 fps>"


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n" * 100)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "flipped.png").write_bytes(b"")
    save_picture(tmp_path / "flipped.png", moving(1)[0], recipe_tags({}, ""), overwrite=True)
    data = bytearray((tmp_path / "flipped.png").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(data)
    for name in ("notes.txt", "list.m3u8", "noise.mp4", "flipped.png", "missing.mp4", "."):
        for read in (read_recipe, read_frames):
            with pytest.raises(
                RequestError, match=r"no video|damaged|no such|cannot|no .*recipe|no PNG"
            ):
                read(tmp_path / name)
    save_picture(tmp_path / "plain.png", moving(1)[0], {"comment": "hi"})
    for path in (write(tmp_path / "plain.mp4", moving(1)), tmp_path / "plain.png"):
        with pytest.raises(RequestError, match="holds no wanflow recipe"):
            read_recipe(path)
    for text in ("{", json.dumps([1])):
        with pytest.raises(RequestError, match="recipe is damaged"):
            read_recipe(
                write(tmp_path / "bad.mp4", moving(1), metadata={"wanflow": text}, overwrite=True)
            )


def test_contact_sheet_of_a_small_clip(tmp_path: Path) -> None:
    frames = moving(17)
    contact_sheet(frames, tmp_path / "a.png", columns=3, count=5)
    sheet = read_frames(tmp_path / "a.png")[0][0]
    big = 3 * SIDE
    assert sheet.shape == (2 * big + GAP, 3 * big + 2 * GAP, 3)
    for index, frame in enumerate((0, 4, 8, 12, 16)):
        top, left = index // 3 * (big + GAP), index % 3 * (big + GAP)
        shown = sheet[top : top + big, left : left + big]
        drawn = np.kron(frames[frame], np.ones((3, 3, 1), np.uint8))
        assert np.array_equal(shown[LABEL:], drawn[LABEL:])
        label = _label(str(frame + 1))
        assert np.array_equal(shown[:LABEL, : label.shape[1]], label) and (label > 200).any()
        assert np.array_equal(shown[:LABEL, label.shape[1] :], drawn[:LABEL, label.shape[1] :])
    assert not np.array_equal(_label("1"), _label("5"))
    assert len(np.unique(sheet[:, big : big + GAP])) == 1
    with pytest.raises(RequestError, match="exists"):
        contact_sheet(frames, tmp_path / "a.png")
    contact_sheet(frames, tmp_path / "a.png", overwrite=True)
    assert read_frames(tmp_path / "a.png")[0].shape[1:] == (
        4 * (big + GAP) - GAP,
        5 * (big + GAP) - GAP,
        3,
    )
    contact_sheet(frames[:1], tmp_path / "one.png")
    assert read_frames(tmp_path / "one.png")[0].shape[1:] == (big, big, 3)


def test_contact_sheet_of_a_large_clip_stays_small(tmp_path: Path) -> None:
    contact_sheet(np.full((81, 96, 960, 3), 77, np.uint8), tmp_path / "a.png", columns=4)
    sheet = read_frames(tmp_path / "a.png")[0][0]
    assert sheet.shape == (5 * (48 + GAP) - GAP, 4 * (480 + GAP) - GAP, 3)
    assert (sheet[LABEL:48, :480] == 77).all()


def test_to_uint8_cuts_off() -> None:
    values = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.5, 0.999, 1.0, 3.0])
    video = values.expand(3, 2, 4, 8).clone().requires_grad_()
    frames = to_uint8(video)
    assert (frames.shape, frames.dtype) == ((2, 4, 8, 3), np.uint8)
    assert frames[1, 2, :, 1].tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    assert torch.equal(video[0, 0, 0], values)  # the input is left alone
    layout = torch.arange(3 * 2 * 4 * 5).view(1, 3, 2, 4, 5)
    assert np.array_equal(
        to_uint8((layout + 0.5) / 127.5 - 1), layout[0].permute(1, 2, 3, 0).numpy()
    )
    with pytest.raises(ValueError, match="not \\[3, T, H, W\\]"):
        to_uint8(torch.zeros(2, 3, 1, 4, 4))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_pictures_without_bounds_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(RequestError, match="regular file"):
            read_recipe(path)
        with pytest.raises(RequestError, match="regular file"):
            read_frames(path)
    path = tmp_path / "huge.png"
    save_picture(path, np.zeros((16, 16, 3), np.uint8), {})
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 2**30, 2**30)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    for read in (read_recipe, read_frames):
        with pytest.raises(RequestError, match=r"huge\.png"):
            read(path)


class Slow(VideoWriter):
    """Writes a chunk once `go` is set, or fails at one; counts them."""

    go = Event()
    fails_at = -1
    chunks = 0

    def write(self, frames: np.ndarray) -> None:
        assert self.go.wait(60)
        if self.chunks == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Slow.chunks += 1
        super().write(frames)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr(video, "writer_of", lambda path: Slow)
    for name, value in {"go": Event(), "fails_at": -1, "chunks": 0}.items():
        monkeypatch.setattr(Slow, name, value)
    return Slow


def save(path: Path, chunks: Iterator[np.ndarray]) -> Path:
    return video.save_frames(path, chunks, 16, {}, False)


def test_a_thread_encodes_while_the_next_frames_are_decoded(
    slow: type[Slow], tmp_path: Path, clip: Path
) -> None:
    """Encoding the first chunk waits until the third is decoded, and no fourth is before that."""
    decoded: list[int] = []

    def chunks() -> Iterator[np.ndarray]:
        for start in range(9):
            if start == 3:
                assert slow.chunks > 0
            decoded.append(start)
            if start == 2:
                assert slow.chunks == 0
                slow.go.set()
            yield moving()[start : start + 1]

    path = save(tmp_path / "a.mp4", chunks())
    assert decoded == [*range(9)] and slow.chunks == 9
    assert np.array_equal(read_frames(path)[0], read_frames(clip)[0])
    assert not encoders()


def test_what_encoding_raises_ends_decoding(slow: type[Slow], tmp_path: Path) -> None:
    slow.go.set()
    slow.fails_at = 1
    decoded: list[int] = []

    def chunks() -> Iterator[np.ndarray]:
        for start in range(9):
            decoded.append(start)
            yield moving()[start : start + 1]

    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "a.mp4", chunks())
    assert len(decoded) < 6 and not names(tmp_path) and not encoders()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError])
def test_what_decoding_raises_ends_encoding(
    slow: type[Slow], tmp_path: Path, error: type[BaseException]
) -> None:
    slow.go.set()

    def chunks() -> Iterator[np.ndarray]:
        yield moving()[:1]
        yield moving()[1:2]
        raise error

    with pytest.raises(error):
        save(tmp_path / "a.mp4", chunks())
    assert not names(tmp_path) and not encoders()


def encoders() -> list[Thread]:
    return [one for one in enumerate_threads() if one.name.startswith("wanflow-encode")]
