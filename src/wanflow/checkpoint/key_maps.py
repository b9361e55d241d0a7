"""Tables of other projects' names for the official parameters, and renaming in both directions.

A dialect is a table of paths, official -> foreign. A path matches a name that equals it or
continues after a dot, and the longest match counts. So one entry covers `.weight`, `.bias` and all
that a quantised or LoRA file adds to the module. Numbered paths are written out for as many blocks
as the names show, for a model of any size.

Sources: the modules of diffusers and transformers (compared name by name and shape by shape in the
    tests), llama.cpp's list of tensor names for T5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

from wanflow.config import RequestError

Kind = Literal["dit", "t5", "vae"]
Dialect = Literal["official", "diffusers", "huggingface", "gguf"]
Table = dict[str, str]

# Prefixes that repackaged files put before the names of a part.
PREFIXES: dict[Kind, tuple[str, ...]] = {
    "dit": ("model.diffusion_model.", "diffusion_model.", "model."),
    "t5": ("text_encoders.umt5xxl.transformer.", "text_encoder.", "model."),
    "vae": ("first_stage_model.", "vae.", "model."),
}
# The first one counts for a file whose names fit several equally.
DIALECTS: dict[Kind, tuple[Dialect, ...]] = {
    "dit": ("official", "diffusers"),
    "t5": ("official", "huggingface", "gguf"),
    "vae": ("official", "diffusers"),
}
# Limits on blocks, and on levels and their blocks: several times what any model has.
MOST_BLOCKS, MOST_LEVELS = 256, 32
# A second name under which transformers lists the same tensor; files hold one of the two, or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}

DIT = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
DIT_BLOCK = {
    "modulation": "scale_shift_table",
    # Diffusers numbers norms by position, the official code by age: its norm3 comes second. Only
    # norm3 has parameters, but norm2 must get out of its way.
    "norm3": "norm2",
    "norm2": "norm3",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
DIT_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

T5: dict[Dialect, Table] = {
    "huggingface": {"token_embedding": "shared", "norm": "encoder.final_layer_norm"},
    "gguf": {"token_embedding": "token_embd", "norm": "enc.output_norm"},
}
T5_BLOCK: dict[Dialect, tuple[str, Table]] = {
    "huggingface": (
        "encoder.block",
        {
            "norm1": "layer.0.layer_norm",
            **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
            "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
            "norm2": "layer.1.layer_norm",
            "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
            "ffn.fc1": "layer.1.DenseReluDense.wi_1",
            "ffn.fc2": "layer.1.DenseReluDense.wo",
        },
    ),
    "gguf": (
        "enc.blk",
        {
            "norm1": "attn_norm",
            **{f"attn.{x}": f"attn_{x}" for x in "qkvo"},
            "pos_embedding.embedding": "attn_rel_b",
            "norm2": "ffn_norm",
            "ffn.gate.0": "ffn_gate",
            "ffn.fc1": "ffn_up",
            "ffn.fc2": "ffn_down",
        },
    ),
}

VAE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
VAE_SIDE = {
    "conv1": "conv_in",
    "middle.1": "mid_block.attentions.0",
    "head.0": "norm_out",
    "head.2": "conv_out",
}
VAE_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
VAE_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
# Names that only the VAE of Wan2.2 has: its encoder's levels are lists of their own.
NESTED = re.compile(
    r"(?:^|\.)encoder\.(?:downsamples\.\d+\.downsamples|down_blocks\.\d+\.(?:resnets|downsampler))\."
)


def detect(kind: Kind, names: Iterable[str]) -> Dialect:
    """Return the dialect that knows most of the names.

    Raises:
        RequestError: when none knows any.
    """
    bare = [strip(kind, name) for name in names]
    known: dict[Dialect, int] = {}
    for dialect in DIALECTS[kind]:
        paths = set(_table(kind, dialect, bare).values())
        known[dialect] = sum(_split(name, paths) is not None for name in bare)
    best = max(DIALECTS[kind], key=lambda dialect: known[dialect])
    if not known[best]:
        raise RequestError(
            f"these are not the weights of a Wan {kind} in any known naming; they begin"
            f" {', '.join(bare[:3]) or '(nothing)'}"
        )
    return best


def strip(kind: Kind, name: str) -> str:
    """Return a name without the prefixes of repackaged files."""
    for prefix in PREFIXES[kind]:
        name = name.removeprefix(prefix)
    return name


def to_official(kind: Kind, names: Iterable[str]) -> dict[str, str]:
    """Return the official names for a file's names, of any dialect.

    The grouping of blocks follows from the names, so pass all names of a model, not one shard's.
    Unknown names stay unchanged, and a strict loader lists them. The second name of a tied tensor
    is dropped if the first is present.

    Returns:
        {name in the file: official name}, one to one.

    Raises:
        RequestError: for names of no known dialect, or two that mean the same parameter.
    """
    files = {name: strip(kind, name) for name in names}
    dialect = detect(kind, files.values())
    back = {
        foreign: official for official, foreign in _table(kind, dialect, files.values()).items()
    }
    bare = set(files.values())
    result: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name, plain in files.items():
        if kind == "t5" and plain in TIED:
            if TIED[plain] in bare:
                continue
            plain = TIED[plain]
        official = _rename(plain, back) or plain
        if official in taken:
            raise RequestError(
                f"{taken[official]!r} and {name!r} are both the parameter {official!r}"
            )
        taken[official] = name
        result[name] = official
    return result


def from_official(kind: Kind, dialect: Dialect, names: Iterable[str]) -> dict[str, str]:
    """Return another project's names: {official name: foreign name}, one to one.

    Raises:
        RequestError: for names that the dialect lacks, or a dialect that this kind does not have.
    """
    if dialect not in DIALECTS[kind]:
        raise RequestError(f"a {kind} has no {dialect} names, only {', '.join(DIALECTS[kind])}")
    names = list(names)
    table = _table(kind, dialect, names)
    renamed = {name: _rename(name, table) for name in names}
    unknown = [name for name, new in renamed.items() if new is None]
    if unknown:
        raise RequestError(
            f"no {dialect} name for {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
        )
    return {name: new for name, new in renamed.items() if new is not None}


def _split(name: str, paths: Collection[str]) -> tuple[str, str] | None:
    """Return (path, rest) for the longest of `paths` that `name` begins with."""
    end = len(name)
    while end > 0:
        if name[:end] in paths:
            return name[:end], name[end:]
        end = name.rfind(".", 0, end)
    return None


def _rename(name: str, table: Table) -> str | None:
    found = _split(name, table)
    return None if found is None else table[found[0]] + found[1]


def _table(kind: Kind, dialect: Dialect, names: Collection[str]) -> Table:
    """Return official -> foreign paths, with enough blocks for `names` in either dialect."""
    if kind == "dit":
        table = _dit(1 + _last(r"blocks\.(\d+)\.", names))
    elif kind == "t5":
        table = _t5(
            dialect if dialect != "official" else "huggingface",
            1 + _last(r"(?:blocks|block|blk)\.(\d+)\.", names),
        )
    elif any(map(NESTED.search, names)):
        table = _vae22(names)
    else:
        table = _vae(
            1 + _last(r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.", names), *_levels(names)
        )
    return table if dialect != "official" else {official: official for official in table}


def _last(pattern: str, names: Iterable[str], most: int = MOST_BLOCKS) -> int:
    """Return the highest number below `most` in the pattern's group after a dot; -1 for none."""
    edged = re.compile(rf"(?:^|\.){pattern}")
    numbers = (int(found[1]) for found in map(edged.search, names) if found and len(found[1]) < 9)
    return max((number for number in numbers if number < most), default=-1)


