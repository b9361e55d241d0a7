"""Run `wanflow bench`: measure the stages of a run, or check what a GPU must answer first."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli.flags import CKPT_DIR, GROUPS, config_flag, given_parts, part_flags, runtime_from
from wanflow.cli.parser import Parser, add_settings, file_path, number, settings_from
from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.presets import FAMILY, NANO
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.screen import print_line
from wanflow.units import duration
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from wanflow.bench.check import Part, Result
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.cli.output import Output

PAGE, DOCUMENT = "findings.md", "check.json"
TABLE, PLOT, STAGES = "stages.txt", "stages.png", "stages.json"
MODELS = {**{spec.task: spec.name for spec in FAMILY}, "nano": NANO.name}  # of --random_weights
STEPS = 6  # so few have both experts, each with a step that is not its first
PROMPT = "a red circle moves left on a blue background"


class WrongError(OSError):
    """A check found something wrong: exit code 1."""


def bench_flags(p: Parser) -> None:
    """Add the command's flags: its own, and those of a model, a video and a runtime."""
    own = p.add_argument_group("benchmark")
    own.add_argument(
        "--check", action="store_true", help="answer what a GPU must answer first, part by part"
    )
    own.add_argument(
        "--ckpt_dir",
        metavar="DIR",
        help=f"folder of the weights, or nano, the miniature (default: {CKPT_DIR})",
    )
    own.add_argument(
        "--random_weights",
        "--random-weights",
        choices=tuple(MODELS),
        metavar="MODEL",
        help=f"random weights made on the device, in place of files: {', '.join(MODELS)}",
    )
    own.add_argument(
        "--layers",
        type=number(int, 1, 1000),
        metavar="N",
        help="blocks of an expert of --random_weights, so that it fits",
    )
    own.add_argument(
        "--out",
        type=file_path,
        metavar="FOLDER",
        help="folder to make, for table, plot and JSON, or for the findings of a check",
    )
    more = p.add_argument_group("what to measure")
    more.add_argument(
        "--repeat", type=number(int, 1, 100), default=1, metavar="N", help="runs; medians count"
    )
    more.add_argument(
        "--against",
        choices=("diffusers",),
        help="also time a step and a decode beside it, in turn, with the same weights",
    )
    more.add_argument(
        "--parts", nargs="+", default=[], metavar="PART", help="of --check, as in: block vae"
    )
    names = ("main", "picture", "video", "sampling", "LoRA", "memory", "parallel", "parts")
    groups = {name: p.add_argument_group(*GROUPS[name]) for name in names}
    add_settings(Request, groups)
    add_settings(Runtime, groups)
    part_flags(groups["parts"])
    run = p.add_argument_group("run")
    config_flag(run)
    run.add_argument("--force", action="store_true", help="run although the machine is too small")


def bench(args: argparse.Namespace) -> None:
    """Measure the stages of a run, or check.

    Raises:
        WrongError: after a check that found something wrong.
    """
    if args.check:
        return check(args)
    if args.parts:
        raise RequestError("--parts names parts of a check: add --check")
    run(args)


# A run


def run(args: argparse.Namespace) -> None:
    """Measure a run, and print its stages beside the plan."""
    request = Request(**{"prompt": PROMPT, "seed": 0, "sample_steps": STEPS, **_given(args)})
    runtime = runtime_from(args)
    folder = None if args.out is None else _folder(args.out)
    with args.output.screen() as screen:
        from wanflow.bench.report import bars, lines
        from wanflow.bench.run import measure
        from wanflow.front import with_pictures

        checkpoint, request = _model(args, runtime), with_pictures(request)
        if args.against is not None:
            from wanflow.bench.against import beside, refuse_without_diffusers, words

            refuse_without_diffusers()
        screen.say(f"measuring {checkpoint.spec.name}")
        how = args.repeat, screen.progress, screen.stage, args.force
        found = measure(checkpoint, request, runtime, *how)
        document = found.document()
        page = lines(found.title, found.stages)
        if args.against is not None:
            sides = beside(found, checkpoint.spec, max(3, args.repeat), screen.progress)
            document["against"] = sides
            page += [("", ""), *(("", line) for line in words(sides))]
    if folder is not None:
        text = "\n".join(line for _, line in page) + "\n"
        write_bytes(folder / TABLE, text.encode(), overwrite=True)
        write_bytes(folder / PLOT, bars(found.title, found.stages), overwrite=True)
        write_bytes(folder / STAGES, json.dumps(document, indent=1).encode(), overwrite=True)
        document["folder"] = str(folder)
    args.output.page(page, **document)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in settings_from(Request, args).items() if value != ""}


def _model(args: argparse.Namespace, runtime: Runtime) -> Checkpoint:
    """Return the model that is named; else nano on a CPU, and random weights on a GPU."""
    from wanflow.choices import choose_device
    from wanflow.opening import resolve

    given, device = given_parts(args), choose_device(runtime.device)
    named, random = args.ckpt_dir is not None or bool(given), args.random_weights
    if random is None and not named:
        random = "t2v-A14B" if device.type == "cuda" else None
    if random is None:
        if args.layers is not None:
            raise RequestError(
                f"--layers {args.layers}: files hold all blocks; add --random_weights t2v-A14B"
            )
        return resolve(args.ckpt_dir if named else "nano", given)
    if named:
        raise RequestError(
            "--random_weights is in place of files: leave it out, or --ckpt_dir and single files"
        )
    from wanflow.bench.weights import random_checkpoint

    return random_checkpoint(MODELS[random], args.layers, device)


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
