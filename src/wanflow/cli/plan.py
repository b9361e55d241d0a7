"""Run `wanflow plan`: print what a request takes, on this machine or a described one."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli import devices
from wanflow.cli.flags import (
    generate_flags,
    given_parts,
    model_of_task,
    refuse_other_task,
    request_from,
    runtime_from,
)
from wanflow.cli.parser import Parser, number, settings_from, words_of
from wanflow.cli.trust import unread
from wanflow.config import RequestError
from wanflow.presets import T2V_A14B, ModelSpec
from wanflow.request import PictureRecord, Request
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.plan.gpus import Machine
    from wanflow.plan.plan import Plan

PROMPT = "A fishing boat leaves a small harbour at dawn"
PROMPT_NANO = "a red circle moves left on a blue background"
PICTURE = "harbour.jpg"


def plan_flags(p: Parser) -> None:
    """Add the command's flags: those that describe a machine, and all of generate's."""
    machine = p.add_argument_group(
        "machine",
        "This one, unless one is described. Without --ckpt_dir the official weights of --task are"
        " planned; no file needs to be there.",
    )
    machine.add_argument(
        "--gpu",
        help="a card in any spelling (rtx3060, 4090, a100-40gb, h100-pcie), a size (12gb), or none",
    )
    machine.add_argument(
        "--num_gpus",
        type=number(int, 1, 999_999),
        default=1,
        metavar="N",
        help="how many GPUs share the video; a100-80gb without --gpu",
    )
    gigabytes = number(float, 0.001, 10**6)
    machine.add_argument("--ram", type=gigabytes, metavar="GB", help="its RAM (default: 64)")
    machine.add_argument("--disk", type=gigabytes, metavar="GB", help="its disk (default: 150)")
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
    from wanflow.front import with_pictures
    from wanflow.opening import resolve
    from wanflow.plan.estimate import estimate
    from wanflow.plan.measure import rated
    from wanflow.plan.report import answer, document, page
    from wanflow.plan.solve import solve
    from wanflow.plan.start import completed, raise_if_unfit

    cards = _cards(args)
    request, runtime = request_from(args), runtime_from(args)
    request = unread(replace(request, prompt=request.prompt or "any"))
    given, folder = given_parts(args), Path.cwd()
    with args.output.screen() as screen:
        screen.say("planning, without reading weights")
        request = with_pictures(request)
        if args.ckpt_dir is None and not given:
            checkpoint = published(model_of_task(args) or T2V_A14B)
        else:
            checkpoint = resolve(args.ckpt_dir, given)
            refuse_other_task(args, checkpoint)
            folder = checkpoint.folder
        complete = completed(request, checkpoint.spec)
        runtime, machine = _placed(args, runtime, folder, cards)
        # A described machine runs a process on each GPU; this one as many as `generate` starts.
        processes = args.num_gpus if machine.described else max(1, len(cards))
        planned = solve(
            checkpoint, complete, runtime, machine, processes=processes, report=screen.stage
        )
        screen.stage("measuring this machine")
        planned = rated(planned)
    time = estimate(planned) if planned.machine.rates is not None else None
    get = _download(args, given, checkpoint.spec)
    first = answer(planned, time, _command(args, planned), get)
    lines = (*first.lines(), "", *page(planned, time, args.peaks))
    args.output.page((("", line) for line in lines), **document(planned, time, first))
    if not args.force:
        raise_if_unfit(planned)


def _command(args: argparse.Namespace, planned: Plan) -> str:
    """Return the command line that runs a plan, with the settings that it chose."""
    spec = planned.checkpoint.spec
    asked = {"prompt": PROMPT_NANO if planned.small else PROMPT, **settings_from(Request, args)}
    if spec.conditioning == "channels" and not {"image", "last_image"} & set(asked):
        asked["image"] = PICTURE
    for name, value in asked.items():
        if isinstance(value, PictureRecord):
            asked[name] = value.file
    words = ["wanflow", "generate"]
    if model_of_task(args) is not None:
        words += ["--task", args.task]
    for part, file in given_parts(args).items():
        words += [f"--{part}", str(file)]
    if args.ckpt_dir is not None or not given_parts(args):
        words += ["--ckpt_dir", args.ckpt_dir or folder_of(spec)]
    words += words_of(Request, {name: value for name, value in asked.items() if value != ""})
    words += words_of(Runtime, {**settings_from(Runtime, args), **_chosen(planned)})
    for flag in ("preset", "sample_guide_scale", "save_file"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    if planned.layout.size > 1:
        words += ["--gpus", args.gpus or ",".join(map(str, range(planned.layout.size)))]
    return shlex.join(words)


def _chosen(planned: Plan) -> dict[str, Any]:
    """Return the settings that a plan chose and that are no defaults of a small model."""
    runtime, layers = planned.runtime, planned.checkpoint.spec.dit.num_layers
    names = ["cfg_parallel", "ring_size", "ulysses_size"] if planned.layout.size > 1 else []
    if not planned.small:
        names += ["chunk_tokens", "vae_tile", "t5_cpu", "prefetch", "dit_fsdp"]
    chosen = {name: getattr(runtime, name) for name in names}
    idle = (None, False, 0, 1)  # values that change nothing; True equals 1
    chosen = {name: v for name, v in chosen.items() if v is True or v not in idle}
    if not planned.small and planned.kind == "gpu":
        chosen["keep_experts"] = runtime.keep_experts
        if runtime.resident_blocks != layers:
            chosen |= {
                "resident_blocks": runtime.resident_blocks,
                "stream_from": runtime.stream_from,
            }
    return chosen


def folder_of(spec: ModelSpec) -> str:
    """Return the folder where `wanflow download` puts a model's official weights."""
    return f"{spec.name.rpartition('Wan2.2-')[2].replace('-', '_')}_weights"


def _download(args: argparse.Namespace, given: object, spec: ModelSpec) -> str:
    """Return the command that gets the official weights, where none are named or here."""
    folder, named = folder_of(spec), args.ckpt_dir is not None or given
    task = "" if spec == T2V_A14B else f"--task {spec.task} "
    return "" if named or Path(folder).is_dir() else f"wanflow download {task}--local_dir {folder}"


def _cards(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the GPUs of this machine that `--gpus` would start processes on; () for one process.

    On a CPU they are only counted.
    """
    if args.gpus is None:
        return ()
    if args.gpu is not None or args.num_gpus != 1:
        raise RequestError(
            "--gpus names GPUs of this machine, and --gpu and --num_gpus describe another: leave"
            " one out"
        )
    started = devices.parse_gpus(args)
    return () if started is None else started.devices


def _placed(
    args: argparse.Namespace, runtime: Runtime, folder: Path, cards: tuple[int, ...]
) -> tuple[Runtime, Machine]:
    """Return the described machine, or this one with the RAM or disk that is given.

    A run would use these cards of this machine, or the device that the returned runtime names.
    """
    from wanflow.plan.gpus import described
    from wanflow.plan.start import placed

    if args.gpu is not None or args.num_gpus != 1:
        return runtime, described(args.gpu or "a100-80gb", args.num_gpus, args.ram, args.disk)
    runtime, here = placed(runtime, folder, cards)
    other = described("none", 1, args.ram, args.disk)
    if args.ram is not None:
        here = replace(here, ram=other.ram, ram_free=other.ram_free)
    return runtime, here if args.disk is None else replace(here, disk_free=other.disk_free)
