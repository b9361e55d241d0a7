"""`wanflow download`: the weights, resumable and verified."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.parser import Parser
from wanflow.download.catalogue import ROLES, VARIANTS, Variant, find, whole_repository

if TYPE_CHECKING:
    from wanflow.download.fetch import Survey
    from wanflow.download.hubs import Hub


def download_flags(p: Parser) -> None:
    """Add the command's flags."""
    what = p.add_argument_group("what")
    what.add_argument("--variant", default="official", metavar="NAME", help=", ".join(VARIANTS))
    what.add_argument("--repo", metavar="OWNER/NAME", help="all files of another repository")
    what.add_argument("--only", nargs="+", choices=ROLES, default=[], help="some parts of it")
    what.add_argument("--revision", metavar="NAME", help="a branch, tag or commit")
    what.add_argument("--list", action="store_true", help="list the variants and their sizes")
    where = p.add_argument_group("where to, where from")
    where.add_argument(
        "--local_dir", type=Path, metavar="DIR", help="the folder (default: ./T2V_A14B_weights)"
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
        return _show()
    from wanflow.download import fetch, hubs
    from wanflow.screen import Screen

    variant = whole_repository(args.repo) if args.repo else find(args.variant)
    folder = args.local_dir or Path(variant.name if args.repo else variant.folder)
    store: Hub
    if args.source == "modelscope":
        store = hubs.ModelScope(args.endpoint, args.token, args.revision)
    else:
        endpoint = args.endpoint or os.environ.get("HF_ENDPOINT") or hubs.HUGGINGFACE
        store = hubs.HuggingFace(
            endpoint.rstrip("/"), args.token or os.environ.get("HF_TOKEN"), args.revision
        )
    with Screen() as screen:
        found = fetch.download(
            variant,
            folder,
            store,
            only=args.only,
            workers=args.workers,
            verify=args.verify,
            dry_run=args.dry_run,
            say=screen.say,
            report=partial(screen.progress, unit="bytes"),
        )
    _tell(found, variant, args, screen.say)


def _tell(
    found: Survey, variant: Variant, args: argparse.Namespace, say: Callable[[str], None]
) -> None:
    """The last words: what would be fetched, or what is there now."""
    if args.dry_run:
        for file in found.files:
            have = (
                "here"
                if file.name in found.good
                else "here, not verified"
                if file.name in found.unsure
                else "to fetch"
            )
            say(f"{file.size / 1e9:10.3f} GB  {have:<18}  {file.name}")
        say(
            f"{found.needed / 1e9:.1f} GB to fetch into {found.folder}, of {found.total / 1e9:.1f}"
            f" GB in {len(found.files)} files"
        )
        return
    fetched = f"{len(found.missing)} fetched" if found.missing else "nothing had to be fetched"
    say(
        f"{found.folder}: {len(found.files)} files, {found.total / 1e9:.1f} GB, every byte"
        f" verified; {fetched}"
    )
    if variant.name == "official" and not args.only:
        say(f'next: wanflow generate --ckpt_dir {shlex.quote(str(found.folder))} --prompt "..."')


def _show() -> None:
    """Print the variants as a table on standard output."""
    from wanflow.screen import show_table

    rows = []
    for variant in VARIANTS.values():
        repos = ", ".join(dict.fromkeys(part.repo for part in variant.parts))
        sizes = f"{variant.bytes / 1e9:.1f}", f"{variant.bytes / 2**30:.1f}"
        rows.append((variant.name, *sizes, f"{variant.about}; {repos}"))
    show_table(("variant", "GB", "GiB", "content and source"), rows, "lrrl")
