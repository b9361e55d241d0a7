"""The LoRAs of a run: from what a user wrote to files, and from files to what they do to an expert.

A file is read when the expert it works on is, and not kept: a published pair takes 2.4 GB.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from wanflow.checkpoint.containers import reading
from wanflow.checkpoint.key_maps import expert_in_name
from wanflow.config import RequestError
from wanflow.lora.reader import read_adapter
from wanflow.request import Lora
from wanflow.sampling.experts import Expert
from wanflow.transforms.lora import Adapters, WeightDelta, changed

logger = logging.getLogger("wanflow")

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
Shapes = Mapping[str, tuple[int, ...]]  # of an expert's parameters, by official name


def find_loras(wanted: Iterable[Lora]) -> tuple[Lora, ...]:
    """Files with settled strengths: a folder becomes the files in it, and a file that is named for
    one expert works on that one.

    Raises:
        RequestError: for a path that is missing, or a folder without LoRAs or with more than a
            pair.
    """
    found = []
    for lora in wanted:
        path = Path(lora.path).expanduser()
        if not path.exists():
            raise RequestError(f"lora {lora.path}: there is no such file or folder")
        files = _folder(path) if path.is_dir() else [path]
        for file in files:
            one = replace(lora, path=str(file)).resolved(expert_in_name(file.name))
            if one.high or one.low or not path.is_dir():
                found.append(one)
    return tuple(found)


def _folder(folder: Path) -> list[Path]:
    """The LoRA of a folder (PEFT's), or the pair in it, one file for each expert."""
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)
    named = [expert_in_name(file.name) for file in files]
    if len(files) == 1 or (len(files) == 2 and set(named) == {"high", "low"}):
        return files
    what = (
        f"{len(files)} files ({', '.join(file.name for file in files[:4])})"
        if files
        else "no LoRA file"
    )
    raise RequestError(
        f"lora {folder}: the folder holds {what}, not one, and no pair of which the names say high"
        " and low; name the files"
    )


def lora_print(path: str) -> str:
    """16 hex digits that tell a LoRA file from another: its size, and a megabyte from its start,
    middle and end.
    """
    file = Path(path)
    with reading(file), file.open("rb") as data:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        for start in (0, size // 2, max(0, size - (1 << 20))):
            data.seek(start)
            digest.update(data.read(1 << 20))
    return digest.hexdigest()[:16]


def check_loras(loras: Iterable[Lora], shapes: Shapes) -> None:
    """Read every file once, and say what of it will be used.

    Raises:
        RequestError: for a file that is broken, no LoRA, or of which nothing fits.
    """
    for path in dict.fromkeys(lora.path for lora in loras):
        logger.info("lora %s: %s", Path(path).name, read_adapter(Path(path), shapes).report())


def attach(
    adapters: Adapters,
    which: Expert,
    loras: Mapping[str, Lora],
    strengths: tuple[float, ...],
    shapes: Shapes,
) -> None:
    """Make the live LoRAs of one expert those of a request, at these strengths; what is attached
    already is not read again.

    Called at every step: only what changed costs anything.

    Args:
        loras: by the names that `named` gives them.
    """
    wanted = {
        name: (lora, strength)
        for (name, lora), strength in zip(loras.items(), strengths, strict=True)
    }
    for name in adapters.names:
        if name not in wanted:
            adapters.remove(name)
    for name, (lora, strength) in wanted.items():
        if name in adapters.names:
            adapters.set_strength(name, strength)
        elif strength:
            # also a file that has nothing for this expert, or it would be read at every step
            adapters.attach(name, read_adapter(Path(lora.path), shapes).changes[which], strength)


def named(loras: tuple[Lora, ...]) -> dict[str, Lora]:
    """LoRAs by names that tell one file's content from another's, and a file that is given twice
    from itself.
    """
    prints = {lora.path: lora_print(lora.path) for lora in loras}
    names: dict[str, Lora] = {}
    for index, lora in enumerate(loras):
        repeats = sum(before.path == lora.path for before in loras[:index])
        names[f"{lora.path} {prints[lora.path]} {repeats}"] = lora
    return names


def fused(
    which: Expert, loras: Iterable[tuple[Lora, float]], shapes: Shapes
) -> dict[str, Callable[[str, Tensor], Tensor]]:
    """What LoRAs do to single weights, for `load_module` to do while it reads them: parameter ->
    (name, float32) -> float32.
    """
    done: dict[str, list[tuple[WeightDelta, float]]] = {}
    for lora, strength in loras:
        for name, change in read_adapter(Path(lora.path), shapes).changes[which].items():
            done.setdefault(name, []).append((change, strength))

    def apply(name: str, value: Tensor) -> Tensor:
        for change, strength in done[name]:
            value = changed(value, change, strength)
        return value

    return dict.fromkeys(done, apply)


def shapes_of(model: nn.Module) -> Shapes:
    """Of a model with no LoRA on it and no packed weights, as `build` makes it."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
