"""Run `wanflow plan`: print what a request takes, on this machine or a described one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli import devices
from wanflow.cli.flags import generate_flags, given_parts, request_from, runtime_from
from wanflow.cli.parser import Parser
from wanflow.config import RequestError

if TYPE_CHECKING:
    from wanflow.plan.gpus import Machine


def plan_flags(p: Parser) -> None:
    """Add the command's flags: those that describe a machine, and all of generate's."""
    machine = p.add_argument_group(
        "machine",
        "This one, unless one is described. Without --ckpt_dir the official weights are planned;"
        " no file needs to be there.",
    )
    machine.add_argument(
        "--gpu",
        help="a card in any spelling (rtx3060, 4090, a100-40gb, h100-pcie), a size (12gb), or none",
    )
    machine.add_argument(
        "--num_gpus",
        type=int,
        default=1,
        metavar="N",
        help="how many GPUs share the video; a100-80gb without --gpu",
    )
    machine.add_argument("--ram", type=float, metavar="GB", help="its RAM (default: 64)")
    machine.add_argument("--disk", type=float, metavar="GB", help="its disk (default: 150)")
    report = p.add_argument_group("report")
    report.add_argument(
        "--peaks", action="store_true", help="also list the largest tensors at each peak"
    )
    generate_flags(p)


def plan(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        RequestError: after the plan, when the request cannot run there.
    """
    from wanflow.checkpoint.checkpoint import published
    from wanflow.opening import resolve
    from wanflow.plan.estimate import estimate
    from wanflow.plan.measure import rated
    from wanflow.plan.report import document, page
    from wanflow.plan.solve import solve
    from wanflow.plan.start import completed, raise_if_unfit

    here = _processes(args)
    request, runtime = request_from(args), runtime_from(args)
    request = replace(request, prompt=request.prompt or "any")
    given, folder = given_parts(args), Path.cwd()
    if args.ckpt_dir is None and not given:
        checkpoint = published()
    else:
        checkpoint = resolve(args.ckpt_dir, given)
        folder = checkpoint.folder
    complete = completed(request, checkpoint.spec)
    machine = _machine(args, folder, here)
    # A described machine runs a process for each GPU; this one as many as `generate` would start.
    processes = args.num_gpus if machine.described else here
    planned = solve(checkpoint, complete, runtime, machine, processes=processes)
    planned = rated(planned)
    time = estimate(planned) if planned.machine.rates is not None else None
    lines = (("", line) for line in page(planned, time, args.peaks))
    args.output.page(lines, **document(planned, time))
    if not args.force:
        raise_if_unfit(planned)


def _processes(args: argparse.Namespace) -> int:
    """Return how many processes `--gpus` would start on this machine."""
    if args.gpus is None:
        return 1
    if args.gpu is not None or args.num_gpus != 1:
        raise RequestError(
            "--gpus names GPUs of this machine, and --gpu and --num_gpus describe another: leave"
            " one out"
        )
    started = devices.parse_gpus(args)
    return 1 if started is None else started.count


def _machine(args: argparse.Namespace, folder: Path, used: int) -> Machine:
    """Return the described machine, or this one with the RAM or disk that is given.

    A run would use `used` GPUs of this machine.
    """
    from wanflow.plan.gpus import described, this_machine

    if args.gpu is not None or args.num_gpus != 1:
        return described(args.gpu or "a100-80gb", args.num_gpus, args.ram, args.disk)
    here, other = this_machine(folder, used), described("none", 1, args.ram, args.disk)
    if args.ram is not None:
        here = replace(here, ram=other.ram, ram_free=other.ram_free)
    return here if args.disk is None else replace(here, disk_free=other.disk_free)
