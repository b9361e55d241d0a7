"""Record what made a video: enough to make it again, as JSON inside the file and in a saved run."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from wanflow.config import RequestError
from wanflow.request import LORAS, PICTURES, CompleteRequest
from wanflow.settings import LONGEST
from wanflow.untrusted import printable, shown

MOST = 2 * LORAS  # entries of a mapping: a LoRA may be a pair of files


@dataclass(frozen=True)
class ModelRecord:
    """The weights of a run.

    folder: where they were. fingerprint: distinguishes one set of weights from another.
    parts: {part: file} of those that were named one by one.
    """

    name: str
    folder: str
    fingerprint: str
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything needed to make a video again.

    runtime: the settings that change the result, by name; `wanflow.runtime` writes and reads them.
    versions: of the software. loras: {file: fingerprint}.
    """

    request: CompleteRequest
    model: ModelRecord
    runtime: dict[str, Any]
    versions: dict[str, str]
    noise_device: str
    cfg_batch: bool | None
    loras: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON; parts, LoRAs and pictures appear where there are some."""
        recipe = asdict(self)
        if not self.model.parts:
            del recipe["model"]["parts"]
        if not self.loras:
            del recipe["loras"]
        for name in PICTURES:
            if recipe["request"][name] is None:
                del recipe["request"][name]
        return recipe

    @classmethod
    def from_json(cls, value: object, source: object) -> Recipe:
        """Read what any version of wanflow wrote.

        Args:
            value: the parsed JSON.
            source: names the file in messages.

        Raises:
            RequestError: for a field that is missing, of another type, or out of range; but
                `runtime_of` checks the settings.
        """
        try:
            recipe = cls(**_known(cls, value, "the recipe"))
            request = _known(CompleteRequest, recipe.request, "request", strict=True)
            model = ModelRecord(**_known(ModelRecord, recipe.model, "model"))
            texts = {"model": {**asdict(model), "parts": ""}, "versions": recipe.versions}
            texts |= {"model.parts": model.parts, "loras": recipe.loras}
            for name, found in texts.items():
                _check(found, name, str)
            _check(recipe.runtime, "runtime", str | int | float | None)
            missing = sorted({"device", "dtype"} - set(recipe.runtime))
            if missing:
                raise RequestError(f"runtime.{missing[0]} is missing")
            return replace(recipe, request=CompleteRequest(**request), model=model)
        except RequestError as error:
            raise damaged(source, error) from None


def damaged(source: object, error: RequestError) -> RequestError:
    """Return the error of a recipe of which a value is refused."""
    return RequestError(
        f"{printable(source)}: the recipe is damaged, incomplete or of another version: {error}"
    )


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object (got {type(value).__name__})")
    if len(value) > MOST:
        raise RequestError(f"{name} has {len(value):,} entries, more than {MOST}")
    return value


def _known(cls: type, value: object, name: str, strict: bool = False) -> dict[str, Any]:
    """Return the fields of a dataclass that a JSON object has, which must be all without a default.

    With `strict` a field that the dataclass lacks is refused: leaving it out changes the result.
    """
    found, known = _object(value, name), {part.name: part for part in fields(cls)}
    for part in known.values():
        required = part.default is MISSING and part.default_factory is MISSING
        if required and part.name not in found:
            raise RequestError(f"{part.name} is missing")
    unknown = sorted(set(found) - set(known))
    if strict and unknown:
        raise RequestError(f"{name}.{printable(unknown[0])} is unknown")
    return {key: item for key, item in found.items() if key in known}


def _check(value: object, name: str, kind: Any) -> None:
    for key, item in _object(value, name).items():
        if not isinstance(item, kind) or max(len(str(item)), len(key)) > LONGEST:
            expected = "text" if kind is str else "text or a number"
            raise RequestError(f"{name}.{printable(key)} must be {expected} (got {shown(item)})")
