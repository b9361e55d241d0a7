"""Cache encoded prompts on disk, to save reading the text encoder (11 GB) for a known prompt.

Each prompt and encoder has one file, named by a hash of both. Neither the name nor the file reveals
the prompt. After any fault of a file or the folder, the prompt is encoded again. So it is for a
file that another user owns or may write: a forged encoding would make another video in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wanflow.checkpoint.checkpoint import Checkpoint, text_fingerprint
from wanflow.config import RequestError
from wanflow.files import atomic_path
from wanflow.untrusted import open_regular, parse_json

logger = logging.getLogger("wanflow")

FILES = 256  # at most 4 MB each at the published size (512 tokens), and 250 kB for a prompt of 30
LARGEST = 64 << 20  # bytes of a cache file at most
ROWS = 1 << 16  # tokens of a prompt at most
STALE = 3600  # seconds after which a temporary file has no writer any more
OURS = re.compile(r"[0-9a-f]{64}\.safetensors(\.[0-9a-f]{8,16}\.part)?")


def text_key(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> str:
    """Return all that the bits of an encoding depend on, except the prompt."""
    spec = checkpoint.spec
    return (
        f"{text_fingerprint(checkpoint)}\n{spec.text!r}\n{spec.dit.text_len}\n{dtype}\n"
        f"{device.type}\n{torch.__version__}"
    )


class TextCache:
    """Encoded prompts in a folder. Several processes may use it at once.

    Args:
        folder: made with the first file, for this user alone.
        key: all that encodings depend on except the prompt, see `text_key`.
        files: how many to keep; the least recently used go first.
        like: shape and dtype of every encoding; None: any.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        files: int = FILES,
        like: tuple[tuple[int, ...], torch.dtype] | None = None,
    ) -> None:
        self.folder, self.key, self.files, self.like = folder, key, files, like
        self._warned = False

    def get(self, prompt: str) -> Tensor | None:
        """Return a prompt's encoding on the CPU, bit-equal; None if it is unknown or damaged."""
        path = self._path(prompt)
        try:
            if path.is_symlink():
                return None
            with open_regular(path) as file:
                data = file.read(LARGEST + 1) if _only_ours(file) else b""
            if not 8 < len(data) <= LARGEST:
                return None
            header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], path)
            meta, stored = header["__metadata__"], load(data)["states"]
            rows = int(meta["rows"])
            shape = (*stored.shape[:-2], rows, stored.shape[-1])
            if (
                _checksum(path, stored, rows) != meta["sha256"]
                or rows > ROWS
                or not torch.isfinite(stored).all()
                or self.like not in (None, (shape, stored.dtype))
            ):
                return None
            zeros = stored.new_zeros(*stored.shape[:-2], rows - stored.shape[-2], stored.shape[-1])
            states = torch.cat([stored, zeros], dim=-2)
        except (
            RequestError,
            OSError,
            SafetensorError,
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
        ):
            return None
        with contextlib.suppress(OSError):  # a read-only folder
            os.utime(path)
        return states

    def put(self, prompt: str, states: Tensor) -> None:
        """Store an encoding [..., tokens, D] without the zero rows at its end.

        A failure is logged once. Encodings that are not finite are not stored.
        """
        if not torch.isfinite(states).all():
            return
        states = states.detach().cpu().contiguous()
        rows = states.shape[-2]
        # By bits: -0.0 is no zero.
        used = states.view(torch.uint8).any(dim=-1).reshape(-1, rows).any(dim=0).nonzero()
        stored = states[..., : int(used[-1]) + 1 if len(used) else 0, :].contiguous()
        path = self._path(prompt)
        meta = {"sha256": _checksum(path, stored, rows), "rows": str(rows)}
        try:
            self._make_folder()
            with atomic_path(path, overwrite=True) as part:
                part.touch(0o600, exist_ok=False)
                part.write_bytes(save({"states": stored}, metadata=meta))
            self._tidy(path)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "encoded prompts cannot be stored in %s: %s; they will be encoded again",
                    self.folder,
                    error.strerror or error,
                )
            self._warned = True

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{self.key}\0{prompt}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{name}.safetensors"

    def _make_folder(self) -> None:
        """Make the folder for this user alone, and one that an earlier version made, too."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.folder.mkdir(0o700)
        except FileExistsError:
            if all(OURS.fullmatch(path.name) for path in self.folder.iterdir()):
                with contextlib.suppress(OSError):  # another user's
                    self.folder.chmod(0o700)

    def _tidy(self, newest: Path) -> None:
        """Delete the oldest files beyond the limit, and stale temporary ones; no other files."""
        found: list[tuple[int, Path]] = []
        for path in self.folder.iterdir():
            if path == newest or not OURS.fullmatch(path.name):
                continue
            try:
                used = path.stat().st_mtime_ns
                if not path.name.endswith(".part"):
                    found.append((used, path))
                elif used < (time.time() - STALE) * 1e9:
                    path.unlink()
            except FileNotFoundError:  # another process was here first
                continue
        for _, path in sorted(found)[: max(0, len(found) + 1 - self.files)]:
            path.unlink(missing_ok=True)


def _only_ours(file: IO[bytes]) -> bool:
    """Return whether an open file is this user's, and no other may write it."""
    status = os.fstat(file.fileno())
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _checksum(path: Path, stored: Tensor, rows: int) -> str:
    """Return the sha256 of an encoding and its file name."""
    about = f"{path.name} {tuple(stored.shape)} {stored.dtype} {rows}"
    return hashlib.sha256(about.encode() + stored.view(torch.uint8).numpy().tobytes()).hexdigest()
