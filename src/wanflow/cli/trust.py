"""Read no file that only a recipe names: its writer may have named any file.

A recipe comes in a video, a picture, a saved run or a JSON file. It names the folder of the model,
files of single parts, and LoRAs. They are read where flags name their folder, or `--trust_paths`
is given; nothing looks into them before.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli.flags import CKPT_DIR, PARTS
from wanflow.config import RequestError
from wanflow.presets import EMBEDDED
from wanflow.request import PICTURES, Picture, PictureRecord, Request
from wanflow.untrusted import printable, user_path

if TYPE_CHECKING:
    from wanflow.recipe import ModelRecord, Recipe

logger = logging.getLogger("wanflow")
SHOWN = 12  # files that a message names


def with_trusted_paths(
    args: argparse.Namespace,
    recipe: Recipe,
    source: object,
    weights: bool = True,
    loras: bool = True,
) -> Recipe:
    """Return the recipe with its LoRAs where they may be read, and log what will be read.

    A LoRA that lies outside the folders that flags name is looked for in each `--lora_dir`, by its
    file's name. Its fingerprint still has to be that of the recipe.

    Args:
        args: of the command; see `trust_flags`.
        recipe: of a stranger.
        source: the file that holds it, for messages.
        weights: whether its model and parts are used, not those of flags.
        loras: whether its LoRAs are used.

    Raises:
        RequestError: naming the files that no flag allows.
    """
    roots = _roots(args)
    named = list(_weights(recipe.model)) if weights else []
    request, fingerprints = recipe.request, recipe.loras
    if loras and request.lora:
        found = {lora.path: _found(lora.path, args.lora_dir or (), roots) for lora in request.loras}
        named += [("lora", path) for path in found.values()]
        moved = (replace(lora, path=found[lora.path]) for lora in request.loras)
        request = replace(request, lora=tuple(str(lora) for lora in moved))
        fingerprints = {found.get(path, path): digest for path, digest in fingerprints.items()}
    refused = [] if args.trust_paths else [one for one in named if not _inside(one[1], roots)]
    if refused:
        raise RequestError(
            f"{printable(source)}: its recipe names files that this command does not:"
            f" {_listed(refused)}; name their folders with --ckpt_dir and --lora_dir, or read them"
            " with --trust_paths if you trust it"
        )
    if named:
        logger.info("the recipe in %s reads %s", printable(source), _listed(named))
    return replace(recipe, request=request, loras=fingerprints)


def with_trusted_pictures(args: argparse.Namespace, recipe: Recipe, source: Path) -> Recipe:
    """Return the recipe with files for its pictures that may be read; nothing looks into them.

    Args:
        args: of the command; its `image` and `last_image` name the files of another place.
        recipe: of a stranger.
        source: the file that holds it. A picture is also looked for in its folder, by name.

    Raises:
        RequestError: asking for a picture that no flag allows, by its hash.
    """
    request, roots = recipe.request, [*_roots(args), source.parent]
    for name in PICTURES:
        record, given = getattr(request, name), getattr(args, name, None)
        if record is None:
            continue
        path = str(given or _found(record.file, [source.parent], roots))
        if not given and not (path and (args.trust_paths or _inside(path, roots))):
            from wanflow.pictures import wanted

            place = f"a picture at {printable(path)}" if path else "no file of its picture"
            trust = ", or read it there with --trust_paths if you trust it" if path else ""
            raise RequestError(
                f"{printable(source)}: its recipe names {place}; {wanted(record, name)}{trust}"
            )
        if not given:
            logger.info("the recipe in %s reads %s %s", printable(source), name, printable(path))
        request = replace(request, **{name: replace(record, file=path)})
    return replace(recipe, request=request)


def unread(request: Request) -> Request:
    """Return a request of a recipe with pictures without pixels: their shape is all it needs."""
    known: dict[str, Any] = {}
    for name in PICTURES:
        if isinstance(record := getattr(request, name), PictureRecord):
            known[name] = Picture(**vars(record))
    return replace(request, **known)


def is_embedded(model: ModelRecord) -> bool:
    """Return whether a recipe's model is the miniature inside wanflow, wherever that lay."""
    folder = user_path(model.folder)
    home = EMBEDDED.get(model.name)
    return home is not None and (folder == home or not os.path.lexists(folder))


def named_files(recipe: Recipe, saved: bool) -> list[tuple[str, str]]:
    """Return (what, path) of every local file or folder that a recipe reads.

    A `saved` run holds its pictures.
    """
    request = recipe.request
    pictures = () if saved else (("image", request.image), ("last_image", request.last_image))
    return [
        *_weights(recipe.model),
        *(("lora", lora.path) for lora in request.loras),
        *((name, one.file) for name, one in pictures if one is not None and one.file),
    ]


def _roots(args: argparse.Namespace) -> list[Any]:
    """Return the folders that flags and the environment name."""
    folders = [*(args.lora_dir or ()), os.environ.get(CKPT_DIR), args.ckpt_dir]
    return [folder for folder in folders if folder not in (None, "", *EMBEDDED)]


def _weights(model: ModelRecord) -> Iterable[tuple[str, str]]:
    if not is_embedded(model):
        yield "model", model.folder
    for part, path in model.parts.items():
        if part not in PARTS:
            raise RequestError(f"model.parts.{printable(part)} is none of {', '.join(PARTS)}")
        yield part, path


def _found(path: str, folders: Iterable[str | Path], roots: list[str | Path]) -> str:
    """Return where a LoRA is: its path, or a file of that name in one of the folders."""
    name = path.replace("\\", "/").rpartition("/")[2]
    here = _inside(path, roots) and os.path.lexists(user_path(path))
    if here or name in ("", ".", ".."):
        return path
    places = (user_path(folder) / name for folder in folders)
    return next((str(place) for place in places if os.path.lexists(place)), path)


def _inside(path: str, roots: Iterable[str | Path]) -> bool:
    """Return whether a path is in one of the folders, by its text: links there are the user's."""
    whole = user_path(path)
    if ".." in whole.parts:
        return False
    place = Path(os.path.abspath(whole))
    return any(place.is_relative_to(os.path.abspath(user_path(root))) for root in roots)


def _listed(named: list[tuple[str, str]]) -> str:
    words = [f"{what} {printable(path)}" for what, path in dict.fromkeys(named)]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
