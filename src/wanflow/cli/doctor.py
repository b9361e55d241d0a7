"""`wanflow doctor`: what this machine is, what works on it, what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import Parser

if TYPE_CHECKING:
    from wanflow.doctor.kernels import KernelResult
    from wanflow.doctor.report import Report

Line = tuple[str, str]  # a style of rich's ("" for none), and text
EXPERT = 57.2e9  # bytes of an expert as it is published, in float32
SIZES = ("1280*720", "832*480")  # the second where the first does not fit
STYLES = {"broken": "bold red", "warning": "yellow", "note": ""}


class BrokenError(OSError):
    """Something that wanflow needs does not work: exit code 1."""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command and its flags."""
    p = commands.add_parser(
        "doctor",
        help="what this machine is, what works on it, what is wrong with it",
        allow_abbrev=False,
    )
    p.add_argument(
        "--ckpt_dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where weights are or will be: its disk is timed (.)",
    )
    p.add_argument("--json", action="store_true", help="everything, as one JSON document")


def doctor(args: argparse.Namespace) -> None:
    """Examine, and tell.

    Raises:
        BrokenError: when something that wanflow needs is broken, after all was told.
    """
    with progress() as say:
        try:
            from wanflow.doctor.report import examine
        except ModuleNotFoundError:
            raise
        except ImportError as problem:
            raise BrokenError(
                f"PyTorch cannot be loaded: {problem}; pip install --force-reinstall torch"
            ) from None
        folder = _folder(args.ckpt_dir)
        with redirect_stdout(sys.stderr):  # packages print what they like while they are tried
            report = examine(folder, os.environ.get("CUDA_VISIBLE_DEVICES"), say)
        say("the best settings")
        try:
            best = advice(report, folder)
        except Exception as problem:
            # on a machine that is broken the planner may be too, and the report is wanted all the
            # more
            best = [f"none: the planner failed, {type(problem).__name__}: {problem}"]
    if args.json:
        print(json.dumps({**report.as_dict(), "advice": best}, indent=2, ensure_ascii=False))
    else:
        show(
            [
                *lines(report),
                ("", ""),
                ("bold", "best settings"),
                *(("", f"  {line}") for line in best),
            ]
        )
    broken = [problem.text for problem in report.problems if problem.level == "broken"]
    if broken:
        raise BrokenError(
            f"broken: {'; '.join(broken)}"
            if args.json
            else f"{len(broken)} of the things above must be mended first"
        )


def _folder(path: Path) -> Path:
    if str(path) == "nano":
        from wanflow.assemble import NANO_FOLDER

        return NANO_FOLDER
    return path


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """What is being tried, on standard error: in place on a terminal, a line every two seconds
    elsewhere.
    """
    try:
        from rich.text import Text

        from wanflow.screen import EVERY, Screen
    except ImportError:  # the report says so
        yield lambda _: None
        return
    screen = Screen()
    if screen.console.is_terminal:
        with screen.console.status("") as status:
            yield lambda text: status.update(Text(f"trying: {text}"))
        return
    told = [time.monotonic()]

    def say(text: str) -> None:
        if time.monotonic() - told[0] > EVERY:
            screen.say(f"trying: {text}")
            told[0] = time.monotonic()

    yield say


def show(text: Sequence[Line]) -> None:
    """On standard output, coloured on a terminal only."""
    try:
        from rich.console import Console
    except ImportError:
        print(*(line for _, line in text), sep="\n")
        return
    console = Console(highlight=False, soft_wrap=True)
    for style, line in text:
        console.print(line, style=style or None, markup=False)


# as text


def lines(report: Report) -> Iterator[Line]:
    """The report for people."""
    yield from _machine(report)
    yield from _table("attention", report)
    yield from _table("matmul", report)
    yield "", ""
    if not report.problems:
        yield "green", "nothing is wrong here"
    for problem in report.problems:
        yield STYLES[problem.level], f"{problem.level}: {problem.text}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count else "unknown"


