"""Run `wanflow inspect`: show what a model, a weights file or a LoRA holds, without loading it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import model_path
from wanflow.cli.made import is_made, show_made
from wanflow.cli.parser import Parser
from wanflow.config import RequestError
from wanflow.screen import show_lines, show_table
from wanflow.units import file_size

if TYPE_CHECKING:
    from wanflow.checkpoint.values import Finding
    from wanflow.inspect import Findings, Row
    from wanflow.screen import Screen

MANY = 8  # names listed before the rest is a number
COLUMNS = ("what", "file", "form", "stored as", "parameters", "tensors", "size")
LAYOUTS = {
    "official": "the official layout",
    "diffusers": "Diffusers' layout",
    "files": "loose files",
    "file": "one file",
}


def inspect_flags(p: Parser) -> None:
    """Add the command's flags."""
    p.add_argument(
        "path",
        metavar="PATH",
        help="a folder in any layout, a file, nano, a repository in Hugging Face's cache, a video,"
        " a picture or a saved run",
    )
    p.add_argument("--hash", action="store_true", help="compute the sha256 of every file")
    p.add_argument(
        "--check",
        action="store_true",
        help="read every tensor; exit code 1 if one holds NaN or infinity",
    )
    p.add_argument(
        "--words", action="store_true", help="list the words that a prompt for nano is made of"
    )


def inspect(args: argparse.Namespace) -> None:
    """Print what a path holds, or how it was made.

    Raises:
        BadValuesError: after `--check`, if values are damaged.
    """
    from wanflow.checkpoint.values import BadValuesError, Finding, check_values
    from wanflow.inspect import inspect as look

    path, values = model_path(args.path), list[Finding]()
    if args.words:
        return _show_words(args, path)
    if is_made(path):
        return show_made(args, path)
    with args.output.screen() as screen:
        found = look(path, on_file=partial(_count_files, screen))
        if args.hash:
            found = look(path, True, _whole(screen.count_bytes("hashing"), found.bytes))
        if args.check:
            total = sum(row.bytes for row in found.parts)
            values = list(check_values(path, _whole(screen.count_bytes("checking"), total)))
    args.output.document |= asdict(found)
    if args.check:
        args.output.document["values"] = [asdict(value) for value in values]
    if not args.json:
        _show(found)
        _show_values(values, args.check)
    bad = [value for value in values if value.bad]
    if bad:
        raise BadValuesError(
            f"{path}: {len(bad)} tensors are damaged:"
            f" {', '.join(value.tensor or value.path for value in bad[:MANY])}"
        )


def _show_words(args: argparse.Namespace, path: Path) -> None:
    """Print the prompt box of a model that knows few words.

    Raises:
        RequestError: for a model that takes any prompt.
    """
    from wanflow.checkpoint.checkpoint import open_checkpoint
    from wanflow.nano_words import EXAMPLE, GRAMMAR, box_lines, knows_this_world, prompt_box

    checkpoint = open_checkpoint(path)
    known = checkpoint.vocabulary
    if not knows_this_world(known):
        raise RequestError(
            f"{path} has no list of words: {checkpoint.spec.name} takes any prompt (try: wanflow"
            " inspect nano --words)"
        )
    facts = {"grammar": GRAMMAR, "example": EXAMPLE, "words": prompt_box(known)}
    args.output.page((("", line) for line in box_lines(args.path, known)), **facts)


# progress


def _count_files(screen: Screen, done: int, total: int) -> None:
    if total > MANY:  # a few headers take milliseconds
        screen.progress("reading headers", done, total, "file")


def _whole(report: Callable[[int, int], None], total: int) -> Callable[[int, int], None]:
    """Return a callback for one file after the other, which reports their sum."""
    before = 0

    def on_part(done: int, size: int) -> None:
        nonlocal before
        report(min(before + done, total), total)
        if done >= size:
            before += size

    return on_part


# as text


def _show_values(values: list[Finding], checked: bool) -> None:
    lines = [
        f"{value.path}: {value.tensor + ': ' if value.tensor else ''}{value.what}"
        for value in values
    ]
    if checked and not values:
        lines = ["every value is finite, and no tensor is constant"]
    show_lines(("", line) for line in lines)


def _show(found: Findings) -> None:
    what = (
        found.parts[0].what
        if len({row.what for row in found.parts}) == 1
        else f"{len(found.parts)} files"
    )
    lines = [f"{found.path}: {found.model or what}, {LAYOUTS[found.layout]}"]
    counts = found.parameters
    if counts["experts_total"] > counts["experts_active"]:
        size = (
            counts["published"]
            or f"{_short(counts['experts_total'])} total, {_short(counts['experts_active'])} active"
        )
        exact = (
            f"experts {counts['experts_total']:,}, of which {counts['experts_active']:,} are active"
            " in a step;"
        )
        exact += f" {counts['all']:,} with all parts"
        lines.append(f"{size} ({exact})")
    elif counts["published"]:
        exact = f"transformer {counts['experts_total']:,}; {counts['all']:,} with all parts"
        lines.append(f"{counts['published']} ({exact})")
    elif counts["all"]:
        lines.append(f"{_short(counts['all'])} parameters ({counts['all']:,})")
    lines.append(f"{found.tensors:,} tensors, {file_size(found.bytes)} ({found.bytes:,} bytes)")
    show_lines(("", line) for line in (*lines, ""))
    show_table(COLUMNS, [_cells(row) for row in found.parts], "llllrrr")
    lines = [f"{row.path}: {line}" for row in found.parts for line in _remarks(row, found.model)]
    lines += [f"note: {note}" for note in found.notes]
    if found.problem:
        lines.append(f"it does not load as a model: {found.problem}")
    show_lines(("", line) for line in lines)


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _cells(row: Row) -> tuple[str, ...]:
    form = row.container or ""
    if row.dialect:
        form += f", {row.dialect} names" + (f" after {row.prefix!r}" if row.prefix else "")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in row.dtypes.items())
    numbers = (f"{row.parameters:,}", f"{row.tensors:,}") if row.tensors else ("", "")
    return (
        row.what,
        row.path,
        form,
        kinds,
        *numbers,
        file_size(sum(file.bytes for file in row.files)),
    )


def _remarks(row: Row, model: str | None) -> list[str]:
    """Return what does not fit into a table; the model's shape only where it differs."""
    remarks = [] if row.model is None or row.model.startswith(model or "?") else [row.model]
    if row.lora is not None:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in row.lora["kinds"].items())
        ranks, alphas = (
            ", ".join(f"{value:g}" for value in row.lora[name]) for name in ("ranks", "alphas")
        )
        remarks.append(
            f"rank {ranks or 'none'}, alpha {alphas or 'not given (the rank)'},"
            f" {row.lora['modules']:,} modules ({kinds})"
        )
    for what, names in (
        ("lacks", row.missing),
        ("unknown", row.unexpected),
        ("of another shape", row.wrong_shape),
    ):
        if names:
            more = f" and {len(names) - MANY:,} more" if len(names) > MANY else ""
            remarks.append(f"{what}: {', '.join(names[:MANY])}{more}")
    remarks += row.notes
    remarks += [
        f"{'' if file.name == row.path else file.name + ': '}sha256 {file.sha256}"
        f" ({file.sha256_from})"
        + (f", published as {file.published_as}" if file.published_as else "")
        for file in row.files
        if file.sha256
    ]
    return remarks + ([row.error] if row.error else [])
