"""`wanflow plan`: what a request takes, on this machine or on one that is described, before
anything is read or bought.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli import devices
from wanflow.cli.flags import generate_flags, given_parts, request_from, runtime_from
from wanflow.cli.parser import Parser
from wanflow.config import RequestError
from wanflow.request import Request
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.plan import Machine

SIZES = ("1280*720", "832*480")


def plan_flags(p: Parser) -> None:
    """Add the command's flags: those that describe a machine, and all of generate's."""
    machine = p.add_argument_group(
        "machine",
        "This one, unless one is described. Without --ckpt_dir the official weights are planned;"
        " no file needs to be there.",
    )
    machine.add_argument(
        "--gpu", help="a100-80gb, h100-80gb, h200, h20, rtx5090, rtx4090, l40s, a6000, or none"
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
    machine.add_argument("--json", action="store_true", help="print one JSON document")
    report = p.add_argument_group("report")
    report.add_argument(
        "--figures", action="store_true", help="compare with the published times on A100 GPUs"
    )
    report.add_argument(
        "--peaks", action="store_true", help="also list the largest tensors at each peak"
    )
    generate_flags(p)


def plan(args: argparse.Namespace) -> None:
    """Print the plan; RequestError (exit code 2) where the request cannot run there at all."""
    from wanflow.plan import published, solve
    from wanflow.plan.estimate import estimate, rated
    from wanflow.plan.report import document, page
    from wanflow.plan.starting import completed, raise_if_unfit

    if args.figures:
        return _figures(args.json)
    here = _processes(args)
    wanted, runtime = request_from(args), runtime_from(args)
    wanted = replace(wanted, prompt=wanted.prompt or "any")
    if args.ckpt_dir is None and not given_parts(args):
        model, checkpoint = published(), None
    else:
        from wanflow.opening import resolve

        model = checkpoint = resolve(args.ckpt_dir, given_parts(args))
    request = completed(wanted, model.spec)
    machine = _machine(args, Path.cwd() if checkpoint is None else checkpoint.folder, here)
    # Described machines have as many processes as GPUs; this one as many as `generate` would start.
    processes = args.num_gpus if machine.described else here
    settled = rated(
        solve(model, request, runtime, machine, trace_small=True, processes=processes),
        model,
        request,
    )
    time = estimate(settled) if settled.machine.rates is not None else None
    if args.json:
        print(json.dumps(document(model, request, settled, time), indent=2, ensure_ascii=False))
    else:
        for line in page(model, request, settled, time, args.peaks):
            print(line)
    if not args.force:
        raise_if_unfit(settled, model)


def _processes(args: argparse.Namespace) -> int:
    """How many `--gpus` would start on this machine."""
    if args.gpus is None:
        return 1
    if args.gpu is not None or args.num_gpus != 1:
        raise RequestError(
            "--gpus are of this machine, and --gpu and --num_gpus describe another; leave one out"
        )
    started = devices.parse_gpus(args)
    return 1 if started is None else started.count


def _machine(args: argparse.Namespace, folder: Path, used: int) -> Machine:
    """The machine that is described, or this one, with other RAM or disk where those alone are
    given.

    Args:
        used: how many GPUs of this one are meant.
    """
    from wanflow.plan import described, this_machine

    if args.gpu is not None or args.num_gpus != 1:
        return described(args.gpu or "a100-80gb", args.num_gpus, args.ram, args.disk)
    here, other = this_machine(folder, used), described("none", 1, args.ram, args.disk)
    if args.ram is not None:
        here = replace(here, ram=other.ram, ram_free=other.ram_free)
    return here if args.disk is None else replace(here, disk_free=other.disk_free)


def _figures(as_json: bool) -> None:
    """The document's figures on A100 GPUs of 80 GB."""
    from wanflow.plan import described, published, solve
    from wanflow.plan.estimate import CLAIMED_GB, CLAIMS, figures
    from wanflow.plan.report import figures_page

    model, tables, gigabytes = published(), {}, {}
    for size in SIZES:
        guided = Request("any", size=size, seed=0).complete(model.spec)
        without = replace(guided, cfg_high=1.0, cfg_low=1.0)
        one, both = Runtime(keep_experts=False), Runtime(keep_experts=True)
        machines = {count: described("a100-80gb", count, ram=128) for count in CLAIMS}
        plans = [
            {
                count: solve(model, request, one, machine, processes=count)
                for count, machine in machines.items()
            }
            for request in (guided, without)
        ]
        needs = [
            plan.need
            for plan in (solve(model, guided, both, machines[1]), plans[0][1])
            if plan.need is not None
        ]
        tables[size] = figures(*plans)
        gigabytes[size] = needs[0].device.device / 1e9, needs[1].device.device / 1e9
    if not as_json:
        for line in figures_page(tables, gigabytes):
            print(line)
        return
    rows = {
        size: [
            asdict(row) | {"reached_by": [*row.reached_by(True), *row.reached_by(False)]}
            for row in table
        ]
        for size, table in tables.items()
    }
    print(json.dumps({"claimed_gb": CLAIMED_GB, "gigabytes": gigabytes, "minutes": rows}, indent=2))