def _dit(blocks: int) -> Table:
    block = dict(DIT_BLOCK)
    for official, foreign in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        block |= {f"{official}.{a}": f"{foreign}.{b}" for a, b in DIT_ATTENTION.items()}
    return DIT | {
        f"blocks.{n}.{a}": f"blocks.{n}.{b}" for n in range(blocks) for a, b in block.items()
    }


def _t5(dialect: Dialect, blocks: int) -> Table:
    stem, block = T5_BLOCK[dialect]
    return T5[dialect] | {
        f"blocks.{n}.{a}": f"{stem}.{n}.{b}" for n in range(blocks) for a, b in block.items()
    }


def _vae_ends() -> Table:
    """Return the paths that the VAEs of Wan2.1 and Wan2.2 share: all but the levels."""
    table = dict(VAE)
    for side in ("encoder", "decoder"):
        table |= {f"{side}.{a}": f"{side}.{b}" for a, b in VAE_SIDE.items()}
        for official, foreign in (
            ("middle.0", "mid_block.resnets.0"),
            ("middle.2", "mid_block.resnets.1"),
        ):
            table |= {
                f"{side}.{official}.{a}": f"{side}.{foreign}.{b}" for a, b in VAE_RESIDUAL.items()
            }
    return table


def _vae(encoder_layers: int, levels: int, residuals: int) -> Table:
    table = _vae_ends()
    layer = VAE_RESIDUAL | VAE_RESAMPLE  # the names say which of the two a layer is
    for n in range(encoder_layers):  # flat in both
        table |= {
            f"encoder.downsamples.{n}.{a}": f"encoder.down_blocks.{n}.{b}" for a, b in layer.items()
        }
    for level in range(levels):  # flat in the official decoder, nested in the other
        first, up = level * (residuals + 1), f"decoder.up_blocks.{level}"
        for n in range(residuals):
            table |= {
                f"decoder.upsamples.{first + n}.{a}": f"{up}.resnets.{n}.{b}"
                for a, b in VAE_RESIDUAL.items()
            }
        table |= {
            f"decoder.upsamples.{first + residuals}.{a}": f"{up}.upsamplers.0.{b}"
            for a, b in VAE_RESAMPLE.items()
        }
    return table


