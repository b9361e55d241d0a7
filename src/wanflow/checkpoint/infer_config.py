"""The shape of a model's parts, read from their tensors; what a config says beside it must agree.

What is built never exceeds what the files hold, and what the files hold is told from its relatives
by its shapes.
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
HEAD_DIM = 128  # of every published Wan model: how many heads there are, the tensors do not show

# Relatives of the model, by the first thing that gives them away.
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
    """The name of the model that a DiT belongs to, where that is a relative of ours."""
    kind, patches = config.get("model_type", "t2v"), source.tensors.get("patch_embedding.weight")
    channels = (
        patches.shape[1]
        if patches is not None and len(patches.shape) == 5
        else config.get("in_dim")
    )
    names = [
        name
        for mark, name in BY_TENSOR.items()
        if any(key.startswith(mark) for key in source.tensors)
    ]
    name = BY_CHANNELS.get(channels) if isinstance(channels, int) else None
    if channels == T2V_A14B.dit.in_dim and patches is not None:
        name = BY_WIDTH.get(patches.shape[0])
    return (
        name
        or next(iter(names), None)
        or (None if kind == "t2v" else BY_TYPE.get(str(kind), f"a model of type {kind!r}"))
    )


def refuse_relatives(source: TensorSource, config: Mapping[str, Any]) -> None:
    """RequestError, by name, for the DiT of a model that is not text to video."""
    name = relative(source, config)
    if name:
        raise RequestError(f"{source.path} holds {name}; {ONLY}")


def _shape_of(source: TensorSource, what: str) -> Callable[[str, int], tuple[int, ...]]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        info = source.tensors.get(name)
        if info is None or len(info.shape) != rank or not all(info.shape):
            has = "has none" if info is None else f"has {list(info.shape)}"
            raise RequestError(
                f"{source.path} is not {what} in the official names: {name} should have {rank}"
                f" dimensions, and it {has}"
            )
        return info.shape

    return shape


def _numbered(source: TensorSource, prefix: str) -> dict[int, list[str]]:
    """Tensor names below `prefix`, by the number that follows it."""
    groups: dict[int, list[str]] = {}
    for name in source.tensors:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and len(number) < 9:
            groups.setdefault(int(number), []).append(rest)
            if len(groups) > MOST_BLOCKS:  # building them takes time even without memory
                raise RequestError(
                    f"{source.path} has more than {MOST_BLOCKS} {prefix[:-1]}: no model of this"
                    " kind"
                )
    return dict(sorted(groups.items()))


def dit_shapes(source: TensorSource, said: Mapping[str, Any]) -> Shapes:
    """What an expert's tensors say of its `DiTConfig`; the number of heads, which they do not, by
    what every published model has.

    Raises:
        RequestError: when the tensors are no expert's, or nothing says how many heads there are.
    """
    shape = _shape_of(source, "an expert")
    patch, text, head = (
        shape("patch_embedding.weight", 5),
        shape("text_embedding.0.weight", 2),
        shape("head.head.weight", 2),
    )
    if "num_heads" not in said and patch[0] % HEAD_DIM:
        raise RequestError(
            f"{source.path}: nothing says how many heads this expert of width {patch[0]} has; write"
            f' it into {SHEET} beside it, as {{"dit": {{"num_heads": N}}}}'
        )
    return {
        "num_heads": said.get("num_heads", patch[0] // HEAD_DIM),
        "dim": patch[0],
        "in_dim": patch[1],
        "patch_size": patch[2:],
        "text_dim": text[1],
        "out_dim": head[0] // math.prod(patch[2:]),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "num_layers": len(_numbered(source, "blocks.")),
    }


def text_shapes(source: TensorSource) -> Shapes:
    """What the encoder's tensors say of its `TextConfig`."""
    shape = _shape_of(source, "a UMT5 encoder")
    (vocab, dim), (buckets, heads) = (
        shape("token_embedding.weight", 2),
        shape("blocks.0.pos_embedding.embedding.weight", 2),
    )
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
    """What the VAE's tensors say of its `VAEConfig`: levels of residual blocks, each but the last
    ending in a resampling.
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
    if (
        not all(levels)
        or len({len(level) for level in levels}) > 1
        or any(level[-1] % dim for level in levels)
    ):
        raise RequestError(
            f"{source.path} is not the Wan2.1 VAE in the official names: its levels are not alike"
        )
    mult = tuple(level[-1] // dim for level in levels)
    return {
        "dim": dim,
        "z_dim": z_dim,
        "dim_mult": mult,
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": tuple(temporal),
    }


def statistics(found: Shapes, said: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Add the published latent statistics where nothing else is said: whatever its width, a VAE of
    16 channels is one for this latent.
    """
    if "latent_mean" in said and "latent_std" in said:
        return said
    published = T2V_A14B.vae
    if found["z_dim"] != published.z_dim:
        raise RequestError(
            f"{file} has {found['z_dim']} latent channels, and {SHEET} beside it gives no"
            " latent_mean and latent_std for them"
        )
    return {"latent_mean": published.latent_mean, "latent_std": published.latent_std, **said}


def configure(cls: type[C], found: Shapes, said: Mapping[str, Any], file: Path) -> C:
    """A config of what a file says and what its tensors show; RequestError where the two differ or
    a value makes no sense.
    """
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    for key, value in found.items():
        if said.get(key, value) != value:
            raise RequestError(
                f"{file}: the config says {key} {said[key]}, the tensors say {value}"
            )
    for field in fields(cls):
        value, kind = said.get(field.name, field.default), type(field.default)
        good = isinstance(value, int | float) if kind is float else type(value) is kind
        if kind is tuple and good:
            good = all(isinstance(item, int | float) for item in value)
        if not good or (kind is int and value < 1):
            raise RequestError(
                f"{file}: {field.name} {value!r} makes no sense; the published model has"
                f" {field.default!r}"
            )
    return from_mapping(cls, {**said, **found}, str(file))


def config_of(kind: Kind, source: TensorSource) -> DiTConfig | TextConfig | VAEConfig:
    """Return the shape of a part from its tensors alone; what they do not show has its default.

    Raises:
        RequestError: when they are not such a part's.
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
