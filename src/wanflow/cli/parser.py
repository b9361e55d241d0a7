"""Parse a command line: flags made from settings, help on 80 columns, suggestions for typos."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from wanflow.config import RequestError
from wanflow.presets import FAMILY
from wanflow.settings import NO_LIMIT, Setting, settings_of
from wanflow.untrusted import printable, user_path

WIDTH = 80
LONGEST_WORD = 80  # characters of a word of the command line that a message shows
# How argparse names an invalid value, and how we do: expected, then got.
EXPECTED = {
    r": must be ": " must be ",
    r": invalid int value: (.+)": r" must be a whole number (got \1)",
    r": invalid float value: (.+)": r" must be a number (got \1)",
    r": invalid choice: (.+) \(choose from (.+)\)": r" must be one of \2 (got \1)",
    r"^ambiguous option: (\S+) could match (.+)": r"\1 may mean \2; write one of them",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's layout on `WIDTH` columns, with the defaults at the end of each help text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, [], argparse.SUPPRESS) or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"


class HelpAll(argparse._HelpAction):
    """`--help-all`: every flag with its text."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        parser._print_message(parser.format_all(), sys.stdout)
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A command's flags. What it refuses is a RequestError: of several ranks one prints it.

    Args:
        example: a command line, shown below the description.
        brief: whether `--help` explains the first group only, and names the other flags.
        allow_abbrev: whether the beginning of one flag's name stands for it.
    """

    def __init__(
        self, *, example: str = "", brief: bool = False, allow_abbrev: bool = False, **known: Any
    ) -> None:
        super().__init__(allow_abbrev=allow_abbrev, formatter_class=HelpFormatter, **known)
        self.example, self.brief = example, brief
        if brief:
            self.add_argument("--help-all", action=HelpAll, help="explain every flag")

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown is not None:
            word = (unknown[1].split() or [""])[0]
            known = self._option_string_actions if word.startswith("-") else ()
            message = f"unknown argument {short(word)}{did_you_mean(word, known)}"
        message = re.sub(r"^argument ([^\s/]+)\S*: ", r"\1: ", message)
        for pattern, words in EXPECTED.items():
            message = re.sub(pattern, words, message, count=1, flags=re.DOTALL)
        message = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda found: short(found[0]), message)
        help_flag = "--help-all" if self.brief else "--help"
        raise RequestError(f"{message} ({self.prog} {help_flag} lists the flags)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"must be one of {', '.join(names)} (got {short(repr(value))})"
                f"{did_you_mean(str(value), names)}",
            )

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs is None and action.option_strings and arg_strings == ["--"]:
            value = self._get_value(action, "--")  # of `--flag=--`, which argparse drops
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def given(self, args: list[str]) -> dict[str, Any]:
        """Return what the words themselves set, by destination, without any default."""
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            return vars(self.parse_known_args(args)[0])
        finally:
            for action, default in defaults.items():
                action.default = default

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag is refused by the parser of its command."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            below = commands[0].choices[found.command] if commands else self
            below.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def format_help(self) -> str:
        """Return the help; if brief, the flags after the first group by name only."""
        if not self.brief:
            return self.format_all()
        first, *others = self.flag_groups()
        formatter = self._begin()
        self._explain(formatter, [first])
        lines = []
        for group in others:
            names = " ".join(flag.option_strings[0] for flag in shown_actions(group))
            title = f"{group.title}: "
            lines += textwrap.wrap(title + names, WIDTH - 2, subsequent_indent="    ")
        more = textwrap.indent("\n".join(lines), "  ")
        return f"{formatter.format_help()}\n{self.prog} --help-all explains these:\n{more}\n"

    def format_all(self) -> str:
        """Return every flag explained."""
        formatter = self._begin()
        self._explain(formatter, self.flag_groups())
        return formatter.format_help()

    def _begin(self) -> argparse.HelpFormatter:
        formatter = self._get_formatter()
        if self.brief:
            formatter.add_usage(f"{self.prog} [FLAGS]", [], [], None)
        else:
            formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(textwrap.fill(self.description or "", WIDTH))
        if self.example:
            formatter.add_text(f"example:\n  {self.example}")
        return formatter

    def _explain(
        self, formatter: argparse.HelpFormatter, groups: Iterable[argparse._ArgumentGroup]
    ) -> None:
        for group in groups:
            formatter.start_section(group.title)
            if group.description:
                formatter.add_text(textwrap.fill(group.description, WIDTH - 2))
            formatter.add_arguments(group._group_actions)
            formatter.end_section()

    def flag_groups(self) -> list[argparse._ArgumentGroup]:
        """Return the groups that hold something; a command's own come before argparse's two."""
        positionals, options, *own = self._action_groups
        return [group for group in (positionals, *own, options) if shown_actions(group)]


def shown_actions(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """Return the flags of a group that help and the reference page show."""
    return [action for action in group._group_actions if action.help != argparse.SUPPRESS]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a misspelt word; empty where nothing is near.

    Hyphens for underscores, capitals and a prefix of two dashes are no difference.
    """
    spellings = {_spelt(name): name for name in known}
    spelt = _spelt(word[:LONGEST_WORD].partition("=")[0])
    near = [spelt] if spelt in spellings else difflib.get_close_matches(spelt, spellings, 1)
    if not near and word.startswith("-"):  # the beginning, or a part, of one flag's name
        near = [name for name in spellings if len(spelt) > 2 and name.startswith(spelt)]
        near = near if len(near) == 1 else []
    return f"; did you mean {spellings[near[0]]}?" if near else ""


