"""Every setting of wanflow as frozen dataclasses, split by lifetime; standard library only.

Shapes (`DiTConfig`, `TextConfig`, `VAEConfig`, gathered in `Preset`) are facts of a checkpoint.
`Request` says what to make, `Runtime` how to run it, `Train` how to train it. Field names are the
official configuration keys and flags where those exist.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

Solver = Literal["unipc", "dpm++", "euler"]
SOLVERS: tuple[Solver, ...] = ("unipc", "dpm++", "euler")
TRAIN_STEPS = 1000  # timesteps run from 1000 (noise) to 0 (data); sigma = timestep / 1000


# What a terminal obeys or cannot show: control characters, those that turn the direction of
# writing, halves of characters.
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_LINE = 3000  # characters


def plain(text: str) -> str:
    """Text of a stranger as one line that can be shown, with what cannot be as escapes."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class RequestError(ValueError):
    """Bad input or a refusal: one clear line for the user (or several, one an argument), exit code
    2, HTTP 4xx.

    Names and values in it come from files of strangers, so each line is shown as `plain` and
    without the middle of what is endless.
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
                "the Wan2.1 VAE has attention only in the middle; attn_scales must be empty"
            )
        if len(self.latent_mean) != self.z_dim or len(self.latent_std) != self.z_dim:
            raise RequestError(f"latent_mean and latent_std need {self.z_dim} values each")

    @property
    def spatial_stride(self) -> int:
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temperal_downsample))


@dataclass(frozen=True)
class Preset:
    """A model's shapes with the defaults its authors publish for it."""

    name: str
    task: str
    dit: DiTConfig
    text: TextConfig
    vae: VAEConfig
    boundary: float
    sample_shift: float
    sample_steps: int
    cfg_high: float
    cfg_low: float
    size: tuple[int, int]
    frame_num: int
    fps: int
    negative_prompt: str
    sample_solver: Solver = "unipc"


def parse_size(value: str | tuple[int, int]) -> tuple[int, int]:
    """`"1280*720"`, `"1280x720"` or `(1280, 720)` -> (width, height), each a positive multiple of
    16.
    """
    try:
        parts = (
            value.lower().replace("x", "*").split("*") if isinstance(value, str) else list(value)
        )
        width, height = (int(part) for part in parts)
    except (ValueError, TypeError):
        raise RequestError(f"size {value!r} is not WIDTH*HEIGHT, such as 1280*720") from None
    for side, name in ((width, "width"), (height, "height")):
        if side <= 0 or side % 16:
            near = max(16, round(side / 16) * 16)
            raise RequestError(
                f"{name} {side} is not a positive multiple of 16; the nearest is {near}"
            )
    return width, height


@dataclass(frozen=True)
class Lora:
    """A LoRA file and where it works: at which strength on each expert, in which steps (1-based,
    both ends included).

    Written `FILE`, `FILE@0.8`, `FILE@high=1,low=0.6`, `FILE@1,steps=3-8` (`3-` to the end, `-4`
    from the start). An expert that is not named where the other one is gets none. A strength of
    None is settled by the file's name (`resolved`).
    """

    path: str
    both: float = 1.0
    high: float | None = None
    low: float | None = None
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        """The same in words that `parse_lora` reads."""
        named = [
            f"{name}={value!r}"
            for name, value in (("high", self.high), ("low", self.low))
            if value is not None
        ]
        steps = (
            []
            if self.first is None and self.last is None
            else [f"steps={self.first or ''}-{self.last or ''}"]
        )
        return f"{self.path}@{','.join([*(named or [repr(self.both)]), *steps])}"

    def resolved(self, named: Literal["high", "low"] | None, first: int | None = None) -> Lora:
        """Every strength settled: a file that is named for one expert works on that one only.
        `first` is its first step, if none is set.
        """
        high, low = self.high, self.low
        if high is None and low is None:
            high, low = (
                (0.0 if named == "low" else self.both),
                (0.0 if named == "high" else self.both),
            )
        begin = first if self.first is None and self.last is None else self.first
        return Lora(self.path, self.both, high or 0.0, low or 0.0, begin, self.last)

    def strength(self, expert: Literal["high", "low"], step: int) -> float:
        """Of a resolved LoRA, at a step (1-based)."""
        if step < (self.first or 1) or (self.last is not None and step > self.last):
            return 0.0
        return (self.high if expert == "high" else self.low) or 0.0


