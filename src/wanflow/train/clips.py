"""Read a folder of captioned videos, and encode it once into latents and text states.

Captions are in `clip.txt` next to `clip.mp4`, or in one list for all: `metadata.jsonl`,
`metadata.csv` or `captions.jsonl`, with the columns `file_name` and `text` (or `caption`). Pictures
are clips of one frame.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.clipfiles import stream_frames
from wanflow.config import RequestError
from wanflow.geometry import COMMON
from wanflow.screen import Screen
from wanflow.train.saving import is_whole, read_tensor, write_tensors
from wanflow.untrusted import (
    JSON_BYTES,
    check_regular,
    open_regular,
    parse_json,
    printable,
    read_bytes,
)

VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
LISTS = ("metadata.jsonl", "captions.jsonl", "metadata.csv")
CAPTION_BYTES, LINE_BYTES = 1 << 20, 1 << 20
EPSILON = 1e-4  # seconds by which the times in a file may be off
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Clip:
    """A clip or picture with its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Form:
    """The form of every clip in training: (width, height), frames, frames per second."""

    size: tuple[int, int]
    frame_num: int
    fps: float


def find_clips(folder: Path) -> list[Clip]:
    """Return every clip of a folder with its caption, sorted by name.

    Raises:
        RequestError: for a folder that is missing or empty, clips without captions, captions
            without clips.
    """
    if not folder.is_dir():
        raise RequestError(
            f"{folder}: there is no such folder; give one with clips and captions to --data"
        )
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEOS | PICTURES)
    if not files:
        raise RequestError(f"{folder} holds no clips ({', '.join(sorted(VIDEOS | PICTURES))})")
    table = next((folder / name for name in LISTS if (folder / name).exists()), None)
    if table is not None:
        captions = _listed(table)
        missing = sorted(name for name in captions if not _is_file(folder / name))
        if missing:
            raise RequestError(
                f"{table} names {printable(missing[0])}, which does not exist ({len(missing)} of"
                f" {len(captions)} are missing)"
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
    for clip in clips:
        name = printable(clip.path.name)
        if not clip.caption.strip():
            raise RequestError(f"the caption of {name} in {folder} is empty")
        try:
            clip.caption.encode()
        except UnicodeEncodeError:
            raise RequestError(f"the caption of {name} in {folder} is no Unicode text") from None
        check_regular(clip.path)
    return clips


def _text(file: Path, limit: int = CAPTION_BYTES) -> str:
    try:
        return read_bytes(file, limit).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RequestError(f"{printable(file)} cannot be read as text: {error}") from None


def _listed(table: Path) -> dict[str, str]:
    """Return {file name: caption} of a list."""
    text = _text(table, JSON_BYTES)
    try:
        rows: list[Any] = (
            list(csv.DictReader(io.StringIO(text)))
            if table.suffix == ".csv"
            else [
                parse_json(line, f"{table}, line {number}", LINE_BYTES)
                for number, line in enumerate(text.splitlines(), 1)
                if line.strip()
            ]
        )
    except csv.Error as error:
        raise RequestError(f"{printable(table)} is no table ({error})") from None
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        listed = row if isinstance(row, dict) else {}
        name, caption = listed.get("file_name"), listed.get("text") or listed.get("caption") or ""
        if not isinstance(name, str) or not name or not isinstance(caption, str):
            raise RequestError(
                f"{printable(table)}: row {number} has no file_name and text (or caption), both"
                " text"
            )
        found[name] = caption
    if not found:
        raise RequestError(f"{printable(table)} lists no clips")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def read_clip(path: Path, form: Form) -> Tensor:
    """Return the beginning of a clip in a form, [3, T, H, W] in -1..1.

    Frames are the nearest in time. Pictures are scaled to cover the size and cut from the middle.

    Raises:
        RequestError: for a file that is no video, or too short.
    """
    width, height = form.size
    frames: list[Tensor] = []
    before: tuple[float, Tensor] | None = None
    for at, picture in stream_frames(path):
        image = _fitted(torch.from_numpy(picture), width, height)
        while len(frames) < form.frame_num and at >= len(frames) / form.fps - EPSILON:
            due = len(frames) / form.fps
            # of two frames that are equally near, the earlier
            take_before = before is not None and due - before[0] <= at - due + EPSILON
            frames.append(before[1] if before is not None and take_before else image)
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


# latents and text states, encoded once


@dataclass(frozen=True)
class Sample:
    """One clip as an expert sees it, read from disk when it is drawn."""

    latent_file: Path
    text_file: Path

    def latent(self) -> Tensor:
        """Return the latent, [z, t, h, w] float32, normalised."""
        return read_tensor(self.latent_file, "latent").float()

    def picture(self) -> Tensor:
        """Return the latent of what the model sees of the first frame, [1, z, n, h, w] float32."""
        return read_tensor(self.latent_file, "picture").float().unsqueeze(0)

    def text(self, length: int) -> Tensor:
        """Return the text states, [length, D], zero past the caption's end."""
        states = read_tensor(self.text_file, "text")
        return F.pad(states, (0, 0, 0, length - len(states)))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _digest(file: Path) -> str:
    with open_regular(file) as data:
        return hashlib.file_digest(cast(BufferedReader, data), "sha256").hexdigest()


def prepare(
    clips: Sequence[Clip],
    form: Form,
    cache: Path,
    model: str,
    encode_clips: Callable[[], Callable[[Tensor], Mapping[str, Tensor]]],
    encode_texts: Callable[[], Callable[[str], Mapping[str, Tensor]]],
    screen: Screen,
    share: tuple[int, int] = (0, 1),
) -> tuple[list[Sample], Path]:
    """Encode every clip into `cache`, unless it is there; return the samples.

    Args:
        model: a fingerprint of the VAE and the text encoder.
        encode_clips: loads the VAE and returns [3, T, H, W] -> {"latent": [z, t, h, w]}, and the
            "picture" where the model takes one; called if a latent is missing.
        encode_texts: loads the text encoder and returns caption -> {"text": [S, D]}, without
            padding; called if a caption is missing.
        share: this process and how many there are; each encodes its share of the files.

    Returns:
        The samples, and the file of the empty caption's states.
    """
    cache.mkdir(parents=True, exist_ok=True)
    shape = f"{form.size} {form.frame_num} {form.fps:g}"
    latents = {
        clip.path: cache / f"latent-{_key(_digest(clip.path), shape, model)}.safetensors"
        for clip in clips
    }
    captions = dict.fromkeys(["", *(clip.caption for clip in clips)])
    texts = {caption: cache / f"text-{_key(caption, model)}.safetensors" for caption in captions}
    rank, size = share
    own_texts = dict(list(texts.items())[rank::size])
    own_latents = dict(list(latents.items())[rank::size])
    _encode("captions", own_texts, encode_texts, lambda text: text, "text", screen)
    _encode("clips", own_latents, encode_clips, lambda at: read_clip(at, form), "latent", screen)
    return [Sample(latents[clip.path], texts[clip.caption]) for clip in clips], texts[""]


def _encode(
    what: str,
    files: Mapping[T, Path],
    load: Callable[[], Callable[[U], Mapping[str, Tensor]]],
    read: Callable[[T], U],
    name: str,
    screen: Screen,
) -> None:
    """Write the missing and the damaged files, each with a tensor of this name."""
    missing = [(item, file) for item, file in files.items() if not is_whole(file, name)]
    if not missing:
        return
    encode = load()
    for number, (item, file) in enumerate(missing):
        screen.progress(f"encoding {what}", number, len(missing))
        write_tensors(file, encode(read(item)))
    screen.progress(f"encoding {what}", len(missing), len(missing))
