"""Turn the fields of a submission into a `wanflow.Request`, and a job into the video object."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from wanflow.config import RequestError
from wanflow.geometry import geometry_of, parse_size
from wanflow.presets import ModelSpec
from wanflow.request import (
    PICTURES,
    CompleteRequest,
    Lora,
    Picture,
    Request,
    parse_lora,
    with_settings,
)
from wanflow.serve.errors import Refusal
from wanflow.serve.fields import USER, fields_of, for_clients
from wanflow.serve.jobs import Job
from wanflow.serve.limits import Limits
from wanflow.untrusted import printable, shown

ReadPicture = Callable[[bytes | str, str], Picture]
SHA256 = re.compile("[0-9a-f]{64}")
DATA_URL = re.compile(r"data:image/[\w.+-]{1,40}(?:;[\w.+=-]{1,40})*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """A valid submission.

    model: its name. request: with opened pictures, and the seed drawn. complete: with the model's
    values. user: the client's own mark. mark: equal for equal submissions.
    """

    model: str
    request: Request
    complete: CompleteRequest
    user: str | None
    mark: str

    @property
    def document(self) -> dict[str, Any]:
        """The request as a job keeps it: given fields, with pictures by their hashes."""
        return _document(self.request)

    @property
    def about(self) -> dict[str, Any]:
        """What a job keeps to answer clients before it has a result."""
        one = self.complete
        return {
            "model": self.model,
            "width": one.size[0],
            "height": one.size[1],
            "frames": one.frame_num,
            "fps": one.fps,
            "steps": one.sample_steps,
            "user": self.user,
            "mark": self.mark,
        }

    @property
    def key(self) -> str:
        """Equal for jobs between which a worker reloads nothing."""
        one = self.complete
        return json.dumps([*one.size, one.frame_num, *one.lora], separators=(",", ":"))


def asked(
    given: Mapping[str, Any],
    in_form: bool,
    spec: ModelSpec,
    limits: Limits,
    loras: Mapping[str, Any],
    read_picture: ReadPicture,
) -> Asked:
    """Read a submission.

    Args:
        given: its fields; of a form, texts, and bytes of files.
        in_form: whether numbers are texts.
        spec: the model that is served.
        limits: of the server.
        loras: the names that a client may use.
        read_picture: opens a picture's bytes, or one that the server has by its sha256; a field's
            name accompanies it in messages.

    Raises:
        RequestError: naming the field.
        Refusal: for another model.
    """
    values = fields_of(given, in_form)
    _check_model(values.get("model"), spec)
    for name in ("n", "num_outputs_per_prompt"):
        if values.get(name, 1) != 1:
            raise RequestError(f"{name} {values[name]}: a job makes one video; submit it again")
    user = values.get("user")
    if user is not None and len(user) > USER:
        raise RequestError(f"user must have at most {USER} characters (got {len(user):,})")
    found: dict[str, Any] = {
        "size": _size(values),
        "frame_num": _frames(values, spec),
        "lora": _loras(values.get("lora"), loras),
        **_guidance(values),
    }
    for target, names in SAME.items():
        found[target] = _one_of(values, names)
    if found["prompt"] is None:
        raise RequestError("prompt is missing; expected text that says what the video shows")
    _check_prompts(found, limits)
    request = Request(**{name: value for name, value in found.items() if value is not None})
    request = _with_pictures(request, values, spec, read_picture)
    if "preset" in values:
        request = with_settings(request, values["preset"])
    spec_size = request.size or spec.size
    parse_size(spec_size, geometry_of(spec))
    complete = request.complete(spec)
    _check_limits(complete, limits)
    mark = hashlib.sha256(json.dumps([_document(request), user], sort_keys=True).encode())
    seeded = replace(request, seed=complete.seed)
    return Asked(spec.name, seeded, complete, user, mark.hexdigest())


# Fields that several names set, the first that is given wins where they agree.
SAME = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "sample_steps": ("sample_steps", "num_inference_steps"),
    "sample_shift": ("sample_shift", "flow_shift"),
    "sample_solver": ("sample_solver",),
    "boundary": ("boundary", "boundary_ratio"),
    "fps": ("fps",),
    "seed": ("seed", "base_seed"),
    "exact_size": ("exact_size",),
    "cfg_start": ("cfg_start",),
    "cfg_start_steps": ("cfg_start_steps",),
    "lora_from": ("lora_from",),
}


def _one_of(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the value that is given under one of several names; RequestError where two differ."""
    given = [name for name in names if name in values]
    if len({values[name] for name in given}) > 1:
        both = " and ".join(f"{name} {shown(values[name])}" for name in given)
        raise RequestError(f"{both} mean the same and differ; give one of them")
    return values[given[0]] if given else None


def _check_model(name: str | None, spec: ModelSpec) -> None:
    if name is not None and name.lower().rpartition("/")[2] != spec.name.lower():
        raise Refusal(
            404,
            f"model {shown(name)} is not served here; this server has {spec.name}",
            "model_not_found",
            "model",
        )


