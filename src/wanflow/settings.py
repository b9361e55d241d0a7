"""Declare each setting once; checks, flags and `schema` are made from the declaration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from numbers import Number
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wanflow.config import RequestError
from wanflow.untrusted import shown

LONGEST = 4096  # characters: no system takes a longer path
NO_LIMIT = 2**31  # a limit this large is not worth a word


@dataclass(frozen=True)
class Setting:
    """A field of a settings dataclass, with all that is known of it.

    help, metavar: text for the command line and the reference page.
    group: the heading that it appears under.
    flags: its spellings on the command line, without dashes; none where it is empty.
    range: the smallest and the largest value.
    longest: characters of a text, or items of a list, at most.
    switch: the flag takes no value, and means True.
    negated: the flag is the opposite of the field.
    unset: the value of the flag that leaves the field at its default, where it is another.
    recorded: a recipe stores it, because it changes a result, if only by rounding.
    fixed: a saved run keeps its own, because another changes the result by more than rounding.
    types, choices, optional: from the annotation. optional: None leaves it open.
    """

    name: str
    default: Any
    types: tuple[type, ...]
    choices: tuple[str, ...]
    optional: bool
    help: str
    group: str = ""
    flags: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    longest: int = LONGEST
    metavar: str | None = None
    switch: bool = False
    negated: bool = False
    unset: Any = ...
    recorded: bool = False
    fixed: bool = False

    @property
    def kind(self) -> type:
        """The type that a flag's text is read as."""
        return str if str in self.types else self.types[0]

    def expected(self) -> str:
        """Return the values that are valid, in words."""
        if self.choices:
            return f"one of {', '.join(choice for choice in self.choices if choice)}"
        text = "text or two whole numbers" if tuple in self.types else "text"
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(self.kind)
        if self.range is None or kind is None:
            return kind or ("a list of texts" if self.kind is tuple else text)
        low, high = self.range
        if high < NO_LIMIT:
            return f"{kind} from {low:,} to {high:,}"
        return f"{kind}, {low:,} or more" if low > -NO_LIMIT else kind

    def plain(self, value: Any) -> Any:
        """Return numbers of numpy, names of torch, paths and single items of a list as our own."""
        if isinstance(value, str | os.PathLike) and self.types == (tuple,):
            value = (value,)
        if isinstance(value, list | tuple):
            return tuple(os.fspath(x) if isinstance(x, os.PathLike) else x for x in value)
        if isinstance(value, os.PathLike) and self.metavar in ("DIR", "FILE"):
            return os.fspath(value)
        if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
            return str(value).removeprefix("torch.")
        return value.item() if isinstance(value, Number) and hasattr(value, "item") else value

    def check(self, value: Any) -> None:
        """Raise RequestError for a value that is invalid."""
        accepted = {float: float | int, tuple: tuple | list}
        valid = isinstance(value, tuple(accepted.get(kind, kind) for kind in self.types))
        valid = valid and (bool in self.types or not isinstance(value, bool))
        if valid and isinstance(value, str | tuple | list) and len(value) > self.longest:
            what = "characters" if isinstance(value, str) else "items"
            raise RequestError(
                f"{self.name} must have at most {self.longest:,} {what} (got {len(value):,})"
            )
        if valid and self.types == (tuple,):
            valid = all(isinstance(text, str) and len(text) <= LONGEST for text in value)
        if valid and self.choices:
            valid = value in self.choices
        if valid and self.range is not None:
            # Also false for NaN.
            valid = self.range[0] <= value <= min(self.range[1], 2**63 - 1)
        if not valid:
            most = " below 2**63" if isinstance(value, int) and value >= 2**63 else ""
            raise RequestError(f"{self.name} must be {self.expected()}{most} (got {shown(value)})")


def setting(
    default: Any = MISSING, *, help: str, flag: str | tuple[str, ...] | None = None, **known: Any
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: its default; without one the field is required.
        help: what it does, in one sentence without a period.
        flag: its spellings on the command line: the field's name if None, no flag if ().
        **known: further attributes of `Setting`.
    """
    return field(default=default, metadata={"help": help, "flag": flag, **known})


@cache
def settings_of(cls: type) -> Mapping[str, Setting]:
    """Return the settings of a dataclass by field name, in their order."""
    hints = get_type_hints(cls)
    return {one.name: _setting(one, hints[one.name]) for one in fields(cls) if one.metadata}


def _setting(one: Field[Any], hint: Any) -> Setting:
    members = [hint] if get_origin(hint) in (None, Literal, tuple) else get_args(hint)
    types: list[type] = []
    choices: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            choices += get_args(member)
        elif member is not type(None):
            types.append(get_origin(member) or member)
    known = dict(one.metadata)
    flag = known.pop("flag")
    if flag is None:
        flags: tuple[str, ...] = (one.name,)
    else:
        flags = (flag,) if isinstance(flag, str) else flag
    return Setting(
        name=one.name,
        default=one.default,
        types=tuple(types) or (str,),
        choices=tuple(choices),
        optional=type(None) in members,
        flags=flags,
        **known,
    )


def adopt(cls: type, values: Any) -> None:
    """Replace what stands for a value of a settings dataclass by the value; see `Setting.plain`."""
    for one in settings_of(cls).values():
        object.__setattr__(values, one.name, one.plain(getattr(values, one.name)))


def check(cls: type, values: Any, complete: bool = False) -> None:
    """Check every value of an object against the settings of a dataclass.

    Args:
        cls: the dataclass that declares them.
        values: an object with the same field names.
        complete: whether a None is invalid, but for fields whose default it is.

    Raises:
        RequestError: naming the field, what it may be, and its value.
    """
    for one in settings_of(cls).values():
        value = getattr(values, one.name, MISSING)
        open_ = not complete or getattr(type(values), one.name, MISSING) is None
        if value is not MISSING and not (value is None and one.optional and open_):
            one.check(value)
