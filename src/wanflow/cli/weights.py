"""`wanflow inspect` and `wanflow convert`: what weights are, and other forms of them."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import Parser, given_parts
from wanflow.config import RequestError

if TYPE_CHECKING:
    from wanflow.checkpoint.source import Part
    from wanflow.inspect import Findings, Row

TARGETS = (
    "official",
    "diffusers",
    "bf16",
    "fp16",
    "fp8",
    *(f"gguf-{kind}" for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16", "bf16")),
)
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MANY = 8  # names listed before the rest is a number
COLUMNS = ("what", "file", "form", "stored as", "parameters", "tensors", "GB")


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """The commands and their flags."""
    look = commands.add_parser(
        "inspect",
        help="what a model, a file of weights or a LoRA is, without loading it",
        allow_abbrev=False,
    )
    look.add_argument(
        "path",
        metavar="PATH",
        help="a folder in any layout, a file, nano, or a repository's name in Hugging Face's cache",
    )
    look.add_argument("--json", action="store_true", help="everything, as one JSON document")
    look.add_argument("--hash", action="store_true", help="compute the sha256 of every file")
    look.add_argument(
        "--check",
        action="store_true",
        help="read every tensor; exit code 1 where one holds NaN or infinity",
    )

    p = commands.add_parser(
        "convert", help="weights in another layout or precision", allow_abbrev=False
    )
    p.add_argument(
        "source", metavar="SRC", help="a model in any layout, nano, or a file with one part of one"
    )
    p.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="a new folder; for a single part a file, or a folder to put it into",
    )
    p.add_argument("--to", required=True, choices=TARGETS, metavar="FORM", help=", ".join(TARGETS))
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="for all that is not quantised"
    )
    p.add_argument(
        "--parts", default="high,low,t5,vae", help="which parts of a model (high,low,t5,vae)"
    )
    p.add_argument(
        "--max_shard_size",
        default="10GB",
        metavar="SIZE",
        help="of a file, for official and diffusers (10GB)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace what stands at DST")
    for part in ("high", "low", "t5", "vae", "tokenizer"):
        p.add_argument(
            f"--{part}", type=Path, metavar="FILE", help=f"in place of the model's own {part}"
        )


def _path(text: str) -> Path:
    """The folder or file that a user means."""
    if text == "nano":
        from wanflow.assemble import NANO_FOLDER

        return NANO_FOLDER
    path = Path(text).expanduser()
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        from wanflow.download.fetch import cached

        return cached(text) or path
    return path


def inspect(args: argparse.Namespace) -> None:
    """Tell what stands at a path."""
    from wanflow.checkpoint.values import BadValuesError, Finding, check_values
    from wanflow.inspect import inspect as look

    path, values = _path(args.path), list[Finding]()
    if args.hash or args.check:
        from wanflow.screen import Screen

        with Screen() as screen:
            found = look(path, args.hash, screen.count_bytes("hashing"))
            if args.check:
                values = list(check_values(path, screen.count_bytes("checking")))
    else:
        found = look(path)
    if args.json:
        document = found.as_dict() | (
            {"values": [asdict(value) for value in values]} if args.check else {}
        )
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _show(found)
        for value in values:
            print(f"{value.path}: {value.tensor + ': ' if value.tensor else ''}{value.what}")
        if args.check and not values:
            print("every value is finite, and no tensor is constant")
    bad = [value for value in values if value.bad]
    if bad:
        raise BadValuesError(
            f"{path}: {len(bad)} tensors are damaged:"
            f" {', '.join(value.tensor or value.path for value in bad[:MANY])}"
        )


# as text


def _show(found: Findings) -> None:
    from wanflow.screen import show_table

    what = (
        found.parts[0].what
        if len({row.what for row in found.parts}) == 1
        else f"{len(found.parts)} files"
    )
    print(f"{found.path}: {found.model or what}, {LAYOUTS[found.layout]}")
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
        print(f"{size} ({exact})")
    elif counts["all"]:
        print(f"{_short(counts['all'])} parameters ({counts['all']:,})")
    print(f"{found.tensors:,} tensors, {found.bytes:,} bytes")
    print()
    show_table(COLUMNS, [_cells(row) for row in found.parts], "llllrrr")
    for row in found.parts:
        for line in _remarks(row, found.model):
            print(f"{row.path}: {line}")
    for note in found.notes:
        print(f"note: {note}")
    if found.problem:
        print(f"it does not load as a model: {found.problem}")


LAYOUTS = {
    "official": "the official layout",
    "diffusers": "Diffusers' layout",
    "files": "loose files",
    "file": "one file",
}


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
        f"{sum(file.bytes for file in row.files) / 1e9:.3f}",
    )


def _remarks(row: Row, model: str | None) -> list[str]:
    """What does not fit into a table; whose shape it is, only where that is not said of the
    whole.
    """
    told = [] if row.model is None or row.model.startswith(model or "?") else [row.model]
    if row.lora is not None:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in row.lora["kinds"].items())
        ranks, alphas = (
            ", ".join(f"{value:g}" for value in row.lora[name]) for name in ("ranks", "alphas")
        )
        told.append(
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
            told.append(f"{what}: {', '.join(names[:MANY])}{more}")
    told += row.notes
    told += [
        f"{'' if file.name == row.path else file.name + ': '}sha256 {file.sha256}"
        f" ({file.sha256_from})"
        + (f", published as {file.published_as}" if file.published_as else "")
        for file in row.files
        if file.sha256
    ]
    return told + ([row.error] if row.error else [])


# convert


def size(text: str) -> int:
    """`"10GB"`, `"512MiB"`, `"100000"` -> bytes; RequestError for anything else, and for none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS or not int(float(found[1]) * UNITS[found[2]]):
        raise RequestError(f"{text!r} is no size; write 10GB, 500MB or 5GiB")
    return int(float(found[1]) * UNITS[found[2]])


def _parts(text: str) -> tuple[Part, ...]:
    known: tuple[Part, ...] = ("high", "low", "t5", "vae")
    asked = [word.strip() for word in text.split(",")]
    odd = [word for word in asked if word not in known]
    if odd or not asked:
        raise RequestError(f"--parts {text}: {', '.join(odd)} is none of {', '.join(known)}")
    return tuple(part for part in known if part in asked)


def convert(args: argparse.Namespace) -> None:
    """Write weights in another form."""
    from wanflow.convert.convert import convert as write
    from wanflow.convert.convert import open_model
    from wanflow.convert.targets import options
    from wanflow.screen import Screen

    wanted = options(
        args.to,
        args.dtype,
        parts=_parts(args.parts),
        shard=size(args.max_shard_size),
        overwrite=args.overwrite,
    )
    model = open_model(_path(args.source), given_parts(args))
    with Screen() as screen:
        report = screen.count_bytes("converting")
        out = write(model, args.target.expanduser(), wanted, screen.say, report)
        written = out.rglob("*") if out.is_dir() else [out]
        screen.say(
            f"{out}: {sum(file.stat().st_size for file in written if file.is_file()) / 1e9:.3f} GB"
        )
