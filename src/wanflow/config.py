"""Describe the shapes of a checkpoint's models, and the error for bad input; standard library only.

Field names are the official configuration keys where those exist.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import floordiv
from typing import Any, ClassVar, Literal, TypeVar, cast

Solver = Literal["unipc", "dpm++", "euler"]
SOLVERS: tuple[Solver, ...] = ("unipc", "dpm++", "euler")
TRAIN_STEPS = 1000  # timesteps run from 1000 (noise) to 0 (data); sigma = timestep / 1000


# Characters that a terminal obeys or cannot show: controls, changes of direction, surrogates.
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_LINE = 3000  # characters


def plain(text: str) -> str:
    """Return untrusted text as one printable line; other characters become escapes."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class RequestError(ValueError):
    """Bad input or a refusal: exit code 2, HTTP 4xx. Each argument is a line for the user.

    A line may quote untrusted files, so it is shown as `plain` text and shortened.
    """

    def __str__(self) -> str:
        lines = [plain(str(line)) for line in self.args]
        half = LONGEST_LINE // 2
        return "\n".join(
            line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"
            for line in lines
        )


@dataclass(frozen=True)
class DiTConfig:
    """Shape of one expert. The names are those of the official `config.json`."""

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_type: str = "t2v"
    window_size: tuple[int, int] = (-1, -1)
    qk_norm: bool = True
    cross_attn_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "window_size", tuple(self.window_size))
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise RequestError(
                f"dim {self.dim} does not split into {self.num_heads} heads of even size"
            )
        if self.window_size != (-1, -1) or not self.qk_norm or not self.cross_attn_norm:
            raise RequestError(
                "only the published Wan2.2 blocks exist here: full attention, q/k norm, norm before"
                " cross-attention"
            )

    def grid(self, sides: Sequence[int]) -> tuple[int, int, int]:
        """Return the tokens along each side of a latent: frames, rows, columns."""
        frames, rows, columns = map(floordiv, sides, self.patch_size)
        return frames, rows, columns


@dataclass(frozen=True)
class TextConfig:
    """Shape of the UMT5 encoder."""

    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_dist: int = 128
    shared_pos: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.shared_pos:
            raise RequestError("UMT5 has a position table in every layer; shared_pos is T5's")


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the causal VAE and the statistics that normalise its latents.

    `temperal_downsample` keeps the spelling of the official key.
    """

    patch: ClassVar[int] = 1  # pixels along each side that become channels before the encoder
    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    attn_scales: tuple[float, ...] = ()
    dropout: float = 0.0
    latent_mean: tuple[float, ...] = (0.0,) * 16
    latent_std: tuple[float, ...] = (1.0,) * 16

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temperal_downsample", "attn_scales", "latent_mean", "latent_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.attn_scales:
            raise RequestError(
                "a Wan VAE has attention only in the middle; attn_scales must be empty"
            )
        if len(self.latent_mean) != self.z_dim or len(self.latent_std) != self.z_dim:
            raise RequestError(f"latent_mean and latent_std need {self.z_dim} values each")

    @property
    def spatial_stride(self) -> int:
        return int(self.patch * 2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temperal_downsample))

    @property
    def dec_dim(self) -> int:
        """The base width of the decoder."""
        return self.dim


@dataclass(frozen=True)
class VAE22Config(VAEConfig):
    """Shape of the VAE of TI2V-5B, whose decoder is wider than its encoder."""

    patch: ClassVar[int] = 2
    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    latent_mean: tuple[float, ...] = (0.0,) * 48
    latent_std: tuple[float, ...] = (1.0,) * 48

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = list(itertools.pairwise((1, *self.dim_mult)))
        if any(after not in (before, 2 * before, 4 * before) for before, after in steps) or (
            len(set(steps[-1])) > 1
        ):
            raise RequestError(
                f"dim_mult {list(self.dim_mult)} fits no Wan2.2 VAE: each must be 1, 2 or 4 times"
                " the one before, and the last as large as that: [1, 2, 4, 4]"
            )


T = TypeVar("T", bound=Any)


def from_mapping(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Build a config from a JSON object, ignoring keys that start with `_`.

    Raises:
        RequestError: for unknown keys or values that the config refuses, naming `source`.
    """
    known = {f.name for f in fields(cls)}
    plain = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = sorted(set(plain) - known)
    if unknown:
        raise RequestError(
            f"{source}: unknown keys {', '.join(unknown)} (known: {', '.join(sorted(known))})"
        )
    try:
        return cast(T, cls(**plain))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{source}: {error}") from None
