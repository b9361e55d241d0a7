"""Return settings as a JSON schema, for forms and for programs that check a request."""

from __future__ import annotations

import math
from dataclasses import MISSING
from typing import Any

from wanflow.settings import settings_of

WORDS = {int: "integer", float: "number", bool: "boolean", str: "string", tuple: "array"}


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON schema of a settings dataclass."""
    properties: dict[str, Any] = {}
    for one in settings_of(cls).values():
        types = [WORDS[kind] for kind in one.types if kind in WORDS]
        types += ["null"] if one.optional else []
        schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
        schema["description"] = one.help
        if one.choices:
            schema["enum"] = [*one.choices, *([None] if one.optional else [])]
        if one.range is not None:
            low, high = one.range
            schema |= {"minimum": low} | ({} if high == math.inf else {"maximum": high})
        if tuple in one.types:
            schema["items"] = {"type": "string" if str not in one.types else "integer"}
        if one.default is not MISSING:
            schema["default"] = one.default
        properties[one.name] = schema
    return {
        "title": cls.__name__,
        "type": "object",
        "properties": properties,
        "required": [name for name, schema in properties.items() if "default" not in schema],
        "additionalProperties": False,
    }
