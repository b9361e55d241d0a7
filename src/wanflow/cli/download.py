"""Run `wanflow download`: fetch the weights, resumable and verified."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.checkpoint.published import CATALOGUE, ROLES, VARIANTS, find, whole_repository
from wanflow.cli.parser import Parser, file_path
from wanflow.presets import I2V_A14B, T2V_A14B
from wanflow.units import file_size

if TYPE_CHECKING:
    from wanflow.checkpoint.published import Variant
    from wanflow.cli.output import Output
    from wanflow.download.fetch import Survey
    from wanflow.download.hubs import Hub


def download_flags(p: Parser) -> None:
    """Add the command's flags."""
    what = p.add_argument_group("what")
    what.add_argument(
        "--task",
        choices=CATALOGUE,
        default=T2V_A14B.task,
        help=f"the model (default: {T2V_A14B.task})",
    )
    what.add_argument("--variant", default="official", metavar="NAME", help=", ".join(VARIANTS))
    what.add_argument("--repo", metavar="OWNER/NAME", help="all files of another repository")
    what.add_argument(
        "--only",
        nargs="+",
        choices=ROLES,
        default=[],
        metavar="PART",
        help=f"some of {', '.join(ROLES)}",
    )
    what.add_argument("--revision", metavar="NAME", help="a branch, tag or commit")
    what.add_argument("--list", action="store_true", help="list the variants and their sizes")
    where = p.add_argument_group("where to, where from")
    where.add_argument(
        "--local_dir",
        type=file_path,
        metavar="DIR",
        help="the folder (default: by the model, as in ./T2V_A14B_weights)",
    )
    where.add_argument(
        "--source",
        choices=("huggingface", "modelscope"),
        default="huggingface",
        help="the hub to fetch from",
    )
    where.add_argument(
        "--endpoint",
        metavar="URL",
        help="a mirror (default: HF_ENDPOINT, else https://huggingface.co)",
    )
    where.add_argument(
        "--token",
        help="an access token (default: HF_TOKEN, else the token of `hf auth login`, which a"
        " mirror does not get)",
    )
    how = p.add_argument_group("how")
    how.add_argument("--workers", type=int, default=4, metavar="N", help="parallel downloads")
    how.add_argument(
        "--verify",
        action="store_true",
        help="hash every file again, and fetch damaged ones; offline it only reports them",
    )
    how.add_argument(
        "--dry_run",
        action="store_true",
        help="list what would be fetched; with --verify, also what is damaged",
    )


def download(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.list:
        return _show_variants(args.output, args.task)
    from wanflow.download import fetch
    from wanflow.download.hubs import OfflineError

    variant = whole_repository(args.repo) if args.repo else find(args.variant, args.task)
    folder = args.local_dir or Path(variant.name if args.repo else variant.folder)
    output = args.output
    with output.screen() as screen:
        try:
            survey = fetch.download(
                variant,
                folder,
                _hub(args),
                only=args.only,
                workers=args.workers,
                verify=args.verify,
                dry_run=args.dry_run,
                say=screen.say,
                report=partial(screen.progress, unit="bytes"),
            )
        except OfflineError as error:
            if not args.dry_run or args.repo:
                raise
            screen.say(f"{error}; these are the published sizes")
            output.document["bytes"] = sum(part.bytes for part in variant.select(args.only))
            return output.page(("", line) for line in _published(variant, args.only))
    output.document |= {
        "path": str(survey.folder),
        "bytes": survey.total,
        "bytes_to_fetch": survey.needed,
        "files": [{"name": file.name, "bytes": file.size} for file in survey.files],
        "missing": [file.name for file in survey.missing],
    }
    if args.dry_run:
        return output.page(("", line) for line in _plan(survey))
    screen.say(*_summary(survey, output.took()))
    output.path = survey.folder
    if variant.name == "official" and not args.only:
        place = shlex.quote(str(survey.folder))
        picture = " --image photo.jpg" if variant.task == I2V_A14B.task else ""
        screen.say(f'next: wanflow generate --ckpt_dir {place}{picture} --prompt "..."')


def _hub(args: argparse.Namespace) -> Hub:
    from wanflow.download import hubs

    if args.source == "modelscope":
        return hubs.ModelScope(args.endpoint, args.token, args.revision)
    endpoint = args.endpoint or os.environ.get("HF_ENDPOINT") or hubs.HUGGINGFACE
    token = args.token or os.environ.get("HF_TOKEN")
    return hubs.HuggingFace(endpoint.rstrip("/"), token, args.revision)


def _plan(survey: Survey) -> Iterator[str]:
    """Yield what a download would fetch, as a table."""
    from wanflow.screen import table_lines

    states = dict.fromkeys(survey.verified, "here")
    states |= dict.fromkeys(survey.unverified, "here, not verified")
    rows = [
        (file_size(file.size), states.get(file.name, "to fetch"), file.name)
        for file in survey.files
    ]
    yield from table_lines(("size", "state", "file"), rows, "rll")
    yield (
        f"{file_size(survey.needed)} to fetch into {survey.folder}, of {file_size(survey.total)}"
        f" in {len(survey.files)} files"
    )


def _published(variant: Variant, only: list[str]) -> Iterator[str]:
    """Yield the parts of a variant by the catalogue, as a table."""
    from wanflow.screen import table_lines

    parts = variant.select(only)
    rows = [
        (file_size(part.bytes) if part.bytes else "?", part.role, " ".join(part.patterns))
        for part in parts
    ]
    yield from table_lines(("size", "part", "files"), rows, "rll")
    total = sum(part.bytes for part in parts)
    yield f"{file_size(total)} in all; what is here already is not subtracted"


def _summary(survey: Survey, took: str) -> Iterator[str]:
    fetched = f"{len(survey.missing)} fetched" if survey.missing else "nothing had to be fetched"
    yield (
        f"{survey.folder}: {len(survey.files)} files, {file_size(survey.total)}, every byte"
        f" verified; {fetched}, in {took}"
    )


def _show_variants(output: Output, task: str) -> None:
    """Print the variants of a model as a table on standard output."""
    from wanflow.screen import show_table

    rows, variants = [], CATALOGUE[task].values()
    output.document["variants"] = [
        {"name": one.name, "bytes": one.bytes, "about": one.about} for one in variants
    ]
    for variant in variants:
        repos = ", ".join(dict.fromkeys(part.repo for part in variant.parts))
        rows.append((variant.name, file_size(variant.bytes), f"{variant.about}; {repos}"))
    if not output.json:
        show_table(("variant", "size", "content and source"), rows, "lrl")