def parse_lora(text: str) -> Lora:
    """Read what `Lora` describes.

    Raises:
        RequestError: for strengths or steps that cannot be read, or are out of range.
    """
    wrong = (
        f"lora {text!r}: after the last @ comes a strength, or high=1,low=0.6, and steps=2-8 if it"
        " is not for all steps"
    )
    path, mark, tail = text.rpartition("@")
    if (
        not mark
        or "/" in tail
        or "\\" in tail
        or tail.lower().endswith((".safetensors", ".pt", ".pth", ".bin"))
    ):
        return Lora(text)
    values: dict[str, float] = {}
    first = last = None
    for item in tail.replace(";", ",").split(","):
        name, equals, value = item.strip().rpartition("=")
        try:
            if name == "steps":
                found = re.fullmatch(r"(\d*)(-?)(\d*)", value)
                if not found or value in ("", "-"):
                    raise ValueError
                first = int(found[1]) if found[1] else None
                last = int(found[3]) if found[3] else (None if found[2] else first)
            elif name in ("high", "low") or not equals:
                values[name or "both"] = float(value)
            else:
                raise ValueError
        except ValueError:
            raise RequestError(wrong) from None
    for name, strength in values.items():
        _within(f"lora {path}: strength {name}", strength, -100, 100)
    if (
        not path
        or ("both" in values and len(values) > 1)
        or first == 0
        or (last is not None and last < (first or 1))
    ):
        raise RequestError(wrong)
    return Lora(path, values.get("both", 1.0), values.get("high"), values.get("low"), first, last)


