"""List the fields of a submission: ours, and those that clients of other servers send.

`FIELDS` is the one home of names: parsing, messages and the OpenAPI document are made from it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from wanflow.config import RequestError
from wanflow.presets import SETTINGS
from wanflow.request import Request
from wanflow.settings import Setting, settings_of
from wanflow.untrusted import parse_json, printable, shown
from wanflow.wording import in_fields

Kind = Literal["text", "int", "float", "bool", "picture", "lora", "object", "any"]
NUMBER = 40  # characters of a number in a form
USER = 512  # characters
SCHEMAS: dict[Kind, dict[str, Any]] = {
    "text": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {"type": "object"},
    "any": {},
}


@dataclass(frozen=True)
class Field:
    """A field. `target`: of `wanflow.Request`, where one is meant; it has its checks, too."""

    name: str
    kind: Kind
    help: str
    target: str | None = None
    choices: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """Return its JSON schema."""
        known: dict[str, Any] = {"description": self.help}
        bounds = settings_of(Request)[self.target].range if self.target else None
        if bounds is not None:
            known |= {"minimum": bounds[0], "maximum": bounds[1]}
        if self.choices:
            known["enum"] = list(self.choices)
        return {**SCHEMAS[self.kind], **known}

    def read(self, value: Any, in_form: bool) -> Any:
        """Return a valid value.

        Raises:
            RequestError: naming the field.
        """
        value = _of_form(self.kind, value, self.name) if in_form else value
        if self.kind == "int" and isinstance(value, float) and value.is_integer():
            value = int(value)
        kinds: dict[str, Any] = {"text": str, "int": int, "bool": bool, "object": dict}
        kinds["float"] = int | float
        if self.kind in kinds:
            right = isinstance(value, kinds[self.kind])
            if isinstance(value, bool) and self.kind != "bool":
                right = False
            if not right or (self.choices and value not in self.choices):
                raise RequestError(f"{self.name} must be {self._expected()} (got {shown(value)})")
        if self.target is not None and self.kind in ("text", "int", "float", "bool"):
            self.setting.check(value)
        return value

    @property
    def setting(self) -> Setting:
        """What `wanflow.Request` declares of it, under the name that the client used."""
        assert self.target is not None
        return replace(settings_of(Request)[self.target], name=self.name)

    def _expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.target is not None:
            return self.setting.expected()
        words = {
            "text": "text",
            "int": "a whole number",
            "float": "a number",
            "object": "an object",
        }
        return words.get(self.kind, "true or false")


def _of_form(kind: Kind, value: Any, name: str) -> Any:
    """Return what the text of a form says; a text that says nothing of its kind stays a text."""
    if kind == "lora" and isinstance(value, dict):
        return {
            key: one if key == "name" else _of_form("float", one, name)
            for key, one in value.items()
        }
    if not isinstance(value, str) or kind in ("text", "picture"):
        return value
    word = value.strip()
    if kind in ("int", "float") and len(word) <= NUMBER:
        if re.fullmatch(r"[+-]?\d+", word):
            return int(word)
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", word, re.IGNORECASE):
            found = float(word)
            return value if math.isinf(found) else found
    if word.lower() in ("true", "false") and kind in ("bool", "any"):
        return word.lower() == "true"
    if word[:1] in ("{", "[") and kind in ("object", "lora", "any"):
        return parse_json(word, name)
    return value


def _known(*fields: Field) -> dict[str, Field]:
    return {one.name: one for one in fields}


def _same(target: str, *names: str) -> tuple[Field, ...]:
    """Return the fields of these names that set one field of `Request`."""
    one = settings_of(Request)[target]
    kinds: dict[type, Kind] = {int: "int", float: "float", bool: "bool"}
    kind = kinds.get(one.kind, "text")
    return tuple(Field(name, kind, one.help, target, one.choices) for name in names)


FIELDS: Mapping[str, Field] = _known(
    *_same("prompt", "prompt"),
    Field("model", "text", "the model's name, as GET /v1/models says"),
    Field("seconds", "any", "length, as text or a number; becomes the nearest 4n+1 frames"),
    Field("size", "text", "WIDTHxHEIGHT or WIDTH*HEIGHT"),
    Field("width", "int", "in pixels; with height, in place of size"),
    Field("height", "int", "in pixels; with width, in place of size"),
    Field("input_reference", "picture", "the picture that the video begins with"),
    Field("image_reference", "picture", "the same"),
    Field("image", "picture", "the same"),
    Field("last_image", "picture", "the picture that the video ends with"),
    *_same("frame_num", "num_frames", "frame_num"),
    *_same("fps", "fps"),
    *_same("negative_prompt", "negative_prompt"),
    *_same("sample_steps", "num_inference_steps", "sample_steps"),
    *_same("sample_shift", "flow_shift", "sample_shift"),
    *_same("sample_solver", "sample_solver"),
    Field(
        "guidance_scale",
        "float",
        "guidance of the high-noise expert; of both, without guidance_scale_2",
        "cfg_high",
    ),
    Field("guidance_scale_2", "float", "guidance of the low-noise expert", "cfg_low"),
    *_same("cfg_high", "cfg_high"),
    *_same("cfg_low", "cfg_low"),
    *_same("cfg_start", "cfg_start"),
    *_same("cfg_start_steps", "cfg_start_steps"),
    *_same("lora_from", "lora_from"),
    *_same("boundary", "boundary_ratio", "boundary"),
    *_same("seed", "seed", "base_seed"),
    *_same("exact_size", "exact_size"),
    Field("preset", "text", "a step preset", choices=tuple(SETTINGS)),
    Field("lora", "lora", "LoRAs of the server by name: NAME, NAME@0.8, {name, scale}, or a list"),
    Field("n", "int", "videos; 1"),
    Field("num_outputs_per_prompt", "int", "the same"),
    Field("user", "text", "the client's own mark, given back"),
)

# What clients of other servers wrap fields in; their content counts as fields.
WRAPPERS = ("extra_body", "extra_json", "extra_params", "nvext", "video_params", "diffusers_kwargs")

# Fields of vLLM-Omni, SGLang, FastVideo and Dynamo that name what wanflow does not do. Each is
# accepted where it asks for nothing: null, or one of these values.
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "aspect_ratio": ("auto",),
    "attention_backend_override": (),
    "audio_reference": (),
    "cache_dit_params": (),
    "cfg_gate_step": (),
    "enable_frame_interpolation": (False,),
    "enable_teacache": (False,),
    "enable_upscaling": (False,),
    "enhance_prompt": (False,),
    "frame_interpolation_exp": (1,),
    "frame_interpolation_model_path": (),
    "frame_interpolation_scale": (1,),
    "generate_sound": (False,),
    "generator_device": ("cpu",),
    "output_compression": (),
    "output_path": (),
    "output_quality": ("default",),
    "preencode_mp4": (False,),
    "quality": ("auto", "standard", "default"),
    "reference_url": (),
    "response_format": (),
    "return_stage_metrics": (False, True),  # every video has them
    "rollout": (False,),
    "rollout_sde_type": ("sde",),
    "short_edge": (),
    "skip_softmax_params": (),
    "sound_duration": (),
    "true_cfg_scale": (1,),
    "upscaling_model_path": (),
    "upscaling_scale": (1,),
    "video_reference": (),
    "video_url": (),
    "x264_preset": (),
}


def unwrapped(given: Mapping[str, Any], in_form: bool) -> dict[str, Any]:
    """Return the fields, with the content of wrappers among them.

    Raises:
        RequestError: for a wrapper that is no object, and a field that is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in WRAPPERS:
            inner = {name: value}
        elif value is None:
            continue
        else:
            inner = Field(name, "object", "").read(value, in_form)
            inner = unwrapped(inner, in_form)
        for key, one in inner.items():
            if key in found and found[key] != one:
                raise RequestError(
                    f"{printable(key)} is given twice, with two values; give it once"
                )
            found[key] = one
    return found


