"""Run `wanflow convert`: write weights in another layout or precision."""

from __future__ import annotations

import argparse
import re

from wanflow.checkpoint.parts import WEIGHTS, Part
from wanflow.cli.flags import given_parts, model_path, part_flags
from wanflow.cli.parser import Parser, file_path
from wanflow.config import RequestError
from wanflow.convert.formats import TARGETS
from wanflow.runtime import DTYPES
from wanflow.untrusted import printable

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
LARGEST = 1e15  # bytes


def convert_flags(p: Parser) -> None:
    """Add the command's flags."""
    p.add_argument(
        "source", metavar="SRC", help="a model in any layout, nano, or a file of one part"
    )
    p.add_argument(
        "target", metavar="DST", type=file_path, help="a new folder; for a single part also a file"
    )
    p.add_argument("--to", required=True, choices=TARGETS, metavar="FORM", help=", ".join(TARGETS))
    p.add_argument("--dtype", choices=DTYPES, help="of what is not quantised")
    p.add_argument("--parts", default=",".join(WEIGHTS), metavar="LIST", help="parts to convert")
    p.add_argument(
        "--max_shard_size",
        default="10GB",
        metavar="SIZE",
        help="of each file, for official and diffusers",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing DST")
    part_flags(p.add_argument_group("single files", "In place of the model's own."))


def size(text: str) -> int:
    """Read `10GB`, `512MiB` or `100000` as bytes; raise RequestError unless it is 1 to 1 PB."""
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)\s*([a-z]*)", text.strip().lower())
    count = float(found[1]) * UNITS.get(found[2], 0) if found else 0
    if not 1 <= count <= LARGEST:
        raise RequestError(
            f"--max_shard_size must be a size up to 1000000GB, such as 10GB, 500MB or 5GiB (got"
            f" {printable(text, 40)})"
        )
    return int(count)


def _parts(text: str) -> tuple[Part, ...]:
    requested = [word.strip() for word in text.split(",")]
    unknown = [word for word in requested if word not in WEIGHTS]
    if unknown or not requested:
        raise RequestError(f"--parts {text}: {', '.join(unknown)} is none of {', '.join(WEIGHTS)}")
    return tuple(part for part in WEIGHTS if part in requested)


def convert(args: argparse.Namespace) -> None:
    """Write the weights in another form."""
    from wanflow.convert.convert import convert as write
    from wanflow.convert.convert import open_model
    from wanflow.convert.formats import options

    target = options(
        args.to,
        args.dtype,
        parts=_parts(args.parts),
        shard=size(args.max_shard_size),
        overwrite=args.overwrite,
    )
    model = open_model(model_path(args.source), given_parts(args))
    with args.output.screen() as screen:
        report = screen.count_bytes("converting")
        out = write(model, args.target, target, screen.say, report)
        args.output.result(out, screen, to=args.to)
