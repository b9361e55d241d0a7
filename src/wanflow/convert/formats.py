"""What `wanflow convert` can write: layouts and storage formats by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from wanflow.checkpoint.key_maps import Dialect, Kind
from wanflow.checkpoint.parts import WEIGHTS, Part
from wanflow.config import RequestError

Layout = Literal["official", "diffusers", "comfy", "gguf"]
GGML_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # that the gguf package can quantise to
SHORT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD = 10_000_000_000  # bytes, as in the published experts
# The names in each layout. ComfyUI's single files have the official names, and transformers' for
# the text encoder.
DIALECTS: dict[Layout, dict[Kind, Dialect]] = {
    "official": {"dit": "official", "t5": "official", "vae": "official"},
    "diffusers": {"dit": "diffusers", "t5": "huggingface", "vae": "diffusers"},
    "comfy": {"dit": "official", "t5": "huggingface", "vae": "official"},
    "gguf": {"dit": "official", "t5": "gguf", "vae": "official"},
}


@dataclass(frozen=True)
class StorageFormat:
    """How tensors are stored.

    quant: the format of matmul weights, "F8_E4M3" or a GGML type; None: as the rest.
    plain: the dtype of the rest; None leaves each as it is, and unpacks packed ones to bfloat16.
    gguf: whether the container is GGUF, with its own rules for the rest.
    """

    quant: str | None = None
    plain: str | None = None
    gguf: bool = False

    @property
    def name(self) -> str:
        """The format of most weights."""
        return self.quant or str(self.plain)


@dataclass(frozen=True)
class Target:
    """A layout and the format of its tensors; `word` names the format in file names."""

    layout: Layout
    coding: StorageFormat
    word: str = ""

    def of(self, kind: Kind, dtype: str | None, alone: bool) -> StorageFormat:
        """Return the format of one part; `dtype` is requested for what is not quantised.

        `alone`: the user converts this part only.
        """
        if kind == "vae":  # next to quantised weights it stays as it is: it is small
            quantised = self.coding.quant is not None or self.coding.gguf
            return StorageFormat(plain=dtype or (None if quantised else self.coding.plain))
        coding = replace(self.coding, plain=dtype or self.coding.plain)
        if kind == "t5" and coding.quant in GGML_TYPES and not alone:
            return replace(coding, quant="Q8_0")  # it runs once a prompt, and decides what is drawn
        return coding


TARGETS: dict[str, Target] = {
    "official": Target("official", StorageFormat()),
    "diffusers": Target("diffusers", StorageFormat()),
    "bf16": Target("comfy", StorageFormat(plain="BF16"), "bf16"),
    "fp16": Target("comfy", StorageFormat(plain="F16"), "fp16"),
    "fp8": Target("comfy", StorageFormat("F8_E4M3", "BF16"), "fp8_scaled"),
    **{
        f"gguf-{kind.lower()}": Target("gguf", StorageFormat(kind, "F16", True), kind)
        for kind in GGML_TYPES
    },
    "gguf-f16": Target("gguf", StorageFormat(None, "F16", True), "F16"),
    "gguf-bf16": Target("gguf", StorageFormat(None, "BF16", True), "BF16"),
}


@dataclass(frozen=True)
class Options:
    """How to convert.

    to: a name in `TARGETS`.
    dtype: float32, bfloat16 or float16 for what is not quantised; None: as usual for the target.
    parts: the parts to convert.
    shard: most bytes of a file, in layouts that split parts.
    """

    to: str
    dtype: str | None = None
    parts: tuple[Part, ...] = WEIGHTS
    shard: int = SHARD
    overwrite: bool = False

    @property
    def target(self) -> Target:
        return TARGETS[self.to]

    def coding(self, kind: Kind, alone: bool = False) -> StorageFormat:
        """Return the format of one part, see `Target.of`."""
        return self.target.of(kind, SHORT_NAMES[self.dtype] if self.dtype else None, alone)


def options(to: str, dtype: str | None = None, **others: Any) -> Options:
    """Return checked options; RequestError for unknown or contradictory values."""
    if to not in TARGETS:
        raise RequestError(f"--to {to}: unknown format; choose of {', '.join(TARGETS)}")
    if dtype is not None and dtype not in SHORT_NAMES:
        raise RequestError(f"--dtype {dtype}: unknown dtype; choose of {', '.join(SHORT_NAMES)}")
    coding = TARGETS[to].coding
    fixed = None if coding.quant else coding.plain
    if dtype is not None and fixed not in (None, SHORT_NAMES[dtype]):
        raise RequestError(f"--to {to} sets the dtype already; leave out --dtype {dtype}")
    if coding.gguf:
        package()
    return Options(to, dtype, **others)


def package() -> Any:
    """Return the gguf package; RequestError if it is not installed."""
    try:
        return import_module("gguf")
    except ModuleNotFoundError:
        raise RequestError(
            "writing GGUF needs the package gguf; pip install 'wanflow[gguf]', or pip install gguf"
        ) from None
