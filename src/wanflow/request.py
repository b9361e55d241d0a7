"""Describe what to make: a request, its LoRAs, and the request with every value filled in.

Field names are the official flags where those exist. Standard library only.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, cast

from wanflow.config import TRAIN_STEPS, RequestError, Solver
from wanflow.geometry import COMMON, geometry_of, parse_size, picture_size
from wanflow.presets import ONLY, SETTINGS, Expert, ModelSpec
from wanflow.settings import LONGEST, adopt, check, setting
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
        return {"high": self.high, "low": self.low, ONLY: self.both}[expert] or 0.0


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


@dataclass(frozen=True)
class PictureRecord:
    """What a recipe keeps of a picture.

    sha256: of its pixels. width, height: its own, in pixels. file: where it was, if it was a file.
    """

    sha256: str
    width: int
    height: int
    file: str = ""

    def __post_init__(self) -> None:
        sides = (self.width, self.height)
        if not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            raise RequestError(f"sha256 must be 64 hex digits (got {shown(self.sha256)})")
        if not all(type(side) is int and 0 < side < 1 << 20 for side in sides):
            raise RequestError(f"a picture's sides must be whole numbers (got {shown(sides)})")
        if not isinstance(self.file, str) or len(self.file) > LONGEST:
            raise RequestError(f"a picture's file must be text (got {shown(self.file)})")

    def __str__(self) -> str:
        return f"{self.width} x {self.height} pixels, sha256 {self.sha256[:12]}"


@dataclass(frozen=True)
class Picture(PictureRecord):
    """An opened picture; `pixels` are uint8 [height, width, 3]."""

    pixels: Any = field(default=None, repr=False, compare=False)

    @property
    def record(self) -> PictureRecord:
        return PictureRecord(self.sha256, self.width, self.height, self.file)


PICTURES = ("image", "last_image")  # fields of a request
PROMPT = 20_000  # characters: the model reads 512 tokens; cleaning takes the square of its length
LORAS = 64
VIDEOS = 10_000  # of one call, or of one command
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
    image: str | PictureRecord | None = setting(
        None, group="picture", metavar="FILE", help="a picture that the video begins with"
    )
    last_image: str | PictureRecord | None = setting(
        None, group="picture", metavar="FILE", help="a picture that the video ends with"
    )
    size: str | tuple[int, int] | None = setting(
        None,
        group="main",
        metavar="WIDTH*HEIGHT",
        help="multiples of 16 or 32, to 16384; with a picture, the area that its shape is given",
    )
    exact_size: bool = setting(
        False, group="picture", switch=True, help="with a picture too, make exactly --size"
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
        """Fill in the model's defaults and check every value; the size follows from the picture.

        Raises:
            RequestError: naming the field, its value, and what it may be; for a picture that is
                not opened, or that the model does not take.
        """
        check(Request, self)
        pictures = self.pictures(spec)
        values: dict[str, Any] = {}
        for one in fields(CompleteRequest):
            value = getattr(self, one.name)
            if value is None:
                value = getattr(spec, one.name) if one.default is MISSING else one.default
            values[one.name] = value
        values["lora"] = tuple(str(lora) for lora in self.loras())
        geometry = geometry_of(spec)
        values["size"] = parse_size(values["size"], geometry)
        if pictures and not self.exact_size:
            first, (width, height) = pictures[0], values["size"]
            values["size"] = picture_size(spec, (first.width, first.height), width * height)
        for name in PICTURES:
            values[name] = values[name] and values[name].record
        if spec.expert_names == (ONLY,):
            values |= self._for_one_network(spec)
        if isinstance(self.seed, int) and self.seed < 0:
            values["seed"] = secrets.randbelow(2**32)  # a person can type it
        complete = CompleteRequest(**values)
        geometry.check_frames(complete.frame_num)
        return complete

    def _given(self) -> dict[str, Any]:
        pictures = {name: getattr(self, name) for name in PICTURES}
        return {name: one for name, one in pictures.items() if one is not None}

    def refuse_pictures(self, spec: ModelSpec, needed: bool = True) -> None:
        """Raise RequestError for a picture that a model does not take, or for one that it lacks.

        Args:
            spec: the model.
            needed: whether a model of pictures must have one; a plan goes without.
        """
        given = self._given()
        takes = {"text": 0, "channels": 2, "first_frame": 1}[spec.conditioning]
        for name in given:
            if name not in PICTURES[:takes]:
                raise RequestError(
                    f"{name}: {spec.name} takes no picture there; I2V-A14B and nano-i2v take a"
                    " first and a last one, TI2V-5B a first one"
                )
        if needed and takes == 2 and not given:
            raise RequestError(
                f"{spec.name} makes a video of a picture: give one with --image FILE, or"
                " --last_image FILE"
            )

    def pictures(self, spec: ModelSpec) -> tuple[Picture, ...]:
        """Return the opened pictures, the first first; RequestError where a model takes none."""
        self.refuse_pictures(spec, needed=False)
        pictures = self._given()
        for name, one in pictures.items():
            if not isinstance(one, Picture):
                raise RequestError(f"{name} {shown(one)} is not opened; see wanflow.pictures")
        return cast(tuple[Picture, ...], (*pictures.values(),))

    def _for_one_network(self, spec: ModelSpec) -> dict[str, Any]:
        """Return what a model without two experts has one of: guidance, and a LoRA's strength."""
        high, low = self.cfg_high, self.cfg_low
        if high is not None and low is not None and high != low:
            raise RequestError(
                f"cfg_high {high} and cfg_low {low}: {spec.name} has no two experts; give one scale"
            )
        if self.boundary not in (None, spec.boundary):
            raise RequestError(f"boundary {self.boundary}: {spec.name} has no two experts")
        loras = self.loras()
        if any(lora.high != lora.low for lora in loras):
            raise RequestError(
                f"lora: {spec.name} has no two experts; write FILE@0.8 in place of high= and low=,"
                " and give the file a name without high or low"
            )
        # A file that was found has a strength for each expert, here the same.
        both = [lora.both if lora.high is None else lora.high for lora in loras]
        one = [replace(a, both=b, high=None, low=None) for a, b in zip(loras, both, strict=True)]
        scale = spec.cfg_low if high is None and low is None else (low if high is None else high)
        return {"cfg_high": scale, "cfg_low": scale, "lora": tuple(map(str, one))}

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
    image: PictureRecord | None = None
    last_image: PictureRecord | None = None

    def __post_init__(self) -> None:
        for name in PICTURES:
            object.__setattr__(self, name, _record(name, getattr(self, name)))
        object.__setattr__(self, "size", parse_size(self.size))
        check(Request, self, complete=True)
        object.__setattr__(self, "lora", tuple(self.lora))
        if not self.prompt.strip():
            raise RequestError("the prompt is empty; say what the video shows")
        COMMON.check_frames(self.frame_num)
        if self.last_image is not None and self.frame_num == 1:
            raise RequestError("last_image needs a video: frame_num 5 or more (got 1)")
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

    @property
    def exact_size(self) -> bool:
        """Return True: the size is the video's, also where a picture gave its shape."""
        return True

    def guidance(self, expert: Expert, step: int) -> float:
        """Return the guidance scale at a step (1-based)."""
        if step <= self.cfg_start_steps:
            return self.cfg_start
        return self.cfg_high if expert == "high" else self.cfg_low


def _record(name: str, value: Any) -> PictureRecord | None:
    """Return a picture's record, which a recipe holds as an object."""
    if value is None or type(value) is PictureRecord:
        return value
    known = [one.name for one in fields(PictureRecord)]
    if not isinstance(value, dict) or not set(known[:3]) <= set(value) <= set(known):
        raise RequestError(f"{name} must hold {', '.join(known)} of a picture (got {shown(value)})")
    return PictureRecord(**value)
