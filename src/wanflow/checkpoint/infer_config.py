"""Infer the shape of a model's parts from their tensors; a config must agree with them.

A model is never built larger than its files. Shapes also tell the model from its relatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from wanflow.checkpoint.containers import TensorSource
from wanflow.checkpoint.key_maps import MOST_BLOCKS, Kind
from wanflow.config import DiTConfig, RequestError, TextConfig, VAEConfig, from_mapping
from wanflow.presets import T2V_A14B

ONLY = "wanflow runs Wan2.2-T2V-A14B (text to video)"
SHEET = "wanflow.json"
LARGEST_SIZE = 1 << 20  # in a config; the largest published one is a vocabulary of 256,384
HEAD_DIM = 128  # of every published Wan model; tensors do not show the number of heads

# Relatives of the model, by the first thing that identifies them.
BY_TYPE = {
    "i2v": "Wan I2V (image to video)",
    "ti2v": "Wan2.2-TI2V-5B",
    "flf2v": "Wan FLF2V (first and last frame to video)",
}
BY_CHANNELS = {36: "Wan2.2-I2V-A14B (image to video)", 48: "Wan2.2-TI2V-5B"}
BY_WIDTH = {1536: "Wan2.1-T2V-1.3B (one expert)"}
BY_TENSOR = {
    "img_emb.": "Wan2.1-I2V (image to video)",
    "vace_": "Wan VACE (video editing)",
    "casual_audio_encoder.": "Wan2.2-S2V-14B (speech to video)",
    "face_adapter.": "Wan2.2-Animate-14B",
    "ref_conv.": "Wan Fun (control video)",
    "control_adapter.": "Wan Fun (camera control)",
}

Shapes = dict[str, Any]  # the fields of a config that tensors determine
C = TypeVar("C", DiTConfig, TextConfig, VAEConfig)


def relative(source: TensorSource, config: Mapping[str, Any]) -> str | None:
    """Return the name of the relative that a DiT belongs to; None for text to video."""
    kind, patches = config.get("model_type", "t2v"), source.tensors.get("patch_embedding.weight")
    known = patches is not None and len(patches.shape) == 5
    channels = patches.shape[1] if patches is not None and known else config.get("in_dim")
    name = BY_CHANNELS.get(channels) if isinstance(channels, int) else None
    if channels == T2V_A14B.dit.in_dim and patches is not None and known:
        name = BY_WIDTH.get(patches.shape[0])
    if name:
        return name
    for mark, name in BY_TENSOR.items():
        if any(key.startswith(mark) for key in source.tensors):
            return name
    return None if kind == "t2v" else BY_TYPE.get(str(kind), f"a model of type {kind!r}")


def refuse_relatives(source: TensorSource, config: Mapping[str, Any]) -> None:
    """Raise a RequestError that names the model, for a DiT that is not text to video."""
    name = relative(source, config)
    if name:
        raise RequestError(f"{source.path} holds {name}; {ONLY}")


def _shape_of(source: TensorSource, what: str) -> Callable[[str, int], tuple[int, ...]]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        info = source.tensors.get(name)
        if info is None or len(info.shape) != rank or not all(info.shape):
            has = "is missing" if info is None else f"is {list(info.shape)}"
            raise RequestError(
                f"{source.path} is not {what} in the official names: {name} {has}, and should have"
                f" {rank} dimensions"
            )
        return info.shape

    return shape


def _numbered(source: TensorSource, prefix: str) -> dict[int, list[str]]:
    """Return the tensor names below `prefix`, by the number that follows it."""
    groups: dict[int, list[str]] = {}
    for name in source.tensors:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and len(number) < 9:
            groups.setdefault(int(number), []).append(rest)
            if len(groups) > MOST_BLOCKS:  # building them takes time even without memory
                raise RequestError(
                    f"{source.path} has too many {prefix[:-1]}; at most {MOST_BLOCKS} are read"
                )
    return dict(sorted(groups.items()))


def dit_shapes(source: TensorSource, declared: Mapping[str, Any]) -> Shapes:
    """Return the fields of a `DiTConfig` that an expert's tensors show, and the number of heads.

    Raises:
        RequestError: when these are not an expert's tensors, or nothing gives the number of heads.
    """
    shape = _shape_of(source, "an expert")
    patch = shape("patch_embedding.weight", 5)
    if "num_heads" not in declared and patch[0] % HEAD_DIM:
        raise RequestError(
            f"{source.path}: nothing says how many heads this expert of width {patch[0]} has; write"
            f' it into {SHEET} in the model\'s folder, as {{"dit": {{"num_heads": N}}}}'
        )
    return {
        "num_heads": declared.get("num_heads", patch[0] // HEAD_DIM),
        "dim": patch[0],
        "in_dim": patch[1],
        "patch_size": patch[2:],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "out_dim": shape("head.head.weight", 2)[0] // math.prod(patch[2:]),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "num_layers": len(_numbered(source, "blocks.")),
    }


def text_shapes(source: TensorSource) -> Shapes:
    """Return the fields of a `TextConfig` that the encoder's tensors show."""
    shape = _shape_of(source, "a UMT5 encoder")
    vocab, dim = shape("token_embedding.weight", 2)
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab": vocab,
        "dim": dim,
        "num_buckets": buckets,
        "num_heads": heads,
        "num_layers": len(_numbered(source, "blocks.")),
        "dim_attn": shape("blocks.0.attn.q.weight", 2)[0],
        "dim_ffn": shape("blocks.0.ffn.fc1.weight", 2)[0],
    }


