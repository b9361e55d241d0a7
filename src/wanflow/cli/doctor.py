"""Run `wanflow doctor`: examine this machine, and print its parts, kernels and problems."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.flags import CKPT_DIR, model_path
from wanflow.cli.parser import Parser, file_path
from wanflow.units import file_size, memory_size

if TYPE_CHECKING:
    from wanflow.cli.output import Output
    from wanflow.doctor.environment import Disk
    from wanflow.doctor.kernels import KernelResult
    from wanflow.doctor.report import Report

Line = tuple[str, str]  # a style of rich ("" for none), and text
EXPERT = 57.2e9  # bytes of a published expert, in float32
SMALLER = "832*480"  # for machines that a model's own size does not fit
STYLES = {"broken": "bold red", "warning": "yellow", "note": ""}


class BrokenError(OSError):
    """A part that wanflow needs is broken: exit code 1."""


def doctor_flags(p: Parser) -> None:
    """Add the command's flags."""
    p.add_argument(
        "--ckpt_dir",
        type=file_path,
        default=Path(),
        metavar="DIR",
        help="folder for the weights, whose disk is timed (default: .)",
    )


def doctor(args: argparse.Namespace) -> None:
    """Examine the machine and print the report.

    Raises:
        BrokenError: after the report, when a part that wanflow needs is broken.
    """
    with progress(args.output) as say:
        try:
            from wanflow.doctor.report import examine
        except ModuleNotFoundError:
            raise
        except ImportError as error:
            raise BrokenError(
                f"PyTorch cannot be loaded: {error}; pip install --force-reinstall torch"
            ) from None
        folder = model_path(str(args.ckpt_dir))
        with redirect_stdout(sys.stderr):  # packages may print while they are tried
            report = examine(folder, os.environ.get("CUDA_VISIBLE_DEVICES"), say)
        say("the best settings")
        try:
            best = advice(report, folder)
        except Exception as error:  # a broken machine can break the plan, and needs the report most
            best = [f"none: the plan failed, {type(error).__name__}: {error}"]
    broken = [problem.text for problem in report.problems if problem.level == "broken"]
    settings = [("", f"  {line}") for line in best]
    named = os.environ.get(CKPT_DIR)
    settings.append(("", f"  {CKPT_DIR}, the default of --ckpt_dir: {named or 'not set'}"))
    page = [*lines(report), ("", ""), ("bold", "best settings"), *settings]
    args.output.page(page, **report.as_dict(), advice=best)
    if broken:
        count = f"{len(broken)} broken parts above must be repaired first"
        raise BrokenError(f"broken: {'; '.join(broken)}" if args.json else count)


