"""Parse the keys of an adapter file: module, part of an adapter, and expert where one is named.

Nothing here knows the model or reads a tensor. PEFT's configuration, in a file or in the header, is
parsed here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wanflow.checkpoint.containers import TensorSource, read_json
from wanflow.config import RequestError
from wanflow.presets import Expert
from wanflow.untrusted import parse_json

HIGH, LOW = EXPERTS = ("high", "low")  # that one file may tell apart
# Prefix of a module's path -> its naming, and the expert it means in a file for both.
PREFIXES: dict[str, tuple[str, Expert | None]] = {
    "base_model.model.": ("PEFT", None),
    "model.diffusion_model.": ("ComfyUI", None),
    "diffusion_model.": ("ComfyUI", None),
    "transformer_2.": ("diffusers", LOW),
    "transformer.": ("diffusers", HIGH),
    "pipe.dit2.": ("DiffSynth", LOW),
    "pipe.dit.": ("DiffSynth", HIGH),
    "model.": ("", None),
    "dit.": ("", None),
    "lora_unet__": ("kohya", None),
    "lora_unet_": ("kohya", None),
    "lora_transformer_2_": ("kohya", LOW),
    "lora_transformer_": ("kohya", HIGH),
    "lycoris_": ("LyCORIS", None),
}
DIRECT = ("dora_scale", "diff", "diff_b", "diff_m", "set_weight")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
# End of a key -> the part it is.
PARTS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    **dict.fromkeys(("alpha", "lora_alpha", "lora.alpha"), "alpha"),
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude_vector",
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{name: name for name in (*DIRECT, *HADAMARD, *KRONECKER)},
}
_ENDS = "|".join(re.escape(name) for name in sorted(PARTS, key=len, reverse=True))
# PEFT puts the adapter's name, which its user chose, between the part and `.weight`.
KEY = re.compile(
    rf"(?P<path>.+?)(?:\.|_(?=lora\.))(?P<part>{_ENDS})"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<end>weight|bias))?"
)
IMAGE = re.compile(
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|to_added_kv|norm_added_[kq]"
    r"|image_embedder)(?:[._]|$)"
)
TEXT = re.compile(r"(?:base_model\.model\.)?(?:text_encoders?|lora_te\d?|te\d?|conditioner)[._]")
MODULATION = re.compile(r"(?:^|[._])(?:modulation|scale_shift_table)$")

IS_TEXT, NO_PART = "text-encoder module", "no part of any known adapter"
WHOLE = "complete weights of PEFT's modules_to_save, which are not used"
MOST_PATTERNS = 4096


@dataclass(frozen=True)
class AdapterKey:
    """One parsed key.

    component: diffusers' name of the model, "" where none is given.
    path: of the module, without its prefix, perhaps with underscores for dots.
    """

    naming: str
    component: str
    expert: Expert | None
    path: str
    part: str


@dataclass
class AdapterModule:
    """The keys of a file for one module, by part."""

    key: AdapterKey
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def only_alpha(self) -> bool:
        return self.keys.keys() == {"alpha"}


def parse_keys(names: Iterable[str]) -> tuple[list[AdapterModule], dict[str, str]]:
    """Return the modules that keys name, and {key: reason} for keys that no adapter has."""
    modules: dict[tuple[str, Expert | None, str], AdapterModule] = {}
    unused: dict[str, str] = {}
    for name in names:
        key = _parse_key(name)
        if key is None:
            whole = name.startswith("base_model.model.") and name.endswith((".weight", ".bias"))
            unused[name] = IS_TEXT if TEXT.match(name) else WHOLE if whole else NO_PART
            continue
        module = modules.setdefault((key.component, key.expert, key.path), AdapterModule(key))
        if key.part in module.keys:
            unused[name] = f"the same part of the same module as {module.keys[key.part]}"
        else:
            module.keys[key.part] = name
    # `transformer.` means the high-noise expert only in a file that has a `transformer_2.` too.
    if not any(module.key.expert == LOW for module in modules.values()):
        for module in modules.values():
            module.key = replace(module.key, expert=None)
    return list(modules.values()), unused


def _parse_key(name: str) -> AdapterKey | None:
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
    return AdapterKey(naming or "official", component, expert, path, part)


@dataclass(frozen=True)
class PeftConfig:
    """How PEFT scales: alpha / rank, or alpha / sqrt(rank); both may differ by module."""

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, path: str) -> float | None:
        return _of_module(self.alphas, path, self.alpha)

    def rank_of(self, path: str) -> float | None:
        return _of_module(self.ranks, path, self.rank)


def _of_module(values: Mapping[str, float], path: str, default: float | None) -> float | None:
    """The value for a module's name or the end of it.

    PEFT takes the names for patterns; no expression out of a downloaded file runs here.
    """
    for name, value in values.items():
        plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if path == plain or path.endswith(f".{plain}"):
            return value
    return default


def peft_configs(source: TensorSource) -> dict[str, PeftConfig]:
    """Return PEFT's configurations by diffusers' name of the model ("" where none is given).

    Raises:
        RequestError: for one that cannot be read, or that holds invalid numbers.
    """
    raw: dict[str, Any] = {}
    file = source.path.parent / "adapter_config.json"
    if source.path.stem == "adapter_model" and file.exists():
        raw = read_json(file)
    header = getattr(source, "metadata", {}).get("lora_adapter_metadata")
    if header is not None:
        try:
            raw |= dict(parse_json(header, "the header"))
        except (TypeError, ValueError):
            raise RequestError(
                f"{source.path}: the lora_adapter_metadata in its header is not a JSON object"
            ) from None
    configs = {}
    for component in ("transformer_2", "transformer", ""):
        prefix = f"{component}." if component else ""
        section = {
            name.removeprefix(prefix): value
            for name, value in raw.items()
            if name.startswith(prefix)
        }
        if "r" in section:
            configs[component] = _peft_config(section, source)
    return configs


def _peft_config(section: Mapping[str, Any], source: TensorSource) -> PeftConfig:
    def number(value: Any, name: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1 << 63:  # nor NaN, nor infinity
            raise RequestError(
                f"{source.path}: {name} of its configuration is {value!r}; expected a number"
            )
        return float(value)

    def numbers(name: str) -> dict[str, float]:
        values = section.get(name) or {}
        if not isinstance(values, dict):
            raise RequestError(
                f"{source.path}: {name} of its configuration is {values!r}; expected numbers by"
                " module"
            )
        if len(values) > MOST_PATTERNS:
            raise RequestError(
                f"{source.path}: {name} of its configuration names {len(values):,} modules; at most"
                f" {MOST_PATTERNS:,} are read"
            )
        return {module: number(value, name) for module, value in values.items()}

    alpha = section.get("lora_alpha", section.get("alpha"))
    return PeftConfig(
        alpha=None if alpha is None else number(alpha, "lora_alpha"),
        rank=int(number(section["r"], "r")),
        rslora=section.get("use_rslora") is True,
        alphas=numbers("alpha_pattern"),
        ranks=numbers("rank_pattern"),
    )