def _check_prompts(found: Mapping[str, Any], limits: Limits) -> None:
    for name in ("prompt", "negative_prompt"):
        if len(found[name] or "") > limits.max_prompt:
            raise RequestError(
                f"{name} has {len(found[name]):,} characters; at most {limits.max_prompt:,} are"
                " accepted"
            )
    if not found["prompt"].strip():
        raise RequestError("prompt is empty; expected text that says what the video shows")


def _check_limits(complete: CompleteRequest, limits: Limits) -> None:
    width, height = complete.size
    if width * height > limits.area:
        raise RequestError(
            f"size {width}x{height} is too large; at most the area of {limits.max_size} is accepted"
        )
    for name, value, most in (
        ("num_frames", complete.frame_num, limits.max_frames),
        ("num_inference_steps", complete.sample_steps, limits.max_steps),
    ):
        if value > most:
            raise RequestError(f"{name} {value:,} is too much; at most {most:,} are accepted")


def _size(values: Mapping[str, Any]) -> str | None:
    """Return the size that `size`, or width and height, ask for."""
    sides = [values.get("width"), values.get("height")]
    size = values.get("size")
    if sides == [None, None]:
        return size
    if None in sides:
        raise RequestError("width and height go together; give both, or size")
    text = f"{sides[0]}*{sides[1]}"
    if size is not None and [int(one) for one in re.findall(r"\d{1,9}", size)] != sides:
        raise RequestError(f"size {shown(size)} and width, height {text} differ; give one of them")
    return text


def _frames(values: Mapping[str, Any], spec: ModelSpec) -> int | None:
    """Return the frames that `num_frames`, or `seconds`, ask for."""
    frames: int | None = _one_of(values, ("frame_num", "num_frames"))
    if "seconds" not in values:
        return frames
    text = values["seconds"]
    right = isinstance(text, str | int | float) and not isinstance(text, bool)
    if not right or not re.fullmatch(r"\d{1,4}(\.\d{1,6})?", str(text).strip()):
        raise RequestError(f"seconds must be a number of seconds, such as 4 (got {shown(text)})")
    seconds = float(text)
    fps = values.get("fps", spec.fps)
    found = geometry_of(spec).nearest_frames(round(seconds * fps))
    if seconds <= 0:
        raise RequestError(f"seconds must be above 0 (got {shown(text)})")
    if frames not in (None, found):
        raise RequestError(
            f"num_frames {frames} and seconds {seconds:g} differ: {seconds:g} s at {fps:g} frames a"
            f" second are {found} frames; give one of them"
        )
    return found


