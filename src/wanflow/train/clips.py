"""A folder of videos with captions, as people keep them, and what training needs of it: latents and
text states, made once.

Captions stand in `clip.txt` beside `clip.mp4`, or in one list for all: `metadata.jsonl`,
`metadata.csv` or `captions.jsonl`, with the columns `file_name` and `text` (or `caption`). Pictures
are clips of one frame.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanflow.config import RequestError
from wanflow.files import atomic_path
from wanflow.geometry import COMMON
from wanflow.media import stream_frames

VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
LISTS = ("metadata.jsonl", "captions.jsonl", "metadata.csv")
EPSILON = 1e-4  # seconds by which the times in a file may be off
Say = Callable[[str], None]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Clip:
    path: Path
    caption: str


@dataclass(frozen=True)
class Form:
    """What every clip is brought to: width and height in pixels, frames, frames per second."""

    size: tuple[int, int]
    frame_num: int
    fps: float


def find_clips(folder: Path) -> list[Clip]:
    """Every clip of a folder with its caption, by name.

    Raises:
        RequestError: for a folder that is missing or empty, clips without captions, captions
            without clips.
    """
    if not folder.is_dir():
        raise RequestError(
            f"{folder}: there is no such folder; --data wants one with clips and their captions"
        )
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEOS | PICTURES)
    if not files:
        raise RequestError(f"{folder} holds no clips ({', '.join(sorted(VIDEOS | PICTURES))})")
    table = next((folder / name for name in LISTS if (folder / name).exists()), None)
    if table is not None:
        captions = _listed(table)
        missing = sorted(name for name in captions if not (folder / name).is_file())
        if missing:
            raise RequestError(
                f"{table} names {missing[0]}, which is not there ({len(missing)} of {len(captions)}"
                " are missing)"
            )
        clips = [Clip(folder / name, captions[name]) for name in sorted(captions)]
    else:
        bare = [file for file in files if not file.with_suffix(".txt").is_file()]
        if bare:
            raise RequestError(
                f"{len(bare)} of {len(files)} clips in {folder} have no caption, {bare[0].name} is"
                f" the first: write it into {bare[0].with_suffix('.txt').name}, or all into"
                " metadata.jsonl (file_name, text)"
            )
        texts = {file.with_suffix(".txt") for file in files}
        alone = sorted(text for text in folder.rglob("*.txt") if text not in texts)
        if alone:
            raise RequestError(
                f"{alone[0]} is a caption without a clip: add the clip, or take the file out of"
                f" {folder}"
            )
        clips = [Clip(file, _text(file.with_suffix(".txt"))) for file in files]
    empty = [clip.path.name for clip in clips if not clip.caption.strip()]
    if empty:
        raise RequestError(f"the caption of {empty[0]} in {folder} is empty")
    return clips


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read as text: {error}") from None


def _listed(table: Path) -> dict[str, str]:
    """{file name: caption} of a list."""
    text = _text(table)
    try:
        rows = (
            list(csv.DictReader(io.StringIO(text)))
            if table.suffix == ".csv"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
        found = {
            str(row["file_name"]): str(row.get("text") or row.get("caption") or "") for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{table} is no list of file_name and text ({error!r})") from None
    if not found:
        raise RequestError(f"{table} lists no clips")
    return found


def read_clip(path: Path, form: Form) -> Tensor:
    """The beginning of a clip at the wanted rate, scaled to cover the wanted size and cut from the
    middle: [3, T, H, W] in -1..1.

    Raises:
        RequestError: for a file that is no video, or too short.
    """
    width, height = form.size
    frames: list[Tensor] = []
    before: tuple[float, Tensor] | None = None
    for at, picture in stream_frames(path):
        image = _fitted(torch.from_numpy(picture), width, height)
        while len(frames) < form.frame_num and at >= (wanted := len(frames) / form.fps) - EPSILON:
            # the nearest in time; of two as near, the earlier
            frames.append(
                before[1]
                if before is not None and wanted - before[0] <= at - wanted + EPSILON
                else image
            )
        if len(frames) == form.frame_num:
            return torch.stack(frames, 1)
        before = at, image
    last = before[0] if before else 0.0
    need = (form.frame_num - 1) / form.fps
    raise RequestError(
        f"{path} lasts {last:.2f} s, and {form.frame_num} frames at {form.fps:g} per second need"
        f" {need:.2f} s; use longer clips, or a smaller --frame_num (this clip has room for"
        f" {COMMON.longest(len(frames))})"
    )


def _fitted(picture: Tensor, width: int, height: int) -> Tensor:
    """[h, w, 3] uint8 -> [3, height, width] float32 in -1..1."""
    image = picture.permute(2, 0, 1).unsqueeze(0).float()
    factor = max(height / image.shape[2], width / image.shape[3])
    if factor != 1:
        sides = (
            max(height, round(image.shape[2] * factor)),
            max(width, round(image.shape[3] * factor)),
        )
        image = F.interpolate(image, sides, mode="bilinear", antialias=True, align_corners=False)
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return (image[0, :, top : top + height, left : left + width] / 127.5 - 1).clamp(-1, 1)


# what is made once


@dataclass(frozen=True)
class Sample:
    """One clip as an expert sees it; read from disk when it is drawn."""

    latent_file: Path
    text_file: Path

    def latent(self) -> Tensor:
        """[z, t, h, w] float32, normalised."""
        return load_file(self.latent_file)["latent"].float()

    def text(self, length: int) -> Tensor:
        """[length, D], zero past the caption's end."""
        states = load_file(self.text_file)["text"]
        return F.pad(states, (0, 0, 0, length - len(states)))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def prepare(
    clips: Sequence[Clip],
    form: Form,
    cache: Path,
    model: str,
    encode_clips: Callable[[], Callable[[Tensor], Tensor]],
    encode_texts: Callable[[], Callable[[str], Tensor]],
    say: Say,
    wait: bool = False,
) -> tuple[list[Sample], Path]:
    """Latents and text states of every clip in `cache`, and the file of the empty caption's; what
    is there already is not made again.

    Args:
        model: what tells the VAE and the text encoder from others.
        encode_clips: loads the VAE and returns [3, T, H, W] -> latent [z, t, h, w]; called if
            anything is missing.
        encode_texts: loads the text encoder and returns caption -> states [S, D] without padding;
            likewise.
        wait: make nothing, and wait until another process has.
    """
    cache.mkdir(parents=True, exist_ok=True)
    shape = f"{form.size} {form.frame_num} {form.fps:g}"
    latents = {
        clip.path: cache / f"latent-{_key(_digest(clip.path), shape, model)}.safetensors"
        for clip in clips
    }
    captions = dict.fromkeys(["", *(clip.caption for clip in clips)])
    texts = {caption: cache / f"text-{_key(caption, model)}.safetensors" for caption in captions}
    _make("captions", list(texts.items()), encode_texts, lambda text: text, "text", say)
    _make(
        "clips",
        list(latents.items()),
        encode_clips,
        lambda path: read_clip(path, form),
        "latent",
        say,
    )
    return [Sample(latents[clip.path], texts[clip.caption]) for clip in clips], texts[""]


def _make(
    what: str,
    wanted: Iterable[tuple[T, Path]],
    load: Callable[[], Callable[[U], Tensor]],
    read: Callable[[T], U],
    name: str,
    say: Say,
) -> None:
    missing = [(item, file) for item, file in wanted if not file.exists()]
    if not missing:
        return
    encode, began = load(), time.monotonic()
    told = began
    for number, (item, file) in enumerate(missing, 1):
        with atomic_path(file, overwrite=True) as part:
            save_file({name: encode(read(item)).contiguous().cpu()}, part)
        now = time.monotonic()
        if now - told > 2 or number == len(missing):
            say(
                f"{what}: {number} of {len(missing)} encoded,"
                f" {(now - began) / number * (len(missing) - number):.0f} s left"
            )
            told = now