def _spelt(word: str) -> str:
    return word.lower().lstrip("-").replace("-", "_")


def short(word: str) -> str:
    """Return a word of the command line as a message shows it."""
    return printable(word, LONGEST_WORD)


# Readers of values


def number(
    kind: type[int] | type[float], low: float = -math.inf, high: float = math.inf
) -> Callable[[str], Any]:
    """Return a reader of numbers from `low` to `high`, both included; NaN is never one.

    Args:
        kind: int or float.
        low: the smallest.
        high: the largest.
    """
    one = "whole number" if kind is int else "number"

    def read(text: str) -> Any:
        try:
            value = kind(text) if len(text) <= LONGEST_WORD else None
        except ValueError:
            value = None
        if value is None or (kind is float and not math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a {one} (got {short(repr(text))})")
        if not low <= value <= high:
            bounds = f"from {low:,} to {high:,}" if high < NO_LIMIT else f"of at least {low:,}"
            raise argparse.ArgumentTypeError(f"must be a {one} {bounds} (got {short(text)})")
        return value

    read.__name__ = kind.__name__
    return read


# Flags from settings


def file_path(text: str) -> Path:
    """Read a path that may begin with `~`."""
    try:
        return user_path(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def utf8(text: str) -> str:
    """Read a text as the UTF-8 that it is; Python reads ASCII only in a locale without UTF-8."""
    with suppress(UnicodeEncodeError):  # half a letter of Windows
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return text


def yes_or_no(text: str) -> bool:
    """Read true or false, in any of their spellings."""
    if text.lower() in ("true", "yes", "1", "y", "t"):
        return True
    if text.lower() in ("false", "no", "0", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false (got {short(repr(text))})")


def flag_default(one: Setting) -> Any:
    """Return what a flag holds that is left out."""
    if one.switch:
        return False
    if one.unset is not ...:
        return one.unset
    return None if one.default is MISSING else one.default


def add_settings(
    cls: type, groups: Mapping[str, argparse._ArgumentGroup], fixed: bool = True
) -> None:
    """Add a flag for every setting of a dataclass, each to its group.

    Without `fixed` those are left out that a recipe decides.
    """
    for one in settings_of(cls).values():
        if not one.flags or (one.fixed and not fixed):
            continue
        options: dict[str, Any] = {"help": _help(one)}
        if one.switch:
            options["action"] = "store_true"
        else:
            # A text, and not the name of a file, which the system reads in the locale.
            spoken = utf8 if one.metavar == "TEXT" else None
            readers: dict[type, Any] = {str: spoken, tuple: None, bool: yes_or_no}
            if one.kind in (int, float):
                readers[one.kind] = number(one.kind, *(one.range or ()))
            options |= {"type": readers[one.kind], "default": flag_default(one)}
            options["metavar"] = one.metavar
            if one.choices:
                options["choices"] = tuple(choice for choice in one.choices if choice)
            if one.kind is tuple:
                options |= {"action": "extend", "nargs": "+"}
        groups[one.group].add_argument(*(f"--{flag}" for flag in one.flags), **options)


def _help(one: Setting) -> str:
    """Return a setting's help, with the published models' defaults where those are short."""
    models: dict[str, list[str]] = {}
    for spec in FAMILY if one.default is None else ():
        default = getattr(spec, one.name, None)
        text = "*".join(map(str, default)) if isinstance(default, tuple) else str(default or "")
        if 0 < len(text) <= 10:
            models.setdefault(text, []).append(spec.name.removeprefix("Wan2.2-"))
    if not models:
        return one.help
    named = [f"{text} for {' and '.join(names)}" for text, names in models.items()]
    return f"{one.help} (default: {', '.join(named if len(models) > 1 else models)})"


def settings_from(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a dataclass that flags set, by field name."""
    values: dict[str, Any] = {}
    for one in settings_of(cls).values():
        value: Any = getattr(args, one.flags[0], flag_default(one)) if one.flags else None
        if one.flags and value != flag_default(one):
            values[one.name] = tuple(value) if one.kind is tuple else value
            if one.negated:
                values[one.name] = not value
    return values


def words_of(cls: type, values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that set these settings: `settings_from` reads them."""
    words: list[str] = []
    for name, value in values.items():
        one = settings_of(cls)[name]
        if value is None or not one.flags or (one.switch and not value):
            continue
        flag, text = f"--{one.flags[-1]}", str(not value if one.negated else value)
        if one.kind is tuple:
            words += [flag, *map(str, value)]
        elif one.switch:
            words.append(flag)
        else:
            text = "*".join(map(str, value)) if isinstance(value, tuple) else text
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words