def vae_shapes(source: TensorSource) -> Shapes:
    """Return the fields of a `VAEConfig` that the VAE's tensors show.

    The encoder is a list of levels: residual blocks, then a resampling in all but the last.
    """
    shape = _shape_of(source, "the Wan2.1 VAE")
    dim, z_dim = shape("encoder.conv1.weight", 5)[0], shape("conv2.weight", 5)[0]
    levels: list[list[int]] = [[]]  # widths of the residual blocks
    temporal = []
    for number, names in _numbered(source, "encoder.downsamples.").items():
        if "residual.6.weight" in names:
            levels[-1].append(shape(f"encoder.downsamples.{number}.residual.6.weight", 5)[0])
        else:
            temporal.append("time_conv.weight" in names)
            levels.append([])
    same_length = len({len(level) for level in levels}) == 1
    if not all(levels) or not same_length or any(level[-1] % dim for level in levels):
        raise RequestError(
            f"{source.path} is not the Wan2.1 VAE in the official names: its levels differ"
        )
    return {
        "dim": dim,
        "z_dim": z_dim,
        "dim_mult": tuple(level[-1] // dim for level in levels),
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": tuple(temporal),
    }


def statistics(found: Shapes, declared: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Add the published latent statistics, unless others are declared.

    A VAE of 16 channels encodes into the published latent, whatever its width.
    """
    if "latent_mean" in declared and "latent_std" in declared:
        return declared
    published = T2V_A14B.vae
    if found["z_dim"] != published.z_dim:
        raise RequestError(
            f"{file} has {found['z_dim']} latent channels, and {SHEET} gives no latent_mean and"
            " latent_std for them; add both to its section vae"
        )
    return {"latent_mean": published.latent_mean, "latent_std": published.latent_std, **declared}


def configure(cls: type[C], found: Shapes, declared: Mapping[str, Any], file: Path) -> C:
    """Return a config from a file's tensors and what a config file declares.

    Raises:
        RequestError: where the two differ, or a value is of the wrong type or below 1.
    """
    declared = {
        key: tuple(value) if isinstance(value, list) else value for key, value in declared.items()
    }
    for key, value in found.items():
        if declared.get(key, value) != value:
            raise RequestError(
                f"{file}: the config says {key} {declared[key]}, the tensors say {value}"
            )
    for field in fields(cls):
        value, kind = declared.get(field.name, field.default), type(field.default)
        good = _number(value) if kind is float else type(value) is kind
        if kind is tuple and good:
            good = len(value) <= MOST_BLOCKS and all(_number(item) for item in value)
        if not good or (kind is int and not 1 <= value <= LARGEST_SIZE):
            raise RequestError(
                f"{file}: {field.name} {value!r} is not a valid value; the published model has"
                f" {field.default!r}"
            )
    return from_mapping(cls, {**declared, **found}, str(file))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1 << 63 and math.isfinite(value)


def config_of(kind: Kind, source: TensorSource) -> DiTConfig | TextConfig | VAEConfig:
    """Return the shape of a part from its tensors alone; what they do not show has its default.

    Raises:
        RequestError: when these are not the tensors of such a part.
    """
    if kind == "dit":
        patches = source.tensors.get("patch_embedding.weight")
        width = patches.shape[0] if patches is not None and patches.shape else HEAD_DIM
        heads = 1 if width % HEAD_DIM else width // HEAD_DIM
        found = dit_shapes(source, {"num_heads": heads})
        return configure(DiTConfig, found, {}, source.path)
    if kind == "t5":
        return configure(TextConfig, text_shapes(source), {}, source.path)
    found = vae_shapes(source)
    latent = {"latent_mean": (0.0,) * found["z_dim"], "latent_std": (1.0,) * found["z_dim"]}
    return configure(VAEConfig, found, latent, source.path)
