"""Know the LoRAs of a server by name: those in the folders that its flags name, and no others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from wanflow.checkpoint.parts import LORA_ENDINGS
from wanflow.config import RequestError
from wanflow.request import parse_lora
from wanflow.untrusted import shown


def registered(folders: Iterable[Path]) -> dict[str, Path]:
    """Return files and folders by the name that a request may give: without the ending."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_dir() or path.suffix in LORA_ENDINGS:
                found.setdefault(path.name if path.is_dir() else path.stem, path)
    return found


def with_files(texts: Iterable[str], folders: Iterable[Path]) -> tuple[str, ...]:
    """Return LoRAs with the files behind their names; strengths and steps stay.

    Raises:
        RequestError: for a name that no folder has.
    """
    known, found = registered(folders), []
    for text in texts:
        lora = parse_lora(text)
        if lora.path not in known:
            names = ", ".join(sorted(known)) or "none; start the server with --lora_dir DIR"
            raise RequestError(f"lora {shown(lora.path)} is not registered; these are: {names}")
        found.append(str(replace(lora, path=str(known[lora.path]))))
    return tuple(found)
