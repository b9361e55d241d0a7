"""Name files without their folders in what clients get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wanflow.recipe import Recipe
from wanflow.request import parse_lora


def without_folders(recipe: Recipe) -> Recipe:
    """Return a recipe that names files without their folders: clients get it, inside the video."""
    model, request = recipe.model, recipe.request
    parts = {part: Path(file).name for part, file in model.parts.items()}
    loras = (parse_lora(text) for text in request.lora)
    named = tuple(str(replace(lora, path=Path(lora.path).name)) for lora in loras)
    return replace(
        recipe,
        model=replace(model, folder=Path(model.folder).name, parts=parts),
        request=replace(request, lora=named),
        loras={Path(file).name: known for file, known in recipe.loras.items()},
    )
