"""Read what several videos are to show: a file of prompts, seeds, and a grid over settings."""

from __future__ import annotations

import argparse
import csv
import io
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any

from wanflow.cli.parser import did_you_mean, number, settings_from, short, yes_or_no
from wanflow.config import RequestError
from wanflow.request import VIDEOS, Request
from wanflow.settings import Setting, check, settings_of
from wanflow.untrusted import parse_json, printable, read_bytes, shown, user_path

CELLS = 400  # pictures of one contact sheet
BYTES = 64 << 20  # of a file of prompts
WRONG = 50  # wrong lines that a message names
# An option within a line; its value may stand in quotes.
OPTION = re.compile(
    r"(?:^|\s)--([A-Za-z][\w-]*)(?:[\s=]+(\"[^\"]*\"|'[^']*'|.*?))?(?=\s+--[A-Za-z]|\s*$)"
)
BOTH = "sample_guide_scale"  # cfg_high and cfg_low in one
# musubi-tuner's names of options.
SHORT = {"f": "frame_num", "s": "sample_steps", "d": "seed", "g": BOTH, "l": BOTH}
SHORT |= {"n": "negative_prompt", "fs": "sample_shift", "i": "image"}
SIDES = ("w", "h")
TWICE = "stands there twice; leave one out"
IN_LINES = ("prompt", "lora")  # texts with commas, which a grid would split


@dataclass(frozen=True)
class Wanted:
    """A video that is asked for.

    request: a seed below 0 is drawn later. where: its line, in words. line: which line of the
    command it belongs to. cell: its place in the grid.
    """

    request: Request
    where: str = ""
    line: int = 0
    cell: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Line:
    """A line of a file: the fields that it sets, or what is wrong with it."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    wrong: RequestError | None = None


def wanted(
    args: argparse.Namespace,
    base: Request,
    check_more: Callable[[Request], object] = lambda request: None,
) -> list[Wanted]:
    """Return every video that a command line asks for, in order.

    Args:
        args: of `wanflow generate`.
        base: what its flags say of every video.
        check_more: raises RequestError for a request that is refused before weights are read.

    Raises:
        RequestError: naming all lines that are wrong.
    """
    axes = _axes(args)
    found, wrong = list[Wanted](), list[str]()
    for index, line in enumerate(_lines(args)):
        where = f"{line.where}: " if line.where else ""
        try:
            for one in _expanded(args, base, line, axes):
                check(Request, one.request)
                check_more(one.request)
                found.append(replace(one, line=index))
                if len(found) > VIDEOS:
                    raise RequestError(f"more than {VIDEOS:,} videos; make them in several lists")
        except RequestError as error:
            wrong.append(f"{where}{error}")
        if len(found) > VIDEOS:
            break
    if wrong:
        more = [f"and {len(wrong) - WRONG:,} more"] if len(wrong) > WRONG else []
        raise RequestError(*wrong[:WRONG], *more)
    return found


def _expanded(
    args: argparse.Namespace, base: Request, line: _Line, axes: dict[str, list[Any]]
) -> Iterator[Wanted]:
    """Yield the videos of a line: each seed, and for each the whole grid."""
    if line.wrong is not None:
        raise line.wrong
    values, twice = line.values, [name for name in axes if set(_fields(name)) & set(line.values)]
    if twice:
        raise RequestError(f"{twice[0]} is set here and by --grid; leave one out")
    asked = replace(base, **values)
    check(Request, asked)
    if not asked.prompt.strip():
        raise RequestError("there is no prompt; say what the video shows")
    if "seed" in values and args.seeds is not None:
        raise RequestError("seed is set here and by --seeds; leave one out")
    begin = asked.seed if type(asked.seed) is int and asked.seed >= 0 else None
    for seed in args.seeds or _drawn(begin, args.num_videos or 1):
        for cell in product(*axes.values()):
            settings = dict(zip(axes, cell, strict=True))
            fields = {one: value for name, value in settings.items() for one in _fields(name)}
            yield Wanted(replace(asked, **{"seed": seed, **fields}), line.where, cell=settings)


def _drawn(begin: int | None, count: int) -> list[int]:
    return [-1] * count if begin is None else list(range(begin, begin + count))


# Files


def _lines(args: argparse.Namespace) -> list[_Line]:
    if args.prompt_file is None:
        return [_Line("")]
    path = user_path(args.prompt_file)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv}
    try:
        text = read_bytes(path, BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{printable(path)}: byte {error.start:,} is no UTF-8; save the file as UTF-8"
        ) from None
    read = readers.get(path.suffix.lower(), _txt)
    found = list(islice(read(printable(path), text), VIDEOS + 1))
    if len(found) > VIDEOS:
        raise RequestError(
            f"{printable(path)} holds more than {VIDEOS:,} prompts; make several files of it"
        )
    if not found:
        raise RequestError(f"{printable(path)} holds no prompt; write one on each line")
    return found


def _read(where: str, read: Callable[[], dict[str, Any]]) -> _Line:
    try:
        return _Line(where, read())
    except RequestError as error:
        return _Line(where, wrong=error)


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that hold something, with their numbers."""
    for row, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            yield row, line.strip()


