"""What the keys of an adapter's file say: a module, in one of many spellings; a part of an adapter
on it; perhaps an expert.

Nothing here knows the model, or reads a tensor. PEFT's configuration, in a file beside or in the
header, is read here too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wanflow.checkpoint.containers import TensorSource, read_json
from wanflow.config import RequestError
from wanflow.presets import Expert

# What stands before a module's path: whose naming that is, and which of two experts it means where
# a file has both.
PREFIXES: dict[str, tuple[str, Expert | None]] = {
    "base_model.model.": ("PEFT", None),
    "model.diffusion_model.": ("ComfyUI", None),
    "diffusion_model.": ("ComfyUI", None),
    "transformer_2.": ("diffusers", "low"),
    "transformer.": ("diffusers", "high"),
    "pipe.dit2.": ("DiffSynth", "low"),
    "pipe.dit.": ("DiffSynth", "high"),
    "model.": ("", None),
    "dit.": ("", None),
    "lora_unet__": ("kohya", None),
    "lora_unet_": ("kohya", None),
    "lora_transformer_2_": ("kohya", "low"),
    "lora_transformer_": ("kohya", "high"),
    "lycoris_": ("LyCORIS", None),
}
# The end of a key -> the part it is.
PARTS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude_vector",
    "dora_scale": "dora_scale",
    **dict.fromkeys(("alpha", "lora_alpha", "lora.alpha"), "alpha"),
    **{
        name: name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },
    **{
        name: name
        for name in (
            "lokr_w1",
            "lokr_w1_a",
            "lokr_w1_b",
            "lokr_w2",
            "lokr_w2_a",
            "lokr_w2_b",
            "lokr_t2",
        )
    },
    **{name: name for name in ("diff", "diff_b", "diff_m", "set_weight")},
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_NAMES = "|".join(re.escape(name) for name in sorted(PARTS, key=len, reverse=True))
# PEFT puts the adapter's name, a word of its user's, between the part and `.weight`.
KEY = re.compile(
    rf"(?P<path>.+?)(?:\.|_(?=lora\.))(?P<part>{_NAMES})(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<end>weight|bias))?"
)
IMAGE = re.compile(
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|to_added_kv|norm_added_[kq]|image_embedder)(?:[._]|$)"
)
TEXT = re.compile(r"(?:base_model\.model\.)?(?:text_encoders?|lora_te\d?|te\d?|conditioner)[._]")
MODULATION = re.compile(r"(?:^|[._])(?:modulation|scale_shift_table)$")

IS_TEXT, NO_PART = "text-encoder module", "no part of any known adapter"


@dataclass(frozen=True)
class Key:
    """What one key says."""

    naming: str
    component: str  # diffusers' name of the model it is for; "" where none is given
    expert: Expert | None
    path: str  # of the module, without what stands before it; perhaps with underscores for dots
    part: str


@dataclass
class Module:
    """All that a file has for one module: its keys, by part."""

    key: Key
    keys: dict[str, str] = field(default_factory=dict)


def parse(names: Iterable[str]) -> tuple[list[Module], dict[str, str]]:
    """The modules that the keys of a file speak of, and the keys that are no part of an adapter,
    with the reason.
    """
    modules: dict[tuple[str, Expert | None, str], Module] = {}
    unused: dict[str, str] = {}
    for name in names:
        key = _parse(name)
        if key is None:
            unused[name] = IS_TEXT if TEXT.match(name) else NO_PART
            continue
        module = modules.setdefault((key.component, key.expert, key.path), Module(key))
        if key.part in module.keys:
            unused[name] = f"the same part of the same module as {module.keys[key.part]}"
        else:
            module.keys[key.part] = name
    # `transformer.` is the high-noise expert only beside a `transformer_2.`: without it, it is
    # simply the model.
    if not any(module.key.expert == "low" for module in modules.values()):
        for module in modules.values():
            module.key = replace(module.key, expert=None)
    return list(modules.values()), unused


def _parse(name: str) -> Key | None:
    found = KEY.fullmatch(name)
    if found is None or TEXT.match(name):
        return None
    part, path = PARTS[found["part"]], found["path"].replace(".processor.", ".")
    if found["end"] == "bias":
        if part != "up":
            return None
        part = "up_bias"
    naming, component, expert = "", "", None
    while prefix := next((prefix for prefix in PREFIXES if path.startswith(prefix)), None):
        naming, expert = PREFIXES[prefix][0] or naming, PREFIXES[prefix][1] or expert
        component = prefix[:-1] if prefix.startswith("transformer") else component
        path = path.removeprefix(prefix)
    if part == "diff_m":
        part = "diff"
        if not MODULATION.search(path):
            path += "_modulation" if "_" in path and "." not in path else ".modulation"
    return Key(naming or "official", component, expert, path, part)


# PEFT's configuration


@dataclass(frozen=True)
class Config:
    """How PEFT scales: alpha over the rank, or over its square root; both may differ by module."""

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, path: str) -> float | None:
        return _by_module(self.alphas, path, self.alpha)

    def rank_of(self, path: str) -> float | None:
        return _by_module(self.ranks, path, self.rank)


def _by_module(values: Mapping[str, float], path: str, otherwise: float | None) -> float | None:
    """The value of the module, or of those that end so. PEFT takes the names for patterns; no
    expression of a stranger's runs here.
    """
    for name, value in values.items():
        plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if path == plain or path.endswith(f".{plain}"):
            return value
    return otherwise


def configurations(source: TensorSource) -> dict[str, Config]:
    """PEFT's configuration by diffusers' name of the model it is for ("" where it names none);
    empty where there is none.

    Raises:
        RequestError: for one that cannot be read, or whose numbers make no sense.
    """
    raw: dict[str, Any] = {}
    beside = source.path.parent / "adapter_config.json"
    if source.path.stem == "adapter_model" and beside.exists():
        raw = read_json(beside)
    header = getattr(source, "metadata", {}).get("lora_adapter_metadata")
    if header is not None:
        try:
            raw |= json.loads(header)
        except (TypeError, ValueError, RecursionError):
            raise RequestError(
                f"{source.path}: the lora_adapter_metadata in its header is not a JSON object"
            ) from None
    found = {}
    for component in ("transformer_2", "transformer", ""):
        prefix = f"{component}." if component else ""
        section = {
            name.removeprefix(prefix): value
            for name, value in raw.items()
            if name.startswith(prefix)
        }
        if "r" in section:
            found[component] = _config(section, source)
    return found


def _config(section: Mapping[str, Any], source: TensorSource) -> Config:
    def number(value: Any, name: str) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise RequestError(
                f"{source.path}: {name} of its configuration is {value!r}, not a number"
            )
        return float(value)

    def numbers(name: str) -> dict[str, float]:
        values = section.get(name) or {}
        if not isinstance(values, dict):
            raise RequestError(
                f"{source.path}: {name} of its configuration is {values!r}, not numbers by module"
            )
        return {module: number(value, name) for module, value in values.items()}

    alpha = section.get("lora_alpha", section.get("alpha"))
    return Config(
        alpha=None if alpha is None else number(alpha, "lora_alpha"),
        rank=int(number(section["r"], "r")),
        rslora=section.get("use_rslora") is True,
        alphas=numbers("alpha_pattern"),
        ranks=numbers("rank_pattern"),
    )
