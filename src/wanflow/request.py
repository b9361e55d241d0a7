"""Describe what to make: a request, its LoRAs, and the request with every value filled in.

Field names are the official flags where those exist. Standard library only.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from wanflow.config import TRAIN_STEPS, RequestError, Solver
from wanflow.geometry import COMMON, geometry_of, parse_size
from wanflow.presets import SETTINGS, Expert, ModelSpec
from wanflow.settings import adopt, check, setting
from wanflow.untrusted import shown


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its strength on each expert and its steps (1-based, both ends included).

    Written `FILE`, `FILE@0.8`, `FILE@high=1,low=0.6`, `FILE@1,steps=3-8` (`3-` to the end, `-4`
    from the start). Where one expert is named, the other gets strength 0. `resolved` replaces a
    strength of None by what the file's name says.
    """

    path: str
    both: float = 1.0
    high: float | None = None
    low: float | None = None
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        """Return the text that `parse_lora` reads."""
        strengths = {"high": self.high, "low": self.low}
        items = [f"{name}={value!r}" for name, value in strengths.items() if value is not None]
        items = items or [repr(self.both)]
        if self.first is not None or self.last is not None:
            items.append(f"steps={self.first or ''}-{self.last or ''}")
        return f"{self.path}@{','.join(items)}"

    def resolved(self, named: str | None, first: int | None = None) -> Lora:
        """Return it with a strength for each expert.

        Args:
            named: the expert that the file is named for, which alone gets it.
            first: its first step, if it has no steps.
        """
        high, low = self.high, self.low
        if high is None and low is None:
            high = 0.0 if named == "low" else self.both
            low = 0.0 if named == "high" else self.both
        begin = first if self.first is None and self.last is None else self.first
        return Lora(self.path, self.both, high or 0.0, low or 0.0, begin, self.last)

    def strength(self, expert: Expert, step: int) -> float:
        """Return the strength of a resolved LoRA at a step (1-based)."""
        if step < (self.first or 1) or (self.last is not None and step > self.last):
            return 0.0
        return (self.high if expert == "high" else self.low) or 0.0


def parse_lora(text: str) -> Lora:
    """Read the text that `Lora` describes.

    Raises:
        RequestError: for strengths or steps that cannot be read, or are out of range.
    """
    wrong = RequestError(
        f"lora {shown(text)}: after the last @ comes a strength, or high=1,low=0.6, then steps=2-8"
        " unless it applies to all steps"
    )
    path, mark, tail = text.rpartition("@")
    in_path = re.search(r"[/\\]|\.(safetensors|pt|pth|bin)\Z", tail, re.IGNORECASE)
    if not mark or in_path:
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
            raise wrong from None
    for name, strength in values.items():
        if not -100 <= strength <= 100:  # also true for NaN
            raise RequestError(f"lora {path}: strength {name} {strength} is not from -100 to 100")
    if (
        not path
        or ("both" in values and len(values) > 1)
        or first == 0
        or (last is not None and last < (first or 1))
    ):
        raise wrong
    return Lora(path, values.get("both", 1.0), values.get("high"), values.get("low"), first, last)


PROMPT = 20_000  # characters: the model reads 512 tokens; cleaning takes the square of its length
LORAS = 64
SCALE: dict[str, Any] = {"group": "sampling", "range": (0, 100), "metavar": "SCALE"}  # of guidance