def _txt(name: str, text: str) -> Iterator[_Line]:
    """Read a prompt from each line, with options behind it; `#` begins a comment."""
    for row, line in _rows(text):
        if not line.startswith("#"):
            yield _read(f"{name}:{row}", partial(_inline, line))


def _inline(line: str) -> dict[str, Any]:
    options = list(OPTION.finditer(line))
    prompt = line[: options[0].start()].strip() if options else line
    texts = {found[1]: found[2] or "" for found in options}
    if len(texts) < len(options):
        raise RequestError(f"an option {TWICE}")
    for name, value in texts.items():
        if name != "lora":  # a list, of which each item may stand in quotes
            texts[name] = _unquoted(value)
    if prompt and "prompt" in texts:
        raise RequestError(f"prompt {TWICE}")
    return ({"prompt": prompt} if prompt else {}) | _values(texts, "--")


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _jsonl(name: str, text: str) -> Iterator[_Line]:
    """Read the fields of a request from an object on each line."""
    for row, line in _rows(text):
        yield _read(f"{name}:{row}", partial(_object, line))


def _object(line: str) -> dict[str, Any]:
    try:
        found = parse_json(line, "the line")
    except RequestError as error:
        raise RequestError(f"not a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"expected a JSON object (got {shown(found)})")
    values = _sides({key: found.pop(key) for key in SIDES if found.get(key) is not None}, "")
    for key, value in found.items():
        name = _known(key)
        if value is not None:
            _set(values, name, tuple(value) if isinstance(value, list) else value)
    return values


def _csv(name: str, text: str) -> Iterator[_Line]:
    """Read the fields of a request from columns; the first line names them."""
    first = text.partition("\n")[0]
    apart = max(",;\t", key=first.count)  # where a comma is a decimal point, Excel writes `;`
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=apart, strict=True)
    try:
        head = [column.strip() for column in next(rows, [])]
        for column in filter(None, head):
            try:
                _known(column)
            except RequestError as error:
                raise RequestError(f"the first line names the columns: {error}") from None
        for row in rows:
            if any(cell.strip() for cell in row):
                yield _read(f"{name}:{rows.line_num}", partial(_row, head, row))
    except (RequestError, csv.Error) as error:
        yield _Line(f"{name}:{max(1, rows.line_num)}", wrong=RequestError(str(error)))


def _row(head: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) > len(head):
        raise RequestError(
            f"{len(row)} cells, and the first line names {len(head)}; put a text with commas in"
            " quotes"
        )
    texts: dict[str, str] = {}
    for name, cell in zip(head, row, strict=False):
        if not cell.strip():
            continue
        if not name or name in texts:
            raise RequestError(
                f"{name or short(cell)} {TWICE if name else 'is in no named column'}"
            )
        texts[name] = cell.strip()
    return _values(texts, "")


# Names and values


@cache
def _settings() -> dict[str, Setting]:
    """Return the settings of a request by every name that they have."""
    return {name: one for one in settings_of(Request).values() for name in (*one.flags, one.name)}


def _known(name: str) -> str:
    """Return a field's name, or that of both guidances, for any of its spellings.

    Raises:
        RequestError: for an unknown one.
    """
    name = name.replace("-", "_")
    if name in SIDES or SHORT.get(name, name) == BOTH:
        return SHORT.get(name, name)
    known, full = _settings(), SHORT.get(name, name)
    if full not in known:
        near = did_you_mean(name, [*known, BOTH])
        raise RequestError(f"unknown setting {short(name)}{near or f'; known are {_names()}'}")
    return known[full].name


def _names() -> str:
    return ", ".join(one.flags[-1] for one in settings_of(Request).values() if one.flags)


def _fields(name: str) -> tuple[str, ...]:
    return ("cfg_high", "cfg_low") if name == BOTH else (name,)


