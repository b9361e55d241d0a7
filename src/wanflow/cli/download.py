"""`wanflow download`: the weights, resumable and verified."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import Parser
from wanflow.download.catalogue import ROLES, VARIANTS, Variant, find, whole_repository

if TYPE_CHECKING:
    from wanflow.download.fetch import Survey
    from wanflow.download.hubs import Hub


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command and its flags."""
    p = commands.add_parser(
        "download",
        help="get the weights: resumable, in parallel, every byte verified",
        allow_abbrev=False,
    )
    what = p.add_argument_group("what")
    what.add_argument(
        "--variant", default="official", metavar="NAME", help=f"{', '.join(VARIANTS)} (official)"
    )
    what.add_argument("--repo", metavar="OWNER/NAME", help="everything in some other repository")
    what.add_argument("--only", nargs="+", choices=ROLES, default=[], help="some parts of it")
    what.add_argument("--revision", help="a branch, tag or commit of the repository")
    what.add_argument(
        "--list", action="store_true", help="show the variants and their sizes, and fetch nothing"
    )
    where = p.add_argument_group("where to, where from")
    where.add_argument("--local_dir", type=Path, help="the folder (./T2V_A14B_weights)")
    where.add_argument("--source", choices=("huggingface", "modelscope"), default="huggingface")
    where.add_argument(
        "--endpoint", help="a mirror's address (HF_ENDPOINT, else https://huggingface.co)"
    )
    where.add_argument(
        "--token",
        help=(
            "an access token (HF_TOKEN, else what `hf auth login` stored; a mirror gets only the"
            " first two)"
        ),
    )
    how = p.add_argument_group("how")
    how.add_argument("--workers", type=int, default=4, help="files at the same time (4)")
    how.add_argument(
        "--verify",
        action="store_true",
        help="hash every file again, and fetch what is damaged; works offline, then only tells",
    )
    how.add_argument(
        "--dry_run",
        action="store_true",
        help="say what would be fetched; with --verify, hash and name what is damaged",
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
