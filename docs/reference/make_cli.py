"""Print docs/reference/cli.md: every command, flag and setting, from their declarations.

python docs/reference/make_cli.py > docs/reference/cli.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from wanflow.cli import COMMANDS, command_parser
from wanflow.cli.parser import Parser, shown_actions
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.schema import json_schema
from wanflow.settings import settings_of

HEAD = """# Commands, flags and settings

This page is generated: `make reference` writes it from the declarations in the source.
Exit codes of every command: 0 done, 1 failed, 2 bad request or refused, 130 interrupted."""


def page() -> str:
    """Return the page, in Markdown."""
    lines = [HEAD]
    for name in COMMANDS:
        lines += ["", *_command(name, command_parser(name))]
    lines += ["", "## Settings from Python", "", SETTINGS]
    for cls in (Request, Runtime):
        lines += ["", f"### {cls.__name__}", "", *_fields(cls)]
    return "\n".join(lines) + "\n"


SETTINGS = (
    "`wanflow.load` takes the fields of Runtime as keywords, `generate` those of Request."
    " `wanflow.schema.json_schema(Request)` returns the same as a JSON schema."
    "\n\nA side has at most 16384 pixels and a video at most 4093 frames: 1024 tokens along each"
    " axis, as many as Wan2.2's rotary table has positions. Steps end at 1000, the timesteps of"
    " training."
)


def _command(name: str, parser: Parser) -> Iterator[str]:
    yield f"## wanflow {name}"
    yield ""
    yield parser.description or ""
    yield ""
    yield f"```\n{parser.example}\n```"
    for group in parser.flag_groups():
        yield ""
        yield f"### {name}: {group.title}"
        yield ""
        if group.description:
            yield f"{group.description}\n"
        yield from _table(
            ("flag", "values", "default", "meaning"),
            [_flag(action) for action in shown_actions(group)],
        )


def _flag(action: argparse.Action) -> tuple[str, str, str, str]:
    spellings = ", ".join(f"`{flag}`" for flag in action.option_strings)
    if action.nargs == 0:
        values = ""
    elif action.choices is not None:
        values = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        values = f"{action.metavar or action.dest.upper()}{' ...' if action.nargs == '+' else ''}"
    meaning, _, default = (action.help or "").partition(" (default: ")
    default = default.removesuffix(")")
    if action.default not in (None, False, [], argparse.SUPPRESS) and not default:
        default = f"{action.default}"
    return spellings or f"`{action.metavar}`", values, default, meaning


def _fields(cls: type) -> Iterator[str]:
    schema = json_schema(cls)["properties"]
    rows: list[tuple[str, ...]] = []
    for one in settings_of(cls).values():
        default = schema[one.name].get("default", "required")
        default = "" if default in (None, "") else f"{default}"
        flag = f"`--{one.flags[0]}`" if one.flags else ""
        meaning = one.help.partition(" (default: ")[0]
        rows.append((f"`{one.name}`", one.expected(), default, flag, meaning))
    return _table(("field", "values", "default", "flag", "meaning"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    print(page(), end="")