def _values(texts: dict[str, str], dashes: str) -> dict[str, Any]:
    """Return the fields that names and texts set."""
    sides = {name: texts.pop(name) for name in SIDES if name in texts}
    called = f"{dashes}w and {dashes}h"
    values = _sides({name: _number(int, text, called) for name, text in sides.items()}, dashes)
    for spelt, text in texts.items():
        name = _known(spelt)
        _set(values, name, _value(name, text, f"{dashes}{spelt}"))
    return values


def _sides(sides: dict[str, Any], dashes: str) -> dict[str, Any]:
    """Return the size that a width and a height name; nothing where neither is given."""
    if len(sides) == 1:
        raise RequestError(f"{dashes}w and {dashes}h name a size together")
    return {"size": tuple(sides[name] for name in SIDES)} if sides else {}


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    """Set the fields of a name; refuse what another spelling of it has set already."""
    for one in _fields(name):
        if one in values:
            raise RequestError(f"{one} {TWICE}")
        values[one] = value


def _value(name: str, text: str, spelt: str) -> Any:
    """Return the value of a field that a text names."""
    one = settings_of(Request)[_fields(name)[0]]
    if one.kind in (int, float):
        return _number(one.kind, text, spelt, *(one.range or ()))
    if one.kind is tuple:
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise RequestError(f"{spelt} {short(text)}: {error}") from None
    if one.kind is bool:
        return _reading(yes_or_no, text or "true", spelt)
    if not text and name != "negative_prompt":
        raise RequestError(f"{spelt} needs a value: {one.expected()}")
    if one.choices and text not in one.choices:
        raise RequestError(f"{spelt} must be {one.expected()} (got {short(repr(text))})")
    return text


def _number(kind: Any, text: str, spelt: str, *limits: float) -> Any:
    return _reading(number(kind, *limits), text, spelt)


def _reading(reader: Callable[[str], Any], text: str, spelt: str) -> Any:
    try:
        return reader(text)
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"{spelt} {error}") from None


# Flags


def seeds(text: str) -> list[int]:
    """Read seeds: `1,2,3`, `1-4`, or both."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < 2**63:
            raise argparse.ArgumentTypeError(
                f"must be numbers and ranges such as 1,2,3 or 1-4 (got {short(repr(text))})"
            )
        if last - first >= VIDEOS:
            raise argparse.ArgumentTypeError(
                f"must be at most {VIDEOS:,} seeds (got {short(repr(text))})"
            )
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must name each seed once (got {short(repr(text))})")
    return found


def axis(text: str) -> tuple[str, list[Any]]:
    """Read an axis of a grid: `cfg_high=3,4,5`."""
    name, equals, values = text.partition("=")
    try:
        known = _known(name.strip().lstrip("-"))
        if known in SIDES or known in IN_LINES:
            raise RequestError(f"{known} is no axis of a grid; write lines into a --prompt_file")
        if not equals:
            raise RequestError(f"{known} has no values; write {known}=1,2")
        found = [_value(known, value.strip(), known) for value in values.split(",")]
        if len(set(found)) < len(found):
            raise RequestError(f"{known} has a value twice (got {short(repr(values))})")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return known, found


def _axes(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the grid; refuse flags that decide the same twice."""
    axes: dict[str, list[Any]] = {}
    given = set(settings_from(Request, args))
    given |= {"cfg_high", "cfg_low"} if args.sample_guide_scale is not None else set()
    given |= {"seed"} if args.seeds or args.num_videos else set()
    taken = set[str]()
    for name, values in args.grid or ():
        if set(_fields(name)) & taken:
            raise RequestError(f"--grid names {name} twice; give it all its values at once")
        if set(_fields(name)) & given:
            raise RequestError(f"{name} is set by --grid and by another flag; leave one out")
        taken |= set(_fields(name))
        axes[name] = values
    cells = 1
    for values in (*axes.values(), args.seeds or range(args.num_videos or 1)):
        cells *= len(values)
    if axes and cells > CELLS:
        raise RequestError(
            f"--grid asks for {cells:,} videos a prompt; at most {CELLS} fit a sheet"
        )
    if args.seeds and (args.num_videos or "seed" in given & set(settings_from(Request, args))):
        raise RequestError("--seeds names every seed: leave out --num_videos and --base_seed")
    return axes


def name_of_list(args: argparse.Namespace) -> str:
    """Return what a folder without a name is called after: the file, or the prompt."""
    from wanflow.outputs import slug

    return Path(args.prompt_file).stem if args.prompt_file else slug(args.prompt)
