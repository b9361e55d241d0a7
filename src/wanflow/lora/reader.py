"""Files of adapters (LoRA, LoHa, LoKr, DoRA, differences) become changes of the official model's
parameters.

A key says three things: a module, in one of many spellings; a part of an adapter on it; and perhaps
an expert. `parse` reads that without knowing the model; `read_adapter` finds the modules in the
model and checks every shape before anything is read or multiplied.

Scale of a low-rank product: alpha / rank, alpha from the key beside the matrices, or PEFT's
configuration (a file beside or in the header; with use_rslora alpha / sqrt(rank)), else 1. What a
trainer noted in the header (`ss_network_alpha`) scales nothing, as in every other program: files
without alpha keys had it multiplied in, or never had it. Differences are taken as they are.
"""

from __future__ import annotations

import math
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanflow.checkpoint.containers import (
    TensorSource,
    open_folder,
    open_safetensors,
    open_torch,
    reading,
)
from wanflow.checkpoint.key_maps import expert_in_name, from_official
from wanflow.config import RequestError
from wanflow.lora.keys import IMAGE, IS_TEXT, Config, Module, configurations, parse
from wanflow.presets import Expert
from wanflow.transforms.lora import (
    Additive,
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    WeightDelta,
    shape_error,
)

IS_IMAGE, NO_MODULE = "image-to-video module, dropped for T2V", "no such module in this model"
REASONS = 12  # told in one line


@dataclass(frozen=True)
class AdapterFile:
    """A file's changes, by expert and official parameter name, and what became of its keys.

    A key that does not say its expert stands in both.
    """

    path: Path
    changes: Mapping[Expert, Mapping[str, WeightDelta]]
    unused: Mapping[str, str]  # key -> why
    modules: int  # that the file speaks of
    applied: int  # of them
    kinds: Mapping[
        str, int
    ]  # LoRA, LoHa, LoKr, difference, replacement, DoRA of one -> how many changes
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]  # none where nothing says any

    def report(self) -> str:
        """One line for the user: what applied, and which keys did not, with the reasons."""
        what = [" and ".join(self.kinds)]
        what += [f"rank {', '.join(map(str, self.ranks))}"] if self.ranks else []
        what += [f"alpha {', '.join(f'{alpha:g}' for alpha in self.alphas)}"] if self.alphas else []
        line = f"applied {self.applied} of {self.modules} modules ({', '.join(what)})"
        if self.unused:
            line += f"; not used: {len(self.unused)} keys ({_reasons(self.unused)})"
        return line