@dataclass(frozen=True)
class Request:
    """What to make. `None` means the model's own default (see `complete`)."""

    prompt: str
    negative_prompt: str | None = None
    size: str | tuple[int, int] | None = None
    frame_num: int | None = None
    sample_solver: Solver | None = None
    sample_steps: int | None = None
    sample_shift: float | None = None
    cfg_high: float | None = None
    cfg_low: float | None = None
    boundary: float | None = None
    fps: float | None = None
    seed: int = -1  # negative: draw one (the recipe keeps it)
    lora: tuple[str, ...] | None = None  # each as `Lora` describes
    lora_from: int | None = None  # the first step of those LoRAs that name no steps
    cfg_start: float | None = (
        None  # guidance of the first `cfg_start_steps` steps, whichever expert does them
    )
    cfg_start_steps: int | None = None

    def complete(self, preset: Preset) -> CompleteRequest:
        """Fill in the model's defaults and check every value.

        Raises:
            RequestError: naming the field, what it may be, and the nearest good value where there
                is one.
        """
        values: dict[str, Any] = {}
        for field in fields(CompleteRequest):
            value = getattr(self, field.name)
            if value is None:
                value = getattr(preset, field.name) if field.default is MISSING else field.default
            values[field.name] = value
        values["lora"] = tuple(str(lora) for lora in self.loras())
        values["size"] = parse_size(values["size"])
        if isinstance(self.seed, int) and self.seed < 0:
            values["seed"] = secrets.randbelow(2**63)
        return CompleteRequest(**values)

    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs, read and with their first step, their strengths as given."""
        if self.lora_from is not None and (
            not isinstance(self.lora_from, int) or self.lora_from < 1
        ):
            raise RequestError(f"lora_from {self.lora_from!r} is not a step; the first is 1")
        texts = (self.lora,) if isinstance(self.lora, str) else self.lora or ()
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(
                "lora: give file names, each with its strength after an @ if it is not 1"
            )
        loras = (parse_lora(text) for text in texts)
        return tuple(
            (
                lora
                if self.lora_from is None or lora.first or lora.last
                else replace(lora, first=self.lora_from)
            )
            for lora in loras
        )


@dataclass(frozen=True)
class CompleteRequest:
    """A request with nothing left open: this is what a recipe stores."""

    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    frame_num: int
    sample_solver: Solver
    sample_steps: int
    sample_shift: float
    cfg_high: float
    cfg_low: float
    boundary: float
    fps: float
    seed: int
    lora: tuple[str, ...] = ()
    cfg_start: float = 1.0
    cfg_start_steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", parse_size(self.size))
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("the prompt is empty; say what the video should show")
        object.__setattr__(self, "lora", tuple(self.lora))
        for name in ("frame_num", "sample_steps", "seed", "cfg_start_steps"):
            if not isinstance(getattr(self, name), int):
                raise RequestError(f"{name} {getattr(self, name)!r} is not a whole number")
        if self.frame_num < 1 or self.frame_num % 4 != 1:
            near = max(1, round((self.frame_num - 1) / 4) * 4 + 1)
            raise RequestError(f"frame_num {self.frame_num} is not 4n+1; the nearest is {near}")
        if self.sample_solver not in SOLVERS:
            raise RequestError(
                f"sample_solver {self.sample_solver!r} is none of {', '.join(SOLVERS)}"
            )
        _within("sample_steps", self.sample_steps, 1, TRAIN_STEPS)
        _within("sample_shift", self.sample_shift, 1e-3, 1000)
        _within("cfg_high", self.cfg_high, 0, 100)
        _within("cfg_low", self.cfg_low, 0, 100)
        _within("cfg_start", self.cfg_start, 0, 100)
        _within("cfg_start_steps", self.cfg_start_steps, 0, self.sample_steps)
        _within("boundary", self.boundary, 0, 1)
        _within("fps", self.fps, 1, 240)
        _within("seed", self.seed, 0, 2**63 - 1)
        for lora in self.loras:
            if (lora.first or 1) > self.sample_steps:
                raise RequestError(
                    f"lora {lora}: it begins at step {lora.first}, and there are"
                    f" {self.sample_steps}"
                )

    @property
    def loras(self) -> tuple[Lora, ...]:
        return tuple(parse_lora(text) for text in self.lora)

    def guidance(self, expert: Literal["high", "low"], step: int) -> float:
        """The guidance scale at a step (1-based)."""
        if step <= self.cfg_start_steps:
            return self.cfg_start
        return self.cfg_high if expert == "high" else self.cfg_low


def _within(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not low <= value <= high:  # also false for NaN
        raise RequestError(f"{name} {value} is outside {low:g} to {high:g}")


Quantization = Literal["fp8", "int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("fp8", "int8", "nf4")


@dataclass(frozen=True)
class Runtime:
    """How to run. None leaves a choice to the plan; only `noise_device` and `quantize` change what
    is made beyond rounding.

    t5_cpu: the text encoder works on the CPU.
    keep_experts: both experts stay on the device; else the one at work only.
    prefetch: the next expert is read into RAM while the current one works.
    resident_blocks: how many of an expert's blocks stay on the device; the others are streamed, one
        ahead of the one at work.
    stream_from: where streamed blocks wait: in pinned RAM, or in their files.
    chunk_tokens: how many tokens go at a time through all that works token by token (everything but
        attention); 0: all.
    vae_tile: the side in pixels of the tiles that the VAE decodes one after the other; 0: whole
        frames.
    quantize, quantize_layers: round the Linear weights of the blocks while they are read ("" keeps
        them), of the feed-forward or all.
    attention: the kernel, by a name of `wanflow doctor`; "auto" takes the first that works.
    text_cache: a folder where encoded prompts are kept; None keeps none.
    cfg_parallel, ring_size, ulysses_size: how several processes share a forward: a branch of
        guidance each, keys and values that go round, attention heads. Their product is the number
        of processes.
    dit_fsdp: each process keeps a share of the experts' weights, and has a block whole while it
        works.
    lora: "live" computes LoRAs beside the weights, so that strengths change and LoRAs go without
        reloading; "fused" adds them to the weights while those are read, which costs nothing per
        step, and reads an expert again when something changes for it.
    """

    device: str = "auto"
    dtype: str = "auto"
    t5_cpu: bool | None = None
    keep_experts: bool | None = None
    cfg_batch: bool | None = None
    noise_device: Literal["cpu", "cuda"] = "cpu"
    lora: Literal["live", "fused"] = "live"
    prefetch: bool | None = None
    resident_blocks: int | None = None
    stream_from: Literal["ram", "disk"] | None = None
    chunk_tokens: int | None = None
    vae_tile: int | None = None
    quantize: Quantization | Literal[""] = ""
    quantize_layers: Literal["ffn", "all"] = "ffn"
    attention: str = "auto"
    text_cache: str | None = None
    cfg_parallel: bool | None = None
    ring_size: int | None = None
    ulysses_size: int | None = None
    dit_fsdp: bool | None = None


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