def _machine(report: Report) -> Iterator[Line]:
    here, disk = report.system, report.disk
    build = (
        f"CUDA {here.cuda}" + (f", cuDNN {here.cudnn}" if here.cudnn else "")
        if here.cuda
        else "no CUDA"
    )
    yield (
        "bold",
        f"wanflow {here.wanflow}, PyTorch {here.torch} ({build}), Python {here.python}, {here.os}",
    )
    usable = (
        f", of which {here.cores_usable:g} may be used" if here.cores_usable < here.cores else ""
    )
    yield "", f"processor  {here.cpu or 'unknown'}, {here.cores} cores{usable}"
    yield (
        "",
        (
            f"RAM        {_gb(here.ram)}, {_gb(here.ram_free)}"
            f" free{' (the limit of this container)' if here.ram_limited else ''}"
        ),
    )
    for device in report.devices:
        if device.name != "cpu":
            extra = f", capability {device.capability}" if device.capability else ""
            free = f", {_gb(device.memory_free)} free" if device.memory_free else ""
            yield "", f"GPU        {device.name}: {device.model}, {_gb(device.memory)}{free}{extra}"
    if here.driver:
        serves = f", for CUDA up to {here.driver_cuda}" if here.driver_cuda else ""
        yield "", f"driver     NVIDIA {here.driver}{serves}: {', '.join(here.cards) or 'no card'}"
    elif len(report.devices) == 1:
        yield "", "GPU        none"
    speeds = [
        f"{word} {speed / 1e9:.2f} GB/s"
        for word, speed in (("writes", disk.writes), ("reads", disk.reads))
        if speed
    ]
    if disk.reads:
        speeds.append(f"an expert as published in {EXPERT / disk.reads:.0f} s")
    yield "", f"disk       {disk.folder}: {', '.join([_gb(disk.free) + ' free', *speeds])}"
    for note in disk.notes:
        yield "", f"           {note}"
    yield "", f"video      {'H.264 can be written' if not report.encoder else report.encoder}"
    there = ", ".join(f"{name} {version}" for name, version in report.packages.items() if version)
    missing = ", ".join(name for name, version in report.packages.items() if not version)
    yield "", f"packages   {there}" + (f"; not installed: {missing}" if missing else "")


def _table(what: str, report: Report) -> Iterator[Line]:
    """One kind of try as an aligned table; a way that does not work has the reason in place of its
    numbers.
    """
    from wanflow.doctor import kernels as made
    from wanflow.transforms.attention import BACKENDS

    tries = [one for one in report.tries if one.what == what]
    names = [(one.device, one.dtype, one.way) for one in tries]
    kinds = [
        kind for kind in made.SIZES if any(one.device.partition(":")[0] == kind for one in tries)
    ]
    title = {
        "attention": ", ".join(
            f"{made.SIZES[kind][1]:,} tokens, {made.SIZES[kind][0]} heads of {made.HEAD_DIM} on"
            f" {kind}"
            for kind in kinds
        ),
        "matmul": ", ".join(
            f"{made.SIZES[kind][2]:,} x {made.SIZES[kind][2]:,} on {kind}" for kind in kinds
        ),
    }[what]
    yield "", ""
    yield (
        "bold",
        (
            f"{'attention' if what == 'attention' else 'matrix products'} ({title}; errors relative"
            " to the largest value)"
        ),
    )
    head = ("device", "dtype", "kernel" if what == "attention" else "way", "error", "ms", "TFLOP/s")
    rows = [head, *((*name, *_numbers(one)) for name, one in zip(names, tries, strict=True))]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = (
            f"{cell:<{widths[n]}}" if n < 3 else f"{cell:>{widths[n]}}"
            for n, cell in enumerate(row)
        )
        return f"  {'  '.join(cells)}"

    yield "dim", line(head)
    for name, one in zip(names, tries, strict=True):
        if one.why:
            yield "yellow", f"{line(name)}  {one.why}"
            continue
        remarks = [BACKENDS[one.way].about] if what == "attention" else []
        remarks += (
            ["auto takes it"] if report.auto.get(one.device, {}).get(one.dtype) == one.way else []
        )
        remarks += [f"no log-sum-exp: {one.lse}"] if one.lse else []
        yield "", f"{line((*name, *_numbers(one)))}  {', '.join(remarks)}".rstrip()


def _numbers(one: KernelResult) -> tuple[str, str, str]:
    return (
        "" if one.error is None else f"{one.error:.1e}",
        "" if one.seconds is None else f"{one.seconds * 1e3:.2f}",
        "" if one.tflops is None else f"{one.tflops:.3g}",
    )


def advice(report: Report, folder: Path) -> list[str]:
    """How the full-size model runs here, in words: what `wanflow generate` settles by itself, and
    where it does not fit, what does.
    """
    from wanflow.config import RequestError
    from wanflow.plan import WHERE_ELSE, needed_words
    from wanflow.plan.gpus import this_machine
    from wanflow.plan.model import published
    from wanflow.plan.solve import solve
    from wanflow.presets import T2V_A14B
    from wanflow.request import Request
    from wanflow.runtime import Runtime

    kernels = report.auto.get("cuda:0", {})
    if not kernels:  # the CPU would take days, and MPS is not planned for
        return [f"{needed_words()}; this machine has no GPU for it", f"do: {WHERE_ELSE}"]
    said = []
    for size in SIZES:
        request = Request(prompt="-", size=size).complete(T2V_A14B)
        try:
            plan = solve(published(), request, Runtime(), this_machine(folder))
        except RequestError as refusal:
            said.append(f"{size}, {request.frame_num} frames: {refusal}")
            continue
        said.append(
            f"{size}, {request.frame_num} frames:"
            f" {'fits' if plan.fits else 'does not fit: ' + '; '.join(plan.short)}"
        )
        said += [f"  {line}" for line in (*plan.reasons, *plan.offers)]
        if plan.fits:
            break
    return [*said, f"attention: {kernels.get('bfloat16', 'none works in bfloat16')}"]
