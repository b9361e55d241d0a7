"""Encoded prompts on disk, so that the text encoder (11 GB) is not read again for a prompt that it
has encoded before.

One file for each prompt and encoder, named by a hash of both: a prompt can be read neither from a
name nor from a file. Whatever is wrong with a file or the folder, the worst that happens is that a
prompt is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wanflow.checkpoint.checkpoint import Checkpoint, text_fingerprint

logger = logging.getLogger("wanflow")

FILES = 256  # at most 4 MB each at the published size (512 tokens), and 250 kB for a prompt of 30
LARGEST = 64 << 20  # bytes of a file that can be one of ours
STALE = 3600  # seconds after which nobody is still writing a file
OURS = re.compile(r"[0-9a-f]{64}\.safetensors(\.[0-9a-f]{16}\.part)?")


def text_key(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> str:
    """All that an encoding depends on beside the prompt, to the last bit on one machine."""
    spec = checkpoint.spec
    return "\n".join(
        [
            text_fingerprint(checkpoint),
            repr(spec.text),
            str(spec.dit.text_len),
            str(dtype),
            device.type,
            str(torch.__version__),
        ]
    )


class TextCache:
    """Encoded prompts in a folder. Several processes may use it at once.

    Args:
        folder: made when something is first kept.
        key: what the encodings depend on beside the prompt, see `text_key`.
        files: how many to keep; those that were not used for longest go first.
    """

    def __init__(self, folder: Path, key: str, files: int = FILES) -> None:
        self.folder, self.key, self.files = folder, key, files
        self._warned = False

    def get(self, prompt: str) -> Tensor | None:
        """What was put under this prompt, to the bit and on the CPU; None where nothing was, or it
        is damaged.
        """
        path = self._path(prompt)
        try:
            if path.stat().st_size > LARGEST:
                return None
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                kept = file.get_tensor("states").clone()
            rows = int(meta["rows"])
            if _checksum(path, kept, rows) != meta["sha256"]:
                return None
            missing = rows - kept.shape[-2]
            states = torch.cat(
                [kept, kept.new_zeros(*kept.shape[:-2], missing, kept.shape[-1])], dim=-2
            )
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError):
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return states

    def put(self, prompt: str, states: Tensor) -> None:
        """Keep an encoding [..., tokens, D]; zero rows at its end take no room. Where that fails, a
        warning says so, once.

        One that is not finite is not kept: what broke it may be gone the next time.
        """
        if not torch.isfinite(states).all():
            return
        states = states.detach().cpu().contiguous()
        rows = states.shape[-2]
        used = (
            states.view(torch.uint8).any(dim=-1).reshape(-1, rows).any(dim=0).nonzero()
        )  # by bits, for which -0.0 is no zero
        kept = states[..., : int(used[-1]) + 1 if len(used) else 0, :].contiguous()
        path = self._path(prompt)
        meta = {"sha256": _checksum(path, kept, rows), "rows": str(rows)}
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(save({"states": kept}, metadata=meta))
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            self._tidy(path)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "encoded prompts cannot be kept in %s: %s; they will be encoded again",
                    self.folder,
                    error.strerror or error,
                )
            self._warned = True

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{self.key}\0{prompt}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{name}.safetensors"

    def _tidy(self, newest: Path) -> None:
        """Delete what is too much, and what was left half written; files that are not ours are left
        alone.
        """
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


def _checksum(path: Path, kept: Tensor, rows: int) -> str:
    """Of all that makes up an encoding, and of the name it has."""
    about = f"{path.name} {tuple(kept.shape)} {kept.dtype} {rows}"
    return hashlib.sha256(about.encode() + kept.view(torch.uint8).numpy().tobytes()).hexdigest()