def _guidance(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the guidance of each expert: as in diffusers, one scale alone is that of both."""
    high = values.get("guidance_scale")
    low = values.get("guidance_scale_2", high)
    return {"cfg_high": values.get("cfg_high", high), "cfg_low": values.get("cfg_low", low)}


def _loras(given: Any, known: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return LoRAs as a job keeps them: registered names, with strengths."""
    if given is None:
        return None
    return tuple(str(_lora(one, known)) for one in (given if isinstance(given, list) else [given]))


def _lora(given: Any, known: Mapping[str, Any]) -> Lora:
    words = "lora must be the name of a LoRA of this server, or {name, scale}"
    if isinstance(given, str):
        lora = parse_lora(given)
    elif isinstance(given, dict) and isinstance(given.get("name"), str):
        other = set(given) - {"name", "scale", "high", "low"}
        if other:
            raise RequestError(f"{words}; {printable(min(other))} is not taken from a client")
        scales = {key: value for key, value in given.items() if key != "name"}
        if not all(type(one) in (int, float) for one in scales.values()):
            raise RequestError(f"{words}; its scale must be a number")
        texts = [str(scales.pop("scale"))] if "scale" in scales else []
        texts += [f"{key}={value}" for key, value in scales.items()]
        lora = parse_lora(f"{given['name']}@{','.join(texts) or '1.0'}")
    else:
        raise RequestError(f"{words} (got {shown(given)})")
    if lora.path not in known:
        names = ", ".join(known) or "none; the server is started without a folder of LoRAs"
        raise RequestError(f"lora {shown(lora.path)} is not on this server; it has {names}")
    return lora


# Pictures

PLACES = {"image": ("input_reference", "image_reference", "image"), "last_image": ("last_image",)}


def _with_pictures(
    request: Request, values: Mapping[str, Any], spec: ModelSpec, read_picture: ReadPicture
) -> Request:
    given: dict[str, tuple[str, Any]] = {}
    for target, places in PLACES.items():
        found = [place for place in places if place in values]
        if len(found) > 1:
            raise RequestError(f"{found[0]} and {found[1]} are one picture; give one of them")
        if found:
            given[target] = found[0], values[found[0]]
    # Before a picture is opened, which takes memory and time.
    named: dict[str, Any] = dict.fromkeys(given, "given")
    pictured = replace(request, **named)
    pictured.refuse_pictures(spec, needed=False)
    try:
        pictured.refuse_pictures(spec)
    except RequestError:
        raise RequestError(
            f"input_reference is missing: {spec.name} makes a video of a picture; send one as a"
            " file of a form or a URL data:image/png;base64,..., or a last_image"
        ) from None
    opened: dict[str, Any] = {
        target: read_picture(_bytes_of(*one), one[0]) for target, one in given.items()
    }
    return replace(request, **opened)


def _bytes_of(name: str, value: Any) -> bytes | str:
    """Return a picture's bytes, of a form or a data URL, or the sha256 that names it here.

    Nothing is fetched.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        from wanflow.untrusted import parse_json

        value = parse_json(value, name)
    if isinstance(value, dict):
        known = value.get("file_id")
        if known is not None:
            if isinstance(known, str) and SHA256.fullmatch(known):
                return known
            raise RequestError(
                f"{name}: file_id must be the sha256 of a picture of an earlier job; send the"
                f" picture itself (got {shown(known)})"
            )
        value = value.get("image_url")
        value = value.get("url") if isinstance(value, dict) else value
    expected = f"{name} must be a file of the form, or a URL data:image/png;base64,..."
    if isinstance(value, list):
        raise RequestError(f"{expected} (got a list of {len(value)})")
    if not isinstance(value, str):
        raise RequestError(f"{expected} (got {shown(value)})")
    begin = DATA_URL.match(value)
    if begin is None:
        raise RequestError(f"{expected}; the server fetches no address (got {shown(value[:60])})")
    try:
        # As `base64 photo.jpg` prints it: in lines.
        return base64.b64decode("".join(value[begin.end() :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{expected}; its base64 is damaged") from None


def _document(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in fields(Request):
        value = getattr(request, one.name)
        if one.name in PICTURES and value is not None:
            value = value.sha256
        if value != one.default:
            found[one.name] = list(value) if isinstance(value, tuple) else value
    return found


def again(job: Job) -> dict[str, Any]:
    """Return the fields that a client submits to make a job again; they have its seed."""
    found = dict(job.request)
    if isinstance(found.get("size"), list):
        found["size"] = "x".join(map(str, found["size"]))
    for name in PICTURES:
        if found.get(name):
            found[name] = {"file_id": found[name]}
    return found


# The video object


@dataclass(frozen=True)
class Seen:
    """What a job's row does not say.

    place: in the queue; 1 is next. eta_s: to its end. keep_s: how long a finished job is kept.
    """

    place: int | None = None
    eta_s: float | None = None
    keep_s: float | None = None


def video(job: Job, seen: Seen) -> dict[str, Any]:
    """Return the video object: OpenAI's fields, then ours."""
    about, made = job.about, job.result
    width, height = (made.get(side, about.get(side, 0)) for side in ("width", "height"))
    frames, fps = (made.get(name, about.get(name, 0)) for name in ("frames", "fps"))
    done = job.state == "completed"
    ends = None if job.completed_at is None or not job.final else int(job.completed_at)
    file = str(made.get("file", "")) if done else ""
    return {
        "id": job.id,
        "object": "video",
        "model": str(about.get("model", "")),
        "status": job.state,
        "progress": 100 if done else min(99, max(0, int(job.progress.percent))),
        "created_at": int(job.created_at),
        "completed_at": ends,
        "expires_at": None if ends is None or seen.keep_s is None else int(ends + seen.keep_s),
        "size": f"{width}x{height}",
        "seconds": f"{frames / fps:g}" if fps else "0",
        "quality": "standard",
        "remixed_from_video_id": None,
        "prompt": str(job.request.get("prompt", "")),
        "error": job.error and {k: for_clients(str(v)) for k, v in job.error.items()},
        "width": width,
        "height": height,
        "num_frames": frames,
        "fps": fps,
        "seed": made.get("seed", job.request.get("seed")),
        "step": about.get("steps", 0) if done else job.progress.step,
        "steps": job.progress.steps or about.get("steps", 0),
        "stage": "" if done else job.progress.stage,
        "expert": "" if done else job.progress.expert,
        "queue_position": seen.place,
        "eta_seconds": None if seen.eta_s is None else max(0, round(seen.eta_s)),
        "attempts": job.attempts,
        "cancelling": job.cancel and not job.final,
        "user": about.get("user"),
        "media_type": media_type(file) if file else None,
        "file_name": file or None,
        "inference_time_s": made.get("seconds"),
        "stage_durations": dict(made.get("stages") or {}),
        "peak_memory_mb": _peak_mb(made.get("peak_memory")),
    }


def media_type(file: str) -> str:
    """Return the type of a result's file."""
    return "image/png" if file.endswith(".png") else "video/mp4"


def _peak_mb(peak: Any) -> float | None:
    """Return megabytes of the GPU, or of the RAM where no GPU works."""
    peak = peak if isinstance(peak, dict) else {}
    most = peak.get("gpu") or peak.get("ram")
    return None if most is None else round(most / 1e6, 1)
