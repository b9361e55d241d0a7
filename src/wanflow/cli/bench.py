"""Run `wanflow bench`: measure a run, or check everything that a GPU must answer first."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.parser import Parser, file_path
from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.screen import print_line
from wanflow.units import duration
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from wanflow.bench.check import Part, Result
    from wanflow.cli.output import Output

PAGE, DOCUMENT = "findings.md", "check.json"


class WrongError(OSError):
    """A check found something wrong: exit code 1."""


def bench_flags(p: Parser) -> None:
    """Add the command's flags."""
    check = p.add_argument_group(
        "check", "Every part runs in a process of its own; all take eight minutes at most."
    )
    check.add_argument(
        "--check", action="store_true", help="answer what a GPU must answer first, part by part"
    )
    check.add_argument(
        "--parts", nargs="+", default=[], metavar="PART", help="these parts only, as in: block vae"
    )
    result = p.add_argument_group("result")
    result.add_argument(
        "--out", type=file_path, metavar="FOLDER", help="folder to make, for all that was measured"
    )
    p.add_argument_group("device").add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1"
    )


def bench(args: argparse.Namespace) -> None:
    """Measure, or check.

    Raises:
        WrongError: after a check that found something wrong.
    """
    if not args.check:
        raise RequestError("bench needs --check")
    check(args)


# The check


def check(args: argparse.Namespace) -> None:
    """Run the parts of a check; keep what each found as it goes, also after Ctrl-C."""
    from wanflow.bench import check as parts
    from wanflow.bench.findings import verdict

    chosen, folder = parts.parts_named(args.parts), _folder(args.out)
    began = time.monotonic()
    results: list[Result] = []
    stopped = True
    try:
        with _progress(args.output, chosen) as on_part:
            for result in parts.check(chosen, folder, args.device, on_part):
                results.append(result)
        stopped = False
    finally:
        text = _keep(args.output, folder, results, time.monotonic() - began, stopped)
    args.output.page(("", line) for line in text.splitlines())
    wrong = [result.part.name for result in results if result.failed]
    if wrong:
        raise WrongError(f"{verdict(results)} Wrong: {', '.join(wrong)}; see {folder / PAGE}")


def _folder(out: Path | None) -> Path:
    """Return the folder of the results, which is empty.

    Raises:
        RequestError: for a folder that holds something.
    """
    if out is None:
        return Path(tempfile.mkdtemp(prefix="wanflow-check-"))
    folder = out.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise RequestError(
            f"--out {printable(out)}: {error.strerror}; name a folder to make"
        ) from None
    if taken:
        raise RequestError(f"--out {printable(out)} holds files; name a new folder")
    return folder


def _keep(
    output: Output, folder: Path, results: list[Result], seconds: float, stopped: bool
) -> str:
    """Write the page of findings and the document; return the page."""
    from wanflow.bench.findings import document, page

    text, found = page(results, seconds, stopped), document(results, seconds, str(folder))
    write_bytes(folder / PAGE, text.encode(), overwrite=True)
    write_bytes(folder / DOCUMENT, json.dumps(found, indent=1).encode(), overwrite=True)
    output.document |= found
    return text


@contextmanager
def _progress(output: Output, parts: tuple[Part, ...]) -> Iterator[Callable[[Part], object]]:
    """Yield what shows the part that runs now, and when all will have ended; also without rich."""
    try:
        screen = output.screen()
    except ImportError:
        left = {part: sum(each.limit for each in parts[n:]) for n, part in enumerate(parts)}

        def say(part: Part) -> None:
            if not (output.quiet or output.json):
                eta = duration(left[part])
                print_line(f"{part.name}: {part.title}; all end in {eta} at the latest")

        yield say
        return
    with screen:

        def show(part: Part) -> None:
            screen.progress("checking", parts.index(part), len(parts), "part", part.name)

        yield show
        screen.progress("checking", len(parts), len(parts), "part")