def _reasons(unused: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, why in unused.items():
        by_reason[why].append(key)
    told = [
        f"{why}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for why, keys in by_reason.items()
    ]
    return "; ".join(told[:REASONS]) + (
        f"; and {len(told) - REASONS} more reasons" if len(told) > REASONS else ""
    )


# changes


def _targets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Every spelling of a module's path -> the official paths, several where another project fuses
    them.
    """
    names: dict[str, tuple[str, ...]] = {}
    foreign = from_official("dit", "diffusers", shapes)
    for name in shapes:
        end = next((end for end in (".weight", ".bias") if name.endswith(end)), "")
        official, other = name.removesuffix(end), foreign[name].removesuffix(end)
        for spelling in (official, other, official.replace(".", "_"), other.replace(".", "_")):
            names.setdefault(spelling, (official,))
    for owner in [name.removesuffix(".to_v") for name in names if name.endswith(".to_v")]:
        for fused in ("qkv", "kv"):
            parts = tuple(official for x in fused for official in names.get(f"{owner}.to_{x}", ()))
            names[f"{owner}.to_{fused}"] = names[f"{owner}.to_{fused}".replace(".", "_")] = parts
    return names


@dataclass(frozen=True)
class Recipe:
    """One change of one parameter, as keys: the tensors it takes by field, and what else it
    uses.
    """

    kind: str
    make: Callable[..., Any]
    bias: bool  # of the module's bias, or its weight
    fields: Mapping[str, str]  # field of the change -> part
    rank: int | None = None
    magnitude: str | None = None  # the part
    scaled: bool = False


def _recipes(module: Module, source: TensorSource) -> list[Recipe]:
    """The changes that the parts of a module make up."""
    has, recipes = module.keys, []
    inner = _factors(module, source)
    direct = {"diff": ("difference", Difference), "set_weight": ("replacement", Replacement)}
    if inner is None and "diff" in has:
        inner = Recipe("difference", Difference, False, {"value": "diff"})
    magnitude = next((part for part in ("dora_scale", "magnitude_vector") if part in has), None)
    if inner is not None and magnitude:
        inner = replace(
            inner,
            kind=f"DoRA of {inner.kind}" if inner.kind != "LoRA" else "DoRA",
            magnitude=magnitude,
        )
    if inner is not None:
        recipes.append(inner)
    used = {part for recipe in recipes for part in recipe.fields.values()}
    recipes += [
        Recipe(kind, make, False, {"value": part})
        for part, (kind, make) in direct.items()
        if part in has and part not in used
    ]
    if "diff_b" in has:
        recipes.append(Recipe("difference", Difference, True, {"value": "diff_b"}))
    if "up_bias" in has:
        recipes.append(
            Recipe(
                "difference",
                Difference,
                True,
                {"value": "up_bias"},
                inner.rank if inner else None,
                None,
                True,
            )
        )
    return recipes


def _factors(module: Module, source: TensorSource) -> Recipe | None:
    """The LoRA, LoHa or LoKr among a module's parts."""
    has = module.keys

    def rank(*parts: str) -> int | None:
        sides = [source.tensors[has[part]].shape for part in parts if part in has]
        return next((shape[0] for shape in sides if shape), None)

    def taken(**fields: str) -> dict[str, str]:
        return {name: part for name, part in fields.items() if part in has}

    if {"up", "down"} <= has.keys():
        return Recipe(
            "LoRA", LowRank, False, taken(up="up", down="down", mid="mid"), rank("down"), None, True
        )
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= has.keys():
        names = {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
        return Recipe("LoHa", Hadamard, False, taken(**names), rank("hada_w1_b"), None, True)
    one = taken(w1="lokr_w1") or taken(w1="lokr_w1_a", w1_b="lokr_w1_b")
    two = taken(w2="lokr_w2") or taken(w2="lokr_w2_a", w2_b="lokr_w2_b", t2="lokr_t2")
    if not all(
        parts.keys() >= {name} and (len(parts) > 1 or f"lokr_{name}" in has)
        for parts, name in ((one, "w1"), (two, "w2"))
    ):
        return None
    return Recipe(
        "LoKr", Kronecker, False, {**one, **two}, rank("lokr_w1_b", "lokr_w2_b"), None, True
    )


def _made(
    recipe: Recipe, module: Module, scale: float, get: Callable[[str], Tensor]
) -> WeightDelta:
    """A recipe's change, of whatever tensors `get` gives for its keys."""
    tensors = {name: get(module.keys[part]) for name, part in recipe.fields.items()}
    if recipe.make is Replacement:
        return Replacement(tensors["value"])
    change: Additive = (
        Difference(tensors["value"] * scale)
        if recipe.make is Difference
        else recipe.make(**tensors, scale=scale)
    )
    if recipe.magnitude is None:
        return change
    magnitude = get(module.keys[recipe.magnitude])
    # PEFT's runs over the outputs whatever its shape; LyCORIS' shape says over which side it runs.
    return Decomposed(
        change, magnitude.flatten() if recipe.magnitude == "magnitude_vector" else magnitude
    )


def _split(change: WeightDelta, sizes: list[int]) -> list[WeightDelta] | None:
    """A change of stacked weights as one for each, by their rows; None for kinds that do not come
    apart.
    """
    if len(sizes) == 1:
        return [change]
    if isinstance(change, LowRank) and change.mid is None:
        return [replace(change, up=up) for up in change.up.split(sizes)]
    return (
        [Difference(value) for value in change.value.split(sizes)]
        if isinstance(change, Difference)
        else None
    )


# reading


class _Reading:
    """One file on its way to changes."""

    def __init__(
        self,
        source: TensorSource,
        shapes: Mapping[str, tuple[int, ...]],
        configs: Mapping[str, Config],
    ) -> None:
        self.source, self.shapes, self.configs = source, shapes, configs
        self.targets = _targets(shapes)
        self.changes: dict[Expert, dict[str, WeightDelta]] = {"high": {}, "low": {}}
        self.unused: dict[str, str] = {}
        self.kinds: Counter[str] = Counter()
        self.ranks: set[int] = set()
        self.alphas: set[float] = set()

    def apply(self, module: Module) -> bool:
        """Whether a module of the file changes anything in the model; keys without use are
        noted.
        """
        if IMAGE.search(module.key.path):
            return self._note(module.keys.values(), IS_IMAGE)
        official = self.targets.get(module.key.path.lstrip("_"))
        if official is None:
            return self._note(module.keys.values(), NO_MODULE)
        left, applied = set(module.keys) - {"alpha"}, False
        for recipe in _recipes(module, self.source):
            parts = {*recipe.fields.values(), *([recipe.magnitude] if recipe.magnitude else [])}
            left -= parts
            why = self._change(module, recipe, official)
            applied = applied or why is None
            if why:
                self._note([module.keys[part] for part in sorted(parts)], why)
        self._note(
            [module.keys[part] for part in sorted(left)], "the rest of its adapter is missing"
        )
        if "alpha" in module.keys and not applied:
            self._note([module.keys["alpha"]], "an alpha without its matrices")
        return applied

    def _note(self, keys: Iterable[str], why: str) -> bool:
        self.unused.update(dict.fromkeys(keys, why))
        return False

    def _change(self, module: Module, recipe: Recipe, official: tuple[str, ...]) -> str | None:
        """Make one change; the reason where that cannot be."""
        end = ".bias" if recipe.bias else ".weight"
        names = [
            path if path in self.shapes and not recipe.bias else path + end for path in official
        ]
        if not all(name in self.shapes for name in names):
            return f"no such parameter in this model ({names[0]})"
        experts: list[Expert] = [module.key.expert] if module.key.expert else ["high", "low"]
        if any(name in self.changes[expert] for name in names for expert in experts):
            return f"a second change of {names[0]}"
        sides = [self.shapes[name] for name in names]
        shape = (sum(side[0] for side in sides), *sides[0][1:])
        keys = [module.keys[part] for part in recipe.fields.values()]
        odd = [
            key
            for key in keys
            if not self.source.tensors[key].dtype.is_floating_point
            or self.source.tensors[key].packing
        ]
        if odd:
            return f"{self.source.tensors[odd[0]].dtype} holds no plain floating-point numbers"
        # The same change without memory: nothing is read, let alone multiplied, before its shapes
        # are known to fit.
        why = shape_error(
            _made(
                recipe,
                module,
                1.0,
                lambda key: torch.empty(self.source.tensors[key].shape, device="meta"),
            ),
            shape,
        )
        if why:
            return why
        alpha, scale = self._scale(module, recipe)
        made = _split(_made(recipe, module, scale, self._read), [side[0] for side in sides])
        if made is None:
            return f"a {recipe.kind} of {len(names)} fused weights does not come apart"
        for expert in experts:
            self.changes[expert].update(zip(names, made, strict=True))
        self.kinds[recipe.kind] += 1
        self.ranks |= {recipe.rank} if recipe.rank and recipe.make is not Difference else set()
        self.alphas |= {alpha} if alpha is not None else set()
        return None

    def _scale(self, module: Module, recipe: Recipe) -> tuple[float | None, float]:
        """A change's alpha, and what that makes of it."""
        if not recipe.scaled:
            return None, 1.0
        config = self.configs.get(module.key.component) or self.configs.get("") or Config()
        alpha = (
            read_alpha(self.source, module.keys["alpha"])
            if "alpha" in module.keys
            else config.alpha_of(module.key.path)
        )
        # LoKr of two whole factors has no rank to divide by; PEFT does divide, by the rank that it
        # was asked for.
        rank = recipe.rank or (
            config.rank_of(module.key.path) if config.alpha is not None else None
        )
        if alpha is None or not rank:
            return None, 1.0
        return alpha, alpha / (math.sqrt(rank) if config.rslora else rank)

    def _read(self, key: str) -> Tensor:
        value = self.source.read(key, torch.float32)
        if not value.isfinite().all():
            raise RequestError(
                f"{self.source.path}: {key} holds values that are not finite; the file is damaged,"
                " or its training failed"
            )
        return value


def read_alpha(source: TensorSource, key: str) -> float:
    """The number that a key holds."""
    if math.prod(source.tensors[key].shape) != 1:
        raise RequestError(
            f"{source.path}: {key} is {list(source.tensors[key].shape)}, and should be one number"
        )
    alpha = float(source.read(key).item())
    if not math.isfinite(alpha):
        raise RequestError(f"{source.path}: {key} is {alpha}")
    return alpha


def open_adapter(path: Path) -> TensorSource:
    """The tensors of a file as they are named in it, or of a folder that PEFT or diffusers wrote; a
    RequestError that names what is odd.
    """
    known = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
    with reading(path):
        file = next((path / name for name in known if (path / name).is_file()), path)
        if file.is_dir():
            return open_folder(file)
        return open_torch(file) if zipfile.is_zipfile(file) else open_safetensors(file)


def read_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    """All changes that a file makes to a model whose parameters have these official names and
    shapes; tensors are float32.

    Raises:
        RequestError: for a broken file, one that holds no adapter, one of which nothing applies, or
            values that are not finite.
    """
    source = open_adapter(Path(path))
    modules, unused = parse(source.tensors)
    spoken = [module for module in modules if module.keys.keys() != {"alpha"}]
    if not spoken and IS_TEXT not in unused.values():
        begin = ", ".join(list(source.tensors)[:3]) or "(nothing)"
        raise RequestError(
            f"{source.path} holds no LoRA or other adapter in any known naming; its tensors begin"
            f" {begin}"
        )
    reading = _Reading(source, shapes, configurations(source))
    applied = [module for module in modules if reading.apply(module)]
    unused |= reading.unused
    if not applied:
        raise RequestError(
            f"{source.path}: none of its {len(spoken)} modules applies to this model;"
            f" {_reasons(unused)}"
        )
    ranks, alphas = tuple(sorted(reading.ranks)), tuple(sorted(reading.alphas))
    return AdapterFile(
        source.path,
        reading.changes,
        unused,
        len(spoken),
        len(applied),
        dict(reading.kinds),
        ranks,
        alphas,
    )


def describe_adapter(source: TensorSource) -> dict[str, Any] | None:
    """What a file says of itself, for `inspect`; None where it holds no adapter. Only alphas are
    read.
    """
    modules, _ = parse(source.tensors)
    recipes = [(module, recipe) for module in modules for recipe in _recipes(module, source)]
    if not recipes:
        return None
    configs = configurations(source)
    alphas = {
        read_alpha(source, module.keys["alpha"]) for module, _ in recipes if "alpha" in module.keys
    }
    alphas |= {
        config.alpha for config in configs.values() if config.alpha is not None and not alphas
    }
    hints = {module.key.expert for module, _ in recipes} - {None}
    named = expert_in_name(str(source.path))
    return {
        "naming": ", ".join(dict.fromkeys(module.key.naming for module, _ in recipes)),
        "modules": sum(module.keys.keys() != {"alpha"} for module in modules),
        "kinds": dict(Counter(recipe.kind for _, recipe in recipes)),
        "ranks": sorted(
            {recipe.rank for _, recipe in recipes if recipe.rank and recipe.make is not Difference}
        ),
        "alphas": sorted(alphas),
        "rslora": any(config.rslora for config in configs.values()),
        "experts": sorted(hint for hint in hints if hint) or ([named] if named else []),
    }