@dataclass(frozen=True)
class Request:
    """What to make. None leaves a value to the model's own default (see `complete`)."""

    prompt: str = setting(group="main", longest=PROMPT, metavar="TEXT", help="what the video shows")
    negative_prompt: str | None = setting(
        None,
        group="video",
        longest=PROMPT,
        metavar="TEXT",
        help='what to steer away from; "" for nothing',
    )
    size: str | tuple[int, int] | None = setting(
        None, group="main", metavar="WIDTH*HEIGHT", help="multiples of 16, to 16384"
    )
    frame_num: int | None = setting(
        None,
        group="main",
        range=(1, COMMON.most_frames),
        metavar="N",
        help="frames, 4n+1; 1 is a picture",
    )
    sample_solver: Solver | None = setting(None, group="sampling", help="the solver")
    sample_steps: int | None = setting(
        None, group="sampling", range=(1, TRAIN_STEPS), metavar="N", help="denoising steps"
    )
    sample_shift: float | None = setting(
        None,
        group="sampling",
        range=(1e-3, 1000),
        metavar="SHIFT",
        help="shift of the noise levels; larger spends more steps on high noise",
    )
    cfg_high: float | None = setting(
        None, **SCALE, help="guidance of the high-noise expert; 1 is none"
    )
    cfg_low: float | None = setting(
        None, **SCALE, help="guidance of the low-noise expert; 1 is none"
    )
    boundary: float | None = setting(
        None,
        group="sampling",
        range=(0, 1),
        metavar="SHARE",
        help="share of the 1000 timesteps from which the high-noise expert denoises",
    )
    fps: float | None = setting(
        None, group="video", range=(1, 240), metavar="N", help="frames per second of the file"
    )
    seed: int | None = setting(
        -1,
        group="video",
        flag=("base_seed", "seed"),
        range=(-(2**63), 2**63 - 1),
        metavar="N",
        help="the noise's seed; the recipe stores it; below 0: draw one",
    )
    lora: tuple[str, ...] | None = setting(
        None,
        group="LoRA",
        longest=LORAS,
        metavar="FILE[@STRENGTH]",
        help="LoRA files or folders: FILE, FILE@0.8, FILE@high=1,low=0.6, FILE@1,steps=3-8",
    )
    lora_from: int | None = setting(
        None,
        flag=(),
        range=(1, TRAIN_STEPS),
        help="the first step of those LoRAs that name no steps",
    )
    cfg_start: float | None = setting(
        None, **SCALE, help="guidance of the first --cfg_start_steps steps, for either expert"
    )
    cfg_start_steps: int | None = setting(
        None,
        group="sampling",
        range=(0, TRAIN_STEPS),
        metavar="N",
        help="steps that use --cfg_start",
    )

    def __post_init__(self) -> None:
        adopt(Request, self)
        if self.seed is None:
            object.__setattr__(self, "seed", -1)

    def complete(self, spec: ModelSpec) -> CompleteRequest:
        """Fill in the model's defaults and check every value.

        Raises:
            RequestError: naming the field, its value, and what it may be.
        """
        check(Request, self)
        values: dict[str, Any] = {}
        for field in fields(CompleteRequest):
            value = getattr(self, field.name)
            if value is None:
                value = getattr(spec, field.name) if field.default is MISSING else field.default
            values[field.name] = value
        values["lora"] = tuple(str(lora) for lora in self.loras())
        geometry = geometry_of(spec)
        values["size"] = parse_size(values["size"], geometry)
        if isinstance(self.seed, int) and self.seed < 0:
            values["seed"] = secrets.randbelow(2**32)  # a person can type it
        complete = CompleteRequest(**values)
        geometry.check_frames(complete.frame_num)
        return complete

    def loras(self) -> tuple[Lora, ...]:
        """Return the LoRAs, each with its first step; strengths stay as given."""
        check(Request, self)
        loras = (parse_lora(text) for text in self.lora or ())
        return tuple(
            replace(lora, first=lora.first or (None if lora.last else self.lora_from))
            for lora in loras
        )


def with_settings(request: Request, name: str) -> Request:
    """Return the request with the values of a step preset where it has none.

    Raises:
        RequestError: for an unknown name.
    """
    if name not in SETTINGS:
        raise RequestError(f"preset {name!r} is none of {', '.join(SETTINGS)}")
    return replace(
        request,
        **{key: value for key, value in SETTINGS[name].items() if getattr(request, key) is None},
    )


@dataclass(frozen=True)
class CompleteRequest:
    """A request with every value filled in, which a recipe stores."""

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
        check(Request, self, complete=True)
        object.__setattr__(self, "lora", tuple(self.lora))
        if not self.prompt.strip():
            raise RequestError("the prompt is empty; say what the video shows")
        COMMON.check_frames(self.frame_num)
        if self.seed < 0:
            raise RequestError(f"seed must be at least 0 (got {self.seed})")
        if self.cfg_start_steps > self.sample_steps:
            raise RequestError(
                f"cfg_start_steps must be at most sample_steps, {self.sample_steps}"
                f" (got {self.cfg_start_steps})"
            )
        for lora in self.loras:
            if (lora.first or 1) > self.sample_steps:
                raise RequestError(
                    f"lora {lora}: it begins at step {lora.first}, but sample_steps is"
                    f" {self.sample_steps}"
                )

    @property
    def loras(self) -> tuple[Lora, ...]:
        return tuple(parse_lora(text) for text in self.lora)

    def guidance(self, expert: Expert, step: int) -> float:
        """Return the guidance scale at a step (1-based)."""
        if step <= self.cfg_start_steps:
            return self.cfg_start
        return self.cfg_high if expert == "high" else self.cfg_low
