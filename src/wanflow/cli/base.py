"""Read what flags override: WANFLOW_CKPT_DIR, then a config file, then a recipe."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli.flags import CKPT_DIR, LIST, PARTS, given_parts
from wanflow.cli.parser import Parser, did_you_mean, flag_default, yes_or_no
from wanflow.cli.trust import is_embedded, with_trusted_paths, with_trusted_pictures
from wanflow.config import RequestError
from wanflow.presets import SETTINGS
from wanflow.request import Request
from wanflow.runtime import Runtime, runtime_of
from wanflow.settings import Setting, settings_of
from wanflow.untrusted import check_regular, printable, read_bytes, read_json, user_path

if TYPE_CHECKING:
    from wanflow.recipe import Recipe

Parsers = Mapping[str, Callable[[], Parser]]
CONFIG_BYTES = 1 << 16
DIGITS = 30  # of a number in a config file
# They belong on a command line.
ALONE = ("help", "help-all", "config", "recipe", "resume", "trust_paths", *LIST, "out_dir")
CHOSEN_HERE = ("device", "attention")  # of a recipe: another machine may lack its own
LAYOUT = ("cfg_parallel", "ring_size", "ulysses_size")
# A flag that decides what others decide too: where it is given, their base does not count.
DECIDES = {
    "sample_guide_scale": ("cfg_high", "cfg_low"),
    "parallel": LAYOUT,
    **dict.fromkeys(LAYOUT, ("parallel",)),
    "gpus": ("device",),
    "device": ("gpus",),
    "seeds": ("base_seed",),
}


def fill_in(args: argparse.Namespace, parser: Parser, words: list[str], parsers: Parsers) -> None:
    """Set what the words of a command line leave open.

    Args:
        args: the parsed words, which are changed.
        parser: of the command.
        words: of the command line, after the command.
        parsers: of every command, by name.

    Raises:
        RequestError: for a config file or a recipe that cannot be read or holds something invalid.
    """
    given = parser.given(words)
    decided = {other for flag in given for other in DECIDES.get(flag, ())} | set(given)
    if given.get("preset"):
        decided |= set(SETTINGS[given["preset"]])
    for name, _ in given.get("grid", ()):
        one = settings_of(Request).get(name)
        decided |= {one.flags[0]} if one is not None else {name, *DECIDES[name]}
    base: dict[str, Any] = {}
    if getattr(args, "config", None) is not None:
        base = read_config(user_path(args.config), parsers, args.command)
    recipe = getattr(args, "recipe", None)
    if recipe is not None and args.resume is not None:
        raise RequestError("--recipe begins a run and --resume continues one: leave one out")
    resumed = getattr(args, "resume", None) is not None
    if recipe is not None or resumed:
        for name in _of_a_video(resumed):
            base.pop(name, None)
    if resumed:  # its weights are those of the saved run
        for name in ("ckpt_dir", *PARTS):
            base.pop(name, None)
    elif args.command in (
        "generate",
        "plan",
        "train",
        "bench",
        "worker",
        "gang",
    ) and os.environ.get(CKPT_DIR):
        base.setdefault("ckpt_dir", os.environ[CKPT_DIR])
    if recipe is not None:
        args.base = read_recipe(user_path(recipe))
        args.lora_dir = args.lora_dir or base.get("lora_dir")
        own = "ckpt_dir" in given or "ckpt_dir" in base or bool(given_parts(args))
        args.base = with_trusted_paths(args, args.base, recipe, not own, "lora" not in decided)
        if args.command == "generate":  # `plan` needs no pixels
            args.base = with_trusted_pictures(args, args.base, user_path(recipe))
        base |= _settings(args.base)
        if {"image", "last_image", "size"} & decided:
            base.pop("exact_size")  # another picture has the area of that size
    for name, value in base.items():
        if name not in decided:
            setattr(args, name, value)
    if recipe is not None and "ckpt_dir" not in given:
        _name_weights(args, args.base)


def _of_a_video(resumed: bool) -> Iterable[str]:
    """Return the flags whose values a recipe has; a saved run takes other places for its work."""
    yield from ("preset", "sample_guide_scale")
    for cls in (Request, Runtime):
        for flag, one in _recorded(cls).items():
            if cls is Request or one.fixed or not resumed:
                yield flag


def _recorded(cls: type) -> dict[str, Setting]:
    """Return the settings of a class that a recipe has and a flag sets, by their flag."""
    return {
        one.flags[0]: one
        for one in settings_of(cls).values()
        if one.flags
        and (cls is Request or one.recorded or one.name in ("cfg_batch", "noise_device"))
        and one.name not in CHOSEN_HERE
    }


# A config file


def read_config(path: Path, parsers: Parsers, command: str) -> dict[str, Any]:
    """Return the values of a TOML file for a command, by the destination of their flags.

    A key outside tables holds for every command that has the flag; a table `[generate]` holds for
    that command, and comes first.

    Raises:
        RequestError: naming the file and the key, for anything that the command does not take.
    """
    parser = parsers[command]()
    try:
        table = tomllib.loads(read_bytes(path, CONFIG_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        reason = printable(str(error) or "nested too deeply")
        raise RequestError(f"{printable(path)}: not a TOML file ({reason})") from None
    own: Mapping[str, Any] = {}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(value, dict):
            elsewhere = (name for name in parsers if _action(parsers[name](), key) is not None)
            if _action(parser, key) is not None or next(elsewhere, None) is None:
                values |= _value(path, parser, key, value)
        elif key not in parsers:
            raise RequestError(
                f"{printable(path)}: [{printable(key)}] is no command"
                f"{did_you_mean(key, parsers)} (wanflow --help lists them)"
            )
        elif key == command:
            own = value
    for key, value in own.items():
        values |= _value(path, parser, key, value)
    return values


def _action(parser: Parser, key: str) -> argparse.Action | None:
    """Return the flag of a key, which is the flag's name or that of its field."""
    fields = {one.name: one.flags[0] for one in settings_of(Runtime).values() if one.negated}
    found = parser._option_string_actions.get(f"--{fields.get(key, key)}")
    return None if key in ALONE else found


