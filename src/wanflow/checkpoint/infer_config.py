"""Infer the shape of a model's parts from their tensors; a config must agree with them.

A model is never built larger than its files. Shapes also tell the model from its relatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from wanflow.checkpoint.containers import TensorSource
from wanflow.checkpoint.key_maps import MOST_BLOCKS, Kind
from wanflow.config import DiTConfig, RequestError, TextConfig, VAE22Config, VAEConfig, from_mapping
from wanflow.presets import FAMILY, I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec

RUNS = f"wanflow runs {', '.join(spec.name for spec in FAMILY)}"
SHEET = "wanflow.json"
LARGEST_SIZE = 1 << 20  # in a config; the largest published one is a vocabulary of 256,384
HEAD_DIM = 128  # of every published Wan model; tensors do not show the number of heads

# Relatives of the family, by what identifies them.
BY_WIDTH = {1536: "Wan2.1-T2V-1.3B (one expert)"}
BY_TENSOR = {
    "img_emb.": "Wan2.1-I2V (image to video, with CLIP)",
    "condition_embedder.image_embedder.": "Wan2.1-I2V (image to video, with CLIP)",
    "vace_": "Wan VACE (video editing)",
    "casual_audio_encoder.": "Wan2.2-S2V-14B (speech to video)",
    "face_adapter.": "Wan2.2-Animate-14B",
    "ref_conv.": "Wan Fun (control video)",
    "control_adapter.": "Wan Fun (camera control)",
}
# A tensor that every VAE of Wan2.2 has, and none of Wan2.1.
VAE22_MARK = "decoder.upsamples.0.upsamples.0.residual.2.weight"
VAES = {VAEConfig: "the Wan2.1 VAE", VAE22Config: "the Wan2.2 VAE"}

Shapes = dict[str, Any]  # the fields of a config that tensors determine
C = TypeVar("C", DiTConfig, TextConfig, VAEConfig)


def told_by(in_dim: int, out_dim: int) -> ModelSpec | None:
    """Return the model whose networks have these channels; widths tell nothing."""
    if in_dim == out_dim:
        return TI2V_5B if out_dim == TI2V_5B.dit.out_dim else T2V_A14B
    return I2V_A14B if in_dim == 2 * out_dim + 4 else None  # beside the latent: mask, picture


def channels(source: TensorSource) -> tuple[int, int] | None:
    """Return the channels that a diffusion transformer takes and gives; None for broken shapes."""
    names = ("patch_embedding.weight", "head.head.weight")
    patches, head = (info.shape if (info := source.tensors.get(name)) else () for name in names)
    if len(patches) != 5 or not head or not all(patches):
        return None
    return patches[1], head[0] // math.prod(patches[2:])


def model_of(source: TensorSource) -> ModelSpec | None:
    """Return the model of the family that a diffusion transformer belongs to, by its channels."""
    found = channels(source)
    return None if found is None else told_by(*found)


def relative(source: TensorSource, config: Mapping[str, Any]) -> str | None:
    """Return the name of the relative that a DiT belongs to; None for a model of the family."""
    for mark, name in BY_TENSOR.items():
        if any(key.startswith(mark) for key in source.tensors):
            return name
    found, patches = channels(source), source.tensors.get("patch_embedding.weight")
    if found and patches and found[0] == T2V_A14B.dit.in_dim and patches.shape[0] in BY_WIDTH:
        return BY_WIDTH[patches.shape[0]]
    kind = config.get("model_type", T2V_A14B.dit.model_type)
    if kind not in [spec.dit.model_type for spec in FAMILY]:
        return f"a model of type {kind!r}"
    if found and told_by(*found) is None:
        return f"a model with {found[0]} channels in and {found[1]} out"
    return None


def refuse_relatives(source: TensorSource, config: Mapping[str, Any]) -> None:
    """Raise a RequestError that names the model, for a DiT that is not of the family."""
    name = relative(source, config)
    if name:
        raise RequestError(f"{source.path} holds {name}; {RUNS}")


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
    out_dim = shape("head.head.weight", 2)[0] // math.prod(patch[2:])
    spec = told_by(patch[1], out_dim) or T2V_A14B
    return {
        "model_type": spec.dit.model_type,
        "num_heads": declared.get("num_heads", patch[0] // HEAD_DIM),
        "dim": patch[0],
        "in_dim": patch[1],
        "patch_size": patch[2:],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "out_dim": out_dim,
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


def vae_class(source: TensorSource) -> type[VAEConfig]:
    """Return the kind of a VAE: that of Wan2.2 has nested stages."""
    return VAE22Config if VAE22_MARK in source.tensors else VAEConfig


def vae_shapes(source: TensorSource) -> Shapes:
    """Return the fields of the VAE's config that its tensors show.

    The encoder is a list of levels: residual blocks, then a resampling in all but the last. In
    Wan2.1 the list is flat; in Wan2.2 a level is a list of its own, and the decoder has a width.
    """
    cls = vae_class(source)
    shape, nested = _shape_of(source, VAES[cls]), cls is VAE22Config
    dim, z_dim = shape("encoder.conv1.weight", 5)[0], shape("conv2.weight", 5)[0]
    levels: list[list[int]] = [[]]  # widths of the residual blocks
    temporal = []
    for place, names in _encoder_layers(source, nested):
        if "residual.6.weight" in names:
            levels[-1].append(shape(f"{place}.residual.6.weight", 5)[0])
        else:
            temporal.append("time_conv.weight" in names)
            levels.append([])
    same_length = len({len(level) for level in levels}) == 1
    if not all(levels) or not same_length or any(level[-1] % dim for level in levels):
        raise RequestError(
            f"{source.path} is not {VAES[cls]} in the official names: its levels differ"
        )
    found: Shapes = {
        "dim": dim,
        "z_dim": z_dim,
        "dim_mult": tuple(level[-1] // dim for level in levels),
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": tuple(temporal),
    }
    if nested:
        found["dec_dim"] = shape("decoder.conv1.weight", 5)[0] // found["dim_mult"][-1]
    return found


def _encoder_layers(source: TensorSource, nested: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the encoder's layers in order: the path of each, and what follows it in names."""
    for number, names in _numbered(source, "encoder.downsamples.").items():
        place = f"encoder.downsamples.{number}"
        if not nested:
            yield place, names
            continue
        for inner, rest in _numbered(source, f"{place}.downsamples.").items():
            yield f"{place}.downsamples.{inner}", rest


def statistics(
    cls: type[VAEConfig], found: Shapes, declared: Mapping[str, Any], file: Path
) -> Mapping[str, Any]:
    """Add the published latent statistics, unless others are declared.

    A VAE of 16 channels (Wan2.2: 48) encodes into the published latent, whatever its width.
    """
    if "latent_mean" in declared and "latent_std" in declared:
        return declared
    published = next(spec.vae for spec in FAMILY if type(spec.vae) is cls)
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
    return configure(vae_class(source), found, latent, source.path)