def fields_of(given: Mapping[str, Any], in_form: bool) -> dict[str, Any]:
    """Return the valid fields of a submission that ask for something.

    Raises:
        RequestError: for an unknown field, one that wanflow cannot do, and a value of a wrong kind.
    """
    found: dict[str, Any] = {}
    unknown = []
    for name, value in unwrapped(given, in_form).items():
        if value is None:
            continue
        _refuse_odd_text(name, value)
        if name in NOTHING:
            asked = _of_form("float", _of_form("any", value, name), name) if in_form else value
            if not any(_equal(asked, one) for one in NOTHING[name]):
                only = " or ".join(map(json.dumps, (None, *NOTHING[name])))
                raise RequestError(
                    f"{name} {shown(value)}: wanflow does not do this; leave it out (or {only})"
                )
        elif name not in FIELDS:
            unknown.append(printable(name, 60))
        else:
            found[name] = FIELDS[name].read(value, in_form)
    if unknown:
        raise RequestError(
            f"unknown fields: {', '.join(unknown[:8])}; known are {', '.join(FIELDS)}"
        )
    return found


def _equal(asked: Any, one: Any) -> bool:
    """Return whether two values of JSON are equal: 1.0 and 1 are, true and 1 are not."""
    return bool(asked == one) and isinstance(asked, bool) is isinstance(one, bool)