def _vae22(names: Collection[str]) -> Table:
    """Return the paths of the Wan2.2 VAE: nested on both sides."""
    table = _vae_ends()
    for side, official, foreign in (
        ("encoder", "downsample", "down"),
        ("decoder", "upsample", "up"),
    ):
        ours, theirs = f"{side}.{official}s", f"{side}.{foreign}_blocks"
        first = rf"{side}\.(?:{official}s|{foreign}_blocks)\.(\d+)\."
        inner = rf"{side}\.{official}s\.\d+\.{official}s\.(\d+)\.(?:residual|shortcut)"
        residuals = 1 + max(
            _last(inner, names, MOST_LEVELS),
            _last(rf"{side}\.{foreign}_blocks\.\d+\.resnets\.(\d+)\.", names, MOST_LEVELS),
        )
        for level in range(1 + _last(first, names, MOST_LEVELS)):
            place, there = f"{ours}.{level}.{official}s", f"{theirs}.{level}"
            for n in range(residuals):
                table |= {
                    f"{place}.{n}.{a}": f"{there}.resnets.{n}.{b}" for a, b in VAE_RESIDUAL.items()
                }
            table |= {
                f"{place}.{residuals}.{a}": f"{there}.{official}r.{b}"
                for a, b in VAE_RESAMPLE.items()
            }
    return table


def _levels(names: Collection[str]) -> tuple[int, int]:
    """Return the number of the decoder's levels, and of residual blocks in each."""
    nested = _last(r"decoder\.up_blocks\.(\d+)\.", names, MOST_LEVELS)
    if nested >= 0:
        return nested + 1, 1 + _last(
            r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", names, MOST_LEVELS
        )
    layers = 1 + _last(r"decoder\.upsamples\.(\d+)\.", names)
    resampling = (
        re.search(r"(?:^|\.)decoder\.upsamples\.(\d+)\.(?:resample|time_conv)\.", name)
        for name in names
    )
    residuals = min(
        (int(found[1]) for found in resampling if found and len(found[1]) < 9), default=layers
    )
    return -(-layers // (residuals + 1)), min(residuals, layers)
