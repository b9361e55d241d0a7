"""Stand in for the files of a model: weights of random numbers, made on the device when asked."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wanflow.bench.tools import random_weight
from wanflow.checkpoint.checkpoint import Checkpoint, published
from wanflow.checkpoint.containers import TensorSource
from wanflow.checkpoint.source import OfficialSource
from wanflow.presets import FAMILY, NANO

PRESETS = {spec.name: spec for spec in (*FAMILY, NANO)}


@dataclass(frozen=True)
class RandomSource(TensorSource):
    """Tensors of random numbers; a name has the same numbers each time.

    device: where they are made.
    """

    device: torch.device = field(kw_only=True)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return a tensor on the device, or in `out`."""
        info = self.tensors[name]
        kind = dtype or info.dtype
        made = kind if kind.itemsize > 1 else torch.float32
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        value = random_weight(name, info.shape, made, self.device, generator).to(kind)
        value = value if rows is None else value[rows]
        return value if out is None else out.copy_(value)


def random_checkpoint(preset: str, layers: int | None, device: torch.device) -> Checkpoint:
    """Return a model without files, with so many blocks in each expert; None: all."""
    spec = PRESETS[preset]
    if layers is not None:
        spec = replace(spec, dit=replace(spec.dit, num_layers=layers))
    known = published(spec)
    sources = {}
    for part, source in known.sources.items():
        inner = RandomSource(source.path, source.tensors, device=device)
        sources[part] = OfficialSource(source.path, source.tensors, inner, source.names)
    return replace(known, sources=sources)


@dataclass(frozen=True)
class RandomTokens:
    """A tokenizer without a file: every prompt is of full length."""

    vocab: int
    length: int

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, length] each."""
        ids = torch.arange(len(prompts) * self.length).view(-1, self.length) % (self.vocab - 1) + 1
        return ids, torch.ones_like(ids)


def without_tokenizer(parts: Any) -> None:
    """Let a model without files encode prompts."""
    spec = parts.spec
    parts.texts._tokenizer = RandomTokens(spec.text.vocab, spec.dit.text_len)
