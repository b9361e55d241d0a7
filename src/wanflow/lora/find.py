"""Find the LoRA files that a request names, settle their strengths, and fingerprint them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from wanflow.checkpoint.containers import reading
from wanflow.checkpoint.parts import LORA_ENDINGS, expert_in_name
from wanflow.config import RequestError
from wanflow.request import Lora, Request
from wanflow.untrusted import check_regular, open_regular, user_path


def find_loras(loras: Iterable[Lora]) -> tuple[Lora, ...]:
    """Return the files behind these LoRAs, with the strength on each expert settled.

    A folder becomes the files in it. A file that is named for one expert applies to that one.

    Raises:
        RequestError: for what is missing or no regular file, and for a folder that holds neither
            one LoRA nor one pair.
    """
    found = []
    for lora in loras:
        path = user_path(lora.path)
        folder = os.path.isdir(path)  # also False for what may not be looked at
        if not folder:
            try:
                check_regular(path)
            except RequestError as error:
                raise RequestError(f"lora {error}") from None
        for file in _files(path) if folder else [path]:
            settled = replace(lora, path=str(file)).resolved(expert_in_name(file.name))
            if settled.high or settled.low or not folder:
                found.append(settled)
    return tuple(found)


def with_found_loras(request: Request) -> Request:
    """Return the request with its LoRAs as files, with settled strengths and first steps.

    Raises:
        RequestError: as `find_loras`.
    """
    found = tuple(str(lora) for lora in find_loras(request.loras()))
    return replace(request, lora=found, lora_from=None)


def _files(folder: Path) -> list[Path]:
    """The LoRA in a folder (PEFT's), or the pair, one file for each expert."""
    files = sorted(file for file in folder.iterdir() if file.suffix in LORA_ENDINGS)
    experts = {expert_in_name(file.name) for file in files}
    if len(files) == 1 or (len(files) == 2 and experts == {"high", "low"}):
        return files
    names = ", ".join(file.name for file in files[:4])
    content = f"{len(files)} files ({names})" if files else "no LoRA file"
    raise RequestError(
        f"lora {folder}: the folder holds {content}; expected one, or a pair with high and low in"
        " the names: give the files, as in --lora FILE"
    )


def lora_fingerprint(path: str) -> str:
    """Return 16 hex digits of a file's size and of a megabyte at its start, middle and end."""
    file = Path(path)
    with reading(file), open_regular(file) as data:
        size = os.fstat(data.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for start in (0, size // 2, max(0, size - (1 << 20))):
            data.seek(start)
            digest.update(data.read(1 << 20))
    return digest.hexdigest()[:16]


def lora_fingerprints(loras: Iterable[Lora]) -> dict[str, str]:
    """Return {file: fingerprint}, as a recipe records it."""
    return {path: lora_fingerprint(path) for path in dict.fromkeys(lora.path for lora in loras)}