def _refuse_odd_text(name: str, value: Any) -> None:
    """Raise RequestError for text that is no text: a null character, half a surrogate pair."""
    if isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_odd_text(name, one)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise RequestError(
            f"{printable(name)} holds a null character or half a letter (a lone surrogate); send"
            " valid Unicode"
        )


# Words


# What a message may name, where a field without a target of that name asked for it.
ASKED_BY: Mapping[str, tuple[str, ...]] = {
    "width": ("size",),
    "height": ("size",),
    "size": ("width",),
    "frame_num": ("seconds",),
    "cfg_low": ("guidance_scale",),
    "image": ("input_reference", "image_reference"),
}


QUOTED = re.compile(r"""("[^"]*"|(?<!\w)'[^']*')""")  # a value, which may look like a flag
COMMAND = re.compile(r"(\bwanflow [a-z]+) --[^`;,)]*")


def for_clients(text: str) -> str:
    """Return a message without flags: in names, which are of fields or of the server's settings."""
    parts = QUOTED.split(text)
    flags = re.findall(r"--(\w+)", " ".join(parts[::2]))
    theirs = list(dict.fromkeys(one for one in flags if one not in FIELDS))
    parts[::2] = [COMMAND.sub(r"\1", in_fields(one)) for one in parts[::2]]
    if theirs:
        parts.append(
            f" (of the server's settings: {', '.join(theirs)}; its operator can change them, and"
            " its log has the flags)"
        )
    return "".join(parts)


def as_sent(message: str, given: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return a message in the names of the fields that a client sent, and the field that it is of.

    Args:
        message: of the checks of a submission, which begins with a name, as those of all requests.
        given: the submission.
    """
    try:
        sent = unwrapped(given, in_form=True)
    except RequestError:
        sent = dict(given)
    text = " ".join(message.split())
    first = re.match(r"\w*", text)
    named = first[0] if first else ""
    if named == "unknown":
        unknown = (name for name in sent if name not in FIELDS and name not in NOTHING)
        return text, printable(next(unknown, ""), 60) or None
    if named in NOTHING or named in WRAPPERS:
        return text, named
    text = for_clients(text)
    text = re.sub(r"^\w+|\w+_\w+", lambda found: _sent_as(found[0], sent), text)
    named = _sent_as(named, sent)
    if named not in FIELDS:
        return text, None
    if named not in sent:
        target = FIELDS[named].target or named
        asked = [one for one in ASKED_BY.get(target, ()) if one in sent]
        if asked:
            return f"{asked[0]} {shown(sent[asked[0]])}: {text}", asked[0]
    return text, named


def _sent_as(name: str, sent: Mapping[str, Any]) -> str:
    """Return the name under which a client sent what a message calls `name`."""
    if name in sent:
        return name
    target = FIELDS[name].target or name if name in FIELDS else name
    names = [one for one in sent if one in FIELDS and FIELDS[one].target == target]
    if target == "image":
        names = [one for one in ASKED_BY[target] if one in sent]
    return names[0] if names else name
