"""Read adapter files (LoRA, LoHa, LoKr, DoRA, differences) as deltas of the official parameters.

`parse_keys` splits the keys without knowing the model; `read_adapter` finds the modules in the
model and checks every shape before it reads or multiplies a tensor.

A low-rank product is scaled by alpha / rank. Alpha comes from a key next to the matrices, or from
PEFT's configuration (a file next to it, or in the header; with use_rslora alpha / sqrt(rank)), else
the scale is 1. A trainer's note in the header (`ss_network_alpha`) scales nothing, as in every
other program: files without alpha keys had it multiplied in, or never had it. Differences are
taken as they are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanflow.checkpoint.containers import TensorSource, reading
from wanflow.checkpoint.key_maps import from_official
from wanflow.checkpoint.parts import expert_in_name
from wanflow.checkpoint.source import open_container
from wanflow.config import RequestError
from wanflow.lora.keys import (
    EXPERTS,
    IMAGE,
    IS_TEXT,
    AdapterModule,
    PeftConfig,
    parse_keys,
    peft_configs,
)
from wanflow.presets import Expert, title
from wanflow.transforms.deltas import (
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

IS_IMAGE, NO_MODULE = "image-to-video module of Wan2.1, dropped", "no such module in this model"
MAX_REASONS = 12  # in one line of a report


@dataclass(frozen=True)
class AdapterFile:
    """The deltas of a file by expert and official parameter name, and a report on its keys.

    changes: a key that names no expert counts for both.
    unused: key -> reason.
    modules, applied: how many modules the file names, and how many of them changed something.
    kinds: LoRA, LoHa, LoKr, difference, replacement or "DoRA of ..." -> number of deltas.
    alphas: empty where the file gives none.
    """

    path: Path
    changes: Mapping[Expert, Mapping[str, WeightDelta]]
    unused: Mapping[str, str]
    modules: int
    applied: int
    kinds: Mapping[str, int]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    def report(self) -> str:
        """Return one line: what applies, and which keys do not, with the reasons."""
        what = [" and ".join(self.kinds)]
        if self.ranks:
            what.append(f"rank {', '.join(map(str, self.ranks))}")
        if self.alphas:
            what.append(f"alpha {', '.join(f'{alpha:g}' for alpha in self.alphas)}")
        line = f"applied {self.applied} of {self.modules} modules ({', '.join(what)})"
        if self.unused:
            line += f"; not used: {len(self.unused)} keys ({_reasons(self.unused)})"
        return line


def _reasons(unused: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, reason in unused.items():
        by_reason[reason].append(key)
    texts = [
        f"{reason}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for reason, keys in by_reason.items()
    ]
    more = len(texts) - MAX_REASONS
    return "; ".join(texts[:MAX_REASONS]) + (f"; and {more} more reasons" if more > 0 else "")


# How a module's parts make deltas


@dataclass(frozen=True)
class DeltaSpec:
    """One delta of one parameter, before its tensors are read.

    fields: of the delta -> part of the module. magnitude: the part, for DoRA.
    on_bias: whether it changes the module's bias rather than its weight.
    """

    kind: str
    delta: Callable[..., Any]
    fields: Mapping[str, str]
    on_bias: bool = False
    rank: int | None = None
    magnitude: str | None = None
    scaled: bool = False

    @property
    def parts(self) -> set[str]:
        return {*self.fields.values(), *([self.magnitude] if self.magnitude else [])}

    def make(
        self, module: AdapterModule, scale: float, get: Callable[[str], Tensor]
    ) -> WeightDelta:
        """Return the delta, of the tensors that `get` returns for its keys."""
        tensors = {name: get(module.keys[part]) for name, part in self.fields.items()}
        if self.delta is Replacement:
            return Replacement(tensors["value"])
        delta: Additive
        if self.delta is Difference:
            delta = Difference(tensors["value"] * scale)
        else:
            delta = self.delta(**tensors, scale=scale)
        if self.magnitude is None:
            return delta
        magnitude = get(module.keys[self.magnitude])
        # PEFT's is over the outputs in any shape; the shape of LyCORIS' says which side it is over.
        return Decomposed(
            delta, magnitude.flatten() if self.magnitude == "magnitude_vector" else magnitude
        )


def _delta_specs(module: AdapterModule, source: TensorSource) -> list[DeltaSpec]:
    """The deltas that the parts of a module make up."""
    has = module.keys
    factors = main = _factors(module, source)
    difference = DeltaSpec("difference", Difference, {"value": "diff"})
    if main is None and "diff" in has:
        main = difference
    magnitude = next((part for part in ("dora_scale", "magnitude_vector") if part in has), None)
    if main is not None and magnitude:
        kind = "DoRA" if main.kind == "LoRA" else f"DoRA of {main.kind}"
        main = replace(main, kind=kind, magnitude=magnitude)
    specs = [] if main is None else [main]
    if "diff" in has and factors is not None:
        specs.append(difference)
    if "set_weight" in has:
        specs.append(DeltaSpec("replacement", Replacement, {"value": "set_weight"}))
    if "diff_b" in has:
        specs.append(DeltaSpec("difference", Difference, {"value": "diff_b"}, on_bias=True))
    if "up_bias" in has:
        rank = main.rank if main else None
        specs.append(
            DeltaSpec("difference", Difference, {"value": "up_bias"}, True, rank, scaled=True)
        )
    return specs


def _factors(module: AdapterModule, source: TensorSource) -> DeltaSpec | None:
    """The LoRA, LoHa or LoKr in a module's parts."""
    has = module.keys

    def rank(*parts: str) -> int | None:
        shapes = [source.tensors[has[part]].shape for part in parts if part in has]
        return next((shape[0] for shape in shapes if shape), None)

    def present(**fields: str) -> dict[str, str]:
        return {name: part for name, part in fields.items() if part in has}

    if {"up", "down"} <= has.keys():
        fields = present(up="up", down="down", mid="mid")
        return DeltaSpec("LoRA", LowRank, fields, rank=rank("down"), scaled=True)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= has.keys():
        names = {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
        return DeltaSpec("LoHa", Hadamard, present(**names), rank=rank("hada_w1_b"), scaled=True)
    one = present(w1="lokr_w1") or present(w1="lokr_w1_a", w1_b="lokr_w1_b")
    two = present(w2="lokr_w2") or present(w2="lokr_w2_a", w2_b="lokr_w2_b", t2="lokr_t2")
    complete_one = "lokr_w1" in has or len(one) == 2
    complete_two = "lokr_w2" in has or ("w2" in two and len(two) > 1)
    if not (complete_one and complete_two):
        return None
    lokr_rank = rank("lokr_w1_b", "lokr_w2_b")
    return DeltaSpec("LoKr", Kronecker, {**one, **two}, rank=lokr_rank, scaled=True)


def _targets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Each spelling of a module's path -> its official path, or several that diffusers fuses."""
    targets: dict[str, tuple[str, ...]] = {}
    foreign = from_official("dit", "diffusers", shapes)
    for name in shapes:
        end = next((end for end in (".weight", ".bias") if name.endswith(end)), "")
        official, other = name.removesuffix(end), foreign[name].removesuffix(end)
        for spelling in (official, other, official.replace(".", "_"), other.replace(".", "_")):
            targets.setdefault(spelling, (official,))
    for owner in [name.removesuffix(".to_v") for name in targets if name.endswith(".to_v")]:
        for letters in ("qkv", "kv"):
            paths = tuple(path for x in letters for path in targets.get(f"{owner}.to_{x}", ()))
            fused = f"{owner}.to_{letters}"
            targets[fused] = targets[fused.replace(".", "_")] = paths
    return targets


def _split(delta: WeightDelta, sizes: list[int]) -> list[WeightDelta] | None:
    """A delta of stacked weights, split by their rows; None for a kind that does not split."""
    if len(sizes) == 1:
        return [delta]
    if isinstance(delta, LowRank) and delta.mid is None:
        return [replace(delta, up=up) for up in delta.up.split(sizes)]
    if isinstance(delta, Difference):
        return [Difference(value) for value in delta.value.split(sizes)]
    return None


# Reading


@dataclass
class _Reader:
    """The deltas of one file while it is read, and the reasons for keys that make none."""

    source: TensorSource
    shapes: Mapping[str, tuple[int, ...]]
    configs: Mapping[str, PeftConfig]
    unused: dict[str, str]
    experts: tuple[Expert, ...] = EXPERTS
    changes: dict[Expert, dict[str, WeightDelta]] = field(init=False)
    kinds: Counter[str] = field(default_factory=Counter)
    ranks: set[int] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.targets = _targets(self.shapes)
        self.changes = {expert: {} for expert in self.experts}

    def read(self, module: AdapterModule) -> bool:
        """Read the deltas of a module; return whether it changes anything in the model."""
        if IMAGE.search(module.key.path):
            return self._skip(module.keys.values(), IS_IMAGE)
        named = module.key.expert
        if named is not None and named not in self.experts:
            absent = f"for the {title(named)}, which this model does not have"
            return self._skip(module.keys.values(), absent)
        official = self.targets.get(module.key.path.lstrip("_"))
        if official is None:
            return self._skip(module.keys.values(), NO_MODULE)
        left, applied = set(module.keys) - {"alpha"}, False
        for spec in _delta_specs(module, self.source):
            left -= spec.parts
            reason = self._read_delta(module, spec, official)
            if reason is None:
                applied = True
            else:
                self._skip([module.keys[part] for part in sorted(spec.parts)], reason)
        incomplete = [module.keys[part] for part in sorted(left)]
        self._skip(incomplete, "the rest of its adapter is missing")
        if "alpha" in module.keys and not applied:
            self._skip([module.keys["alpha"]], "an alpha without its matrices")
        return applied

    def _skip(self, keys: Iterable[str], reason: str) -> bool:
        self.unused.update(dict.fromkeys(keys, reason))
        return False

    def _read_delta(
        self, module: AdapterModule, spec: DeltaSpec, official: tuple[str, ...]
    ) -> str | None:
        """Read one delta; the reason where it cannot apply."""
        end = ".bias" if spec.on_bias else ".weight"
        names = [
            path if path in self.shapes and not spec.on_bias else path + end for path in official
        ]
        if not all(name in self.shapes for name in names):
            return f"no such parameter in this model ({names[0]})"
        experts = (module.key.expert,) if module.key.expert else self.experts
        if any(name in self.changes[expert] for name in names for expert in experts):
            return f"a second change of {names[0]}"
        tensors = self.source.tensors
        for key in (module.keys[part] for part in spec.fields.values()):
            if not tensors[key].dtype.is_floating_point or tensors[key].packing:
                return f"{tensors[key].dtype} holds no plain floating-point numbers"
        shapes = [self.shapes[name] for name in names]
        stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        # The same delta without memory: shapes must fit before anything is read or multiplied.
        imagined = spec.make(
            module, 1.0, lambda key: torch.empty(tensors[key].shape, device="meta")
        )
        error = shape_error(imagined, stacked)
        if error:
            return error
        alpha, scale = self._scale(module, spec)
        deltas = _split(spec.make(module, scale, self._read_tensor), [shape[0] for shape in shapes])
        if deltas is None:
            return f"a {spec.kind} of {len(names)} fused weights does not come apart"
        for expert in experts:
            self.changes[expert].update(zip(names, deltas, strict=True))
        self.kinds[spec.kind] += 1
        if spec.rank and spec.delta is not Difference:
            self.ranks.add(spec.rank)
        if alpha is not None:
            self.alphas.add(alpha)
        return None

    def _scale(self, module: AdapterModule, spec: DeltaSpec) -> tuple[float | None, float]:
        """The alpha of a delta, and the scale it gives."""
        if not spec.scaled:
            return None, 1.0
        path = module.key.path
        config = self.configs.get(module.key.component) or self.configs.get("") or PeftConfig()
        if "alpha" in module.keys:
            alpha: float | None = read_alpha(self.source, module.keys["alpha"])
        else:
            alpha = config.alpha_of(path)
        # A LoKr of two complete factors has no rank; PEFT divides by the rank that was requested.
        rank = spec.rank or (config.rank_of(path) if config.alpha is not None else None)
        if alpha is None or not rank:
            return None, 1.0
        return alpha, alpha / (math.sqrt(rank) if config.rslora else rank)

    def _read_tensor(self, key: str) -> Tensor:
        value = self.source.read(key, torch.float32)
        if not value.isfinite().all():
            raise RequestError(
                f"{self.source.path}: {key} holds values that are not finite; the file is damaged,"
                " or its training failed: fetch it again"
            )
        return value


def read_alpha(source: TensorSource, key: str) -> float:
    """Return the number that a key holds."""
    shape = source.tensors[key].shape
    if math.prod(shape) != 1:
        raise RequestError(f"{source.path}: {key} is {list(shape)}; expected one number")
    alpha = float(source.read(key).item())
    if not math.isfinite(alpha):
        raise RequestError(f"{source.path}: {key} is {alpha}; expected a finite number")
    return alpha


def open_adapter(path: Path) -> TensorSource:
    """Open a file, or a folder that PEFT or diffusers wrote; keys stay as they are.

    Raises:
        RequestError: naming the file, for one that is missing or damaged.
    """
    known = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
    with reading(path):
        file = next((path / name for name in known if (path / name).is_file()), path)
    return open_container(file)


def read_adapter(
    path: Path, shapes: Mapping[str, tuple[int, ...]], experts: tuple[Expert, ...] = EXPERTS
) -> AdapterFile:
    """Read all deltas of a file, float32, for a model.

    Args:
        path: the file, or the folder of PEFT.
        shapes: of an expert's parameters, by official name.
        experts: the names of the model's experts, or of its one network.

    Raises:
        RequestError: for a broken file, one that holds no adapter, one that does not apply at all,
            or values that are not finite.
    """
    source = open_adapter(Path(path))
    modules, unused = parse_keys(source.tensors)
    count = sum(not module.only_alpha for module in modules)
    if not count and IS_TEXT not in unused.values():
        first = ", ".join(list(source.tensors)[:3]) or "(nothing)"
        raise RequestError(
            f"{source.path} holds no LoRA or other adapter in any known naming; its tensors begin"
            f" {first}"
        )
    reader = _Reader(source, shapes, peft_configs(source), unused, experts)
    applied = sum(reader.read(module) for module in modules)
    if not applied:
        raise RequestError(
            f"{source.path}: none of its {count} modules applies to this model;"
            f" {_reasons(reader.unused)}"
        )
    return AdapterFile(
        source.path,
        reader.changes,
        reader.unused,
        count,
        applied,
        dict(reader.kinds),
        tuple(sorted(reader.ranks)),
        tuple(sorted(reader.alphas)),
    )


def describe_adapter(source: TensorSource) -> dict[str, Any] | None:
    """Return what `inspect` shows of an adapter, None for another file; reads only alphas."""
    modules, _ = parse_keys(source.tensors)
    specs = [(module, spec) for module in modules for spec in _delta_specs(module, source)]
    if not specs:
        return None
    configs = peft_configs(source)
    alphas = {
        read_alpha(source, module.keys["alpha"]) for module, _ in specs if "alpha" in module.keys
    }
    if not alphas:
        alphas = {config.alpha for config in configs.values() if config.alpha is not None}
    experts = sorted({module.key.expert for module, _ in specs if module.key.expert})
    named = expert_in_name(str(source.path))
    return {
        "naming": ", ".join(dict.fromkeys(module.key.naming for module, _ in specs)),
        "modules": sum(not module.only_alpha for module in modules),
        "kinds": dict(Counter(spec.kind for _, spec in specs)),
        "ranks": sorted(
            {spec.rank for _, spec in specs if spec.rank and spec.delta is not Difference}
        ),
        "alphas": sorted(alphas),
        "rslora": any(config.rslora for config in configs.values()),
        "experts": experts or ([named] if named else []),
    }