def _value(path: Path, parser: Parser, key: str, value: Any) -> dict[str, Any]:
    """Return a key's destination and value, read as the flag reads its text."""
    action, place = _action(parser, key), f"{printable(path)}: {printable(key)}"
    if key in ALONE:
        raise RequestError(f"{place} belongs on the command line, as --{key}")
    if action is None:
        known = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
        raise RequestError(
            f"{place} is unknown to wanflow {parser.prog.rpartition(' ')[2]}"
            f"{did_you_mean(key, known)} ({parser.prog} --help-all lists the flags)"
        )
    if action.nargs == 0 or action.type is yes_or_no:
        if not isinstance(value, bool):
            raise RequestError(f"{place} must be true or false (got {_shown(value)})")
        negated = f"--{key}" not in action.option_strings  # named by its field
        return {action.dest: value != negated}
    texts = value if isinstance(value, list) and action.nargs == "+" else [value]
    found = [_read(place, parser, action, text) for text in texts]
    return {action.dest: found if action.nargs == "+" else found[0]}


def _read(place: str, parser: Parser, action: argparse.Action, value: Any) -> Any:
    numeric = getattr(action.type, "__name__", "") in ("int", "float")
    kinds: tuple[type, ...] = (int, float) if numeric else (str,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "a number" if numeric else "text in quotes"
        raise RequestError(f"{place} must be {expected} (got {_shown(value)})")
    if (isinstance(value, int) and abs(value) >= 10**DIGITS) or "\0" in str(value):
        raise RequestError(f"{place}: not a usable value")
    try:
        found = parser._get_value(action, str(value))
        parser._check_value(action, found)
    except argparse.ArgumentError as error:
        raise RequestError(f"{place} {error.message}") from None
    return found


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**DIGITS:
        return "a number of many digits"
    return printable(repr(value), 80)


# A recipe


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a JSON file, a video, a picture or a saved run.

    Raises:
        RequestError: if there is none, or it is damaged.
    """
    from wanflow.recipe import Recipe

    check_regular(path)
    if path.name.endswith(".safetensors"):
        from wanflow.pipeline import Run

        return Run.header(path)[0]
    if path.suffix.lower() == ".json":
        value = read_json(path)
        # The document of `--json` holds the recipe among other things.
        inner = value.get("recipe") if isinstance(value, dict) else None
        return Recipe.from_json(value if inner is None else inner, printable(path))
    from wanflow.clipfiles import read_recipe as of_clip

    return Recipe.from_json(of_clip(path), printable(path))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says, by the destination of the flags that say the same."""
    values: dict[str, Any] = {}
    for cls, made in ((Request, recipe.request), (Runtime, runtime_of(recipe))):
        for flag, one in _recorded(cls).items():
            value = getattr(made, one.name)
            if one.name == "size":
                value = "*".join(map(str, value))
            if value is None or (value == one.default and one.unset is not ...):
                value = flag_default(one)
            values[flag] = list(value) or None if one.kind is tuple else value
    return values


def _name_weights(args: argparse.Namespace, recipe: Recipe) -> None:
    """Take the weights of a recipe, unless flags, or WANFLOW_CKPT_DIR or a config, name others."""
    model = recipe.model
    if given_parts(args):
        return
    if is_embedded(model):
        args.ckpt_dir = model.name
    elif args.ckpt_dir is None:
        args.ckpt_dir = model.folder
        for part, file in model.parts.items():
            setattr(args, part, Path(file))