@contextmanager
def progress(output: Output) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on standard error what is tried next."""
    try:
        screen = output.screen()
    except ImportError:  # rich is missing or broken; the report names it
        yield lambda _: None
        return
    with screen:
        yield lambda text: screen.stage(f"trying: {text}")


# as text


def lines(report: Report) -> Iterator[Line]:
    """Yield the report for people."""
    yield from _machine(report)
    yield from _table("attention", report)
    yield from _table("matmul", report)
    yield from _table("convolution", report)
    yield "", ""
    if not report.problems:
        yield "green", "no problem found"
    for problem in report.problems:
        yield STYLES[problem.level], f"{problem.level}: {problem.text}"


def _memory(count: int) -> str:
    return memory_size(count) if count else "unknown"


def _machine(report: Report) -> Iterator[Line]:
    here = report.system
    cudnn = f", cuDNN {here.cudnn}" if here.cudnn else ""
    build = f"CUDA {here.cuda}{cudnn}" if here.cuda else "no CUDA"
    versions = f"PyTorch {here.torch} ({build}), Python {here.python}, {here.os}"
    yield "bold", f"wanflow {here.wanflow}, {versions}"
    usable = f", {here.cores_usable:g} usable" if here.cores_usable < here.cores else ""
    yield "", f"processor  {here.cpu or 'unknown'}, {here.cores} cores{usable}"
    limit = " (the limit of this container)" if here.ram_limited else ""
    pinned = "" if report.pinned is None else f", {memory_size(report.pinned)} can be pinned"
    yield "", f"RAM        {_memory(here.ram)}, {_memory(here.ram_free)} free{limit}{pinned}"
    gpus = [device for device in report.devices if device.name != "cpu"]
    for device in gpus:
        free = f", {_memory(device.memory_free)} free" if device.memory_free else ""
        capability = f", capability {device.capability}" if device.capability else ""
        memory = f"{_memory(device.memory)}{free}{capability}"
        yield "", f"GPU        {device.name}: {device.model}, {memory}"
    if here.driver:
        cuda = f", for CUDA up to {here.driver_cuda}" if here.driver_cuda else ""
        yield "", f"driver     NVIDIA {here.driver}{cuda}: {', '.join(here.cards) or 'no card'}"
    elif not gpus:
        yield "", "GPU        none"
    yield from _disk(report.disk)
    yield "", f"video      {report.encoder or 'H.264 can be written'}"
    installed = [f"{name} {version}" for name, version in report.packages.items() if version]
    missing = [name for name, version in report.packages.items() if not version]
    without = f"; not installed: {', '.join(missing)}" if missing else ""
    yield "", f"packages   {', '.join(installed)}{without}"


def _disk(disk: Disk) -> Iterator[Line]:
    facts = [f"{file_size(disk.free)} free"]
    if disk.writes:
        facts.append(f"writes {file_size(disk.writes)}/s")
    if disk.reads:
        facts.append(f"reads {file_size(disk.reads)}/s")
        facts.append(f"a published expert in {EXPERT / disk.reads:.0f} s")
    yield "", f"disk       {disk.folder}: {', '.join(facts)}"
    for note in disk.notes:
        yield "", f"           {note}"


def _table(what: str, report: Report) -> Iterator[Line]:
    """Yield the results of one kind as a table; a failure has its reason instead of numbers."""
    from wanflow.doctor.kernels import CHANNELS, HEAD_DIM, SIZES
    from wanflow.screen import table_lines

    results = [result for result in report.tries if result.what == what]
    sizes = {kind: SIZES[kind] for kind in SIZES if any(r.device.startswith(kind) for r in results)}
    if what == "attention":
        titles = [
            f"{tokens:,} tokens, {heads} heads of {HEAD_DIM} on {kind}"
            for kind, (heads, tokens, _) in sizes.items()
        ]
        title, way = "attention", "kernel"
    elif what == "convolution":
        titles, title, way = [f"{CHANNELS} channels"], "convolutions", "way"
    else:
        titles = [f"{side:,} x {side:,} on {kind}" for kind, (_, _, side) in sizes.items()]
        title, way = "matrix products", "way"
    yield "", ""
    yield "bold", f"{title} ({', '.join(titles)}; errors relative to the largest value)"
    head = ("device", "dtype", way, "error", "ms", "TFLOP/s", "")
    rows = [_cells(result, report) for result in results]
    styles = ["dim", *("yellow" if result.why else "" for result in results)]
    for style, line in zip(styles, table_lines(head, rows, "lllrrrl"), strict=True):
        yield style, f"  {line}"


def _cells(result: KernelResult, report: Report) -> tuple[str, ...]:
    return (
        result.device,
        result.dtype,
        result.way,
        "" if result.error is None else f"{result.error:.1e}",
        "" if result.seconds is None else f"{result.seconds * 1e3:.2f}",
        "" if result.tflops is None else f"{result.tflops:.3g}",
        result.why or _remark(result, report),
    )


def _remark(result: KernelResult, report: Report) -> str:
    from wanflow.transforms.attention_kernels import BACKENDS

    remarks = [BACKENDS[result.way].about] if result.what == "attention" else []
    if report.auto.get(result.device, {}).get(result.dtype) == result.way:
        remarks.append("auto picks it")
    if result.lse:
        remarks.append(f"no log-sum-exp: {result.lse}")
    return ", ".join(remarks)


def advice(report: Report, folder: Path) -> list[str]:
    """Return how full-size models run here: the settings that `wanflow generate` would pick."""
    from wanflow.checkpoint.checkpoint import published
    from wanflow.config import RequestError
    from wanflow.plan.needed import needed_words, where_else
    from wanflow.plan.solve import solve
    from wanflow.plan.start import placed
    from wanflow.presets import T2V_A14B, TI2V_5B
    from wanflow.request import Request
    from wanflow.runtime import Runtime

    kernels = report.auto.get("cuda:0", {})
    if not kernels:  # a CPU would take days, and there is no plan for MPS
        small = TI2V_5B.name
        words = f"{needed_words(T2V_A14B.name)}; {needed_words(small)}"
        return [f"{words}; this machine has no GPU for them", f"do: {where_else(small)}"]
    found = []
    for spec in (T2V_A14B, TI2V_5B):  # I2V-A14B needs what T2V-A14B does
        for size in dict.fromkeys(("{}*{}".format(*spec.size), SMALLER)):
            request = Request(prompt="-", size=size).complete(spec)
            title = f"{spec.name}, {size}, {request.frame_num} frames"
            try:
                plan = solve(published(spec), request, *placed(Runtime(), folder))
            except RequestError as refusal:
                found.append(f"{title}: {refusal}")
                continue
            verdict = "fits" if plan.fits else f"does not fit: {'; '.join(plan.short)}"
            found.append(f"{title}: {verdict}")
            found += [f"  {line}" for line in (*plan.reasons, *plan.offers)]
            if plan.fits:
                break
    half = f"{kernels['float16']}, in float16" if "float16" in kernels else "none works in 16 bits"
    return [*found, f"attention: {kernels.get('bfloat16', half)}"]
