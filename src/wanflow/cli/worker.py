"""Run `wanflow worker`, and the hidden `wanflow gang` that it starts."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.choices import choose_device
from wanflow.cli.devices import LAUNCHED
from wanflow.cli.flags import (
    CKPT_DIR,
    GROUPS,
    given_parts,
    part_flags,
    runtime_from,
    take_environment,
)
from wanflow.cli.launch import COMMAND
from wanflow.cli.parser import Parser, add_settings, file_path, number
from wanflow.cli.running import world_size
from wanflow.config import RequestError
from wanflow.request import Request
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.front import Pipeline
    from wanflow.loaders.parts import Report
    from wanflow.parallel.ranks import DistInfo
    from wanflow.serve.gang import Instructions
    from wanflow.serve.worker import Foreman

AT_ONCE_S = 5.0  # from a second signal to the end, where the store of jobs does not answer

logger = logging.getLogger("wanflow")


def worker_flags(p: Parser) -> None:
    """Add the flags of `wanflow worker`."""
    main = p.add_argument_group("worker")
    main.add_argument("--ckpt_dir", metavar="DIR", help=f"the weights, or nano ({CKPT_DIR})")
    main.add_argument(
        "--data_dir",
        type=file_path,
        metavar="DIR",
        help="videos, states and, without --db, the queue (WANFLOW_DATA_DIR)",
    )
    main.add_argument("--db", metavar="URL", help="postgresql://..., for several machines")
    main.add_argument("--gpus", metavar="0,1,...", help="share each video among these GPUs")
    main.add_argument(
        "--lora_dir",
        type=file_path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders of the LoRAs that requests may name",
    )
    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--size", metavar="WIDTH*HEIGHT", help="the largest video that is planned for"
    )
    limits.add_argument(
        "--frame_num",
        type=number(int, 1),
        metavar="N",
        help="the longest video that is planned for",
    )
    limits.add_argument(
        "--stall_s",
        type=number(float, 0.1),
        metavar="SECONDS",
        help="without progress, load the model again (default: 1800, or 10 times the longest step)",
    )
    limits.add_argument(
        "--timeout",
        type=number(float, 0.1, 1e6),
        default=600.0,
        metavar="SECONDS",
        help="end the gang if a GPU is late to the others by SECONDS",
    )
    limits.add_argument(
        "--save_s",
        type=number(float, 0),
        metavar="SECONDS",
        help="save the state of a run every SECONDS (default: 5)",
    )
    limits.add_argument("--force", action="store_true", help="start on a machine that is too small")
    limits.add_argument("--with_parent", action="store_true", help="end when standard input ends")
    names = ("memory", "parallel", "LoRA", "sampling")
    groups = {name: p.add_argument_group(*GROUPS[name]) for name in names}
    add_settings(Runtime, groups)
    part_flags(p.add_argument_group(*GROUPS["parts"]))


gang_flags = worker_flags


def worker(args: argparse.Namespace) -> None:
    """Make the jobs of a queue until a signal: 0 after SIGTERM, 130 after SIGINT.

    Raises:
        RequestError: for flags that are missing.
    """
    from wanflow.serve.folder import DataFolder
    from wanflow.serve.jobs import StoreError
    from wanflow.serve.line import Gang
    from wanflow.serve.stores import open_store
    from wanflow.serve.worker import Foreman, Refused

    take_environment(args)
    if args.ckpt_dir is None and not given_parts(args):
        raise RequestError(
            f"--ckpt_dir is missing: name the folder of the weights, or nano; {CKPT_DIR} can name"
            " it, too"
        )
    if args.data_dir is None:
        raise RequestError("--data_dir is missing: name the folder of the queue and its videos")
    command = [*COMMAND, *gang_words(args)]
    try:
        store = open_store(args.db, args.data_dir)
    except StoreError as error:
        raise OSError(f"the store of jobs does not answer: {error}") from None
    foreman = Foreman(
        store, DataFolder(args.data_dir), partial(Gang, command, os.environ), args.stall_s
    )
    args.watchdog.leave()  # from now on signals ask the worker to leave
    _listen(foreman, args.with_parent)
    try:
        asked = foreman.run()
    except Refused:
        raise SystemExit(2) from None
    finally:
        store.close()
    if asked == signal.SIGINT:
        raise KeyboardInterrupt


def gang_words(args: argparse.Namespace) -> list[str]:
    """Return the command line of the gang: the worker's, with what the environment added."""
    given = iter(args.argv[1:])
    words = ["gang"]
    for word in given:
        if word == "--db":  # it may hold a password, and a gang needs no database
            next(given, None)
        elif not word.startswith("--db="):
            words.append(word)
    words += ["--data_dir", str(Path(args.data_dir).absolute())]
    for name in ("ckpt_dir", "gpus"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    return words


def _listen(foreman: Foreman, with_parent: bool) -> None:
    """Let signals, and the end of the parent, ask the worker to leave."""
    asked = list[int]()

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        foreman.leave(number)
        if len(asked) == 2:
            _end_late()

    for heard in (signal.SIGTERM, signal.SIGINT):
        signal.signal(heard, ask)
    if with_parent:

        def watch() -> None:
            while os.read(0, 1 << 16):
                pass
            foreman.leave_at_once()
            _end_late()

        threading.Thread(target=watch, name="parent", daemon=True).start()


def _end_late() -> None:
    late = threading.Timer(AT_ONCE_S, os._exit, [1])
    late.daemon = True
    late.start()


# The gang


def gang(args: argparse.Namespace) -> None:
    """Make the jobs that a worker hands over; one rank of several follows the first."""
    from wanflow.serve.folder import DataFolder
    from wanflow.serve.gang import Instructions, Maker
    from wanflow.serve.line import WHERE, connected, die_with_parent

    agent = os.environ.get(LAUNCHED)  # a rank whose agent was killed would wait for minutes
    die_with_parent(None if agent is None else int(agent))
    if WHERE not in os.environ:
        raise RequestError("wanflow gang is started by wanflow worker; start that")
    info, orders = None, None
    if world_size() > 1:
        from wanflow.parallel.orders import Orders

        info, orders = _joined(args), Orders(args.watchdog.store)
    leads = info is None or info.rank == 0
    instructions = Instructions(connected(os.environ[WHERE])) if leads else None
    maker = Maker(
        partial(_opened, args, info),
        DataFolder(args.data_dir),
        tuple(args.lora_dir or ()),
        instructions,
        orders,
        lambda save: setattr(args.watchdog, "on_abort", save),
        args.save_s,
    )
    if instructions is not None:
        if info is not None:
            args.watchdog.on_end = maker.on_end
        _tell(args, maker.pipe, instructions, info)
    maker.work()


def _joined(args: argparse.Namespace) -> DistInfo:
    from wanflow.parallel.ranks import join_group
    from wanflow.parallel.watchdog import GROUP_MARGIN_S

    info = join_group(choose_device(args.device, alone=False), args.timeout + GROUP_MARGIN_S)
    if info.rank > 0:
        logger.setLevel(logging.ERROR)
    return info


def _opened(args: argparse.Namespace, info: DistInfo | None, report: Report | None) -> Any:
    """Return the pipeline of the gang's model, with every setting decided."""
    from wanflow.assemble import assemble
    from wanflow.opening import admission, resolve, settle
    from wanflow.parallel.ranks import broadcast_from_rank0

    runtime = runtime_from(args)
    checkpoint = resolve(args.ckpt_dir, given_parts(args))
    largest = None
    if args.size is not None or args.frame_num is not None:
        largest = Request("any", size=args.size, frame_num=args.frame_num, seed=0)
    if info is None:
        settled, reasons = settle(checkpoint, runtime, largest, args.force)
        admit = None if args.force else admission(checkpoint, settled, largest)
        pipe = assemble(checkpoint, settled, report, admit=admit)
    else:
        runtime = replace(runtime, device=str(info.device))
        decide = partial(settle, checkpoint, runtime, largest, args.force, info)
        settled, reasons = broadcast_from_rank0(info, decide)
        pipe = assemble(checkpoint, settled, report, info)
        args.watchdog.progress = pipe.parts.ctx.stats.progress
    for line in (*checkpoint.notes, *reasons):
        logger.info("%s", line)
    return pipe


def _tell(
    args: argparse.Namespace, pipe: Pipeline, to: Instructions, info: DistInfo | None
) -> None:
    """Tell the worker that a job can start, and what it needs to know of this machine."""
    from wanflow.plan.start import placed
    from wanflow.serve.fitting import machine_document
    from wanflow.serve.gang import settings

    runtime = pipe.parts.runtime
    cards = () if info is None else range(info.world_size)
    _, machine = placed(runtime, args.data_dir, cards)
    named = {"size": args.size, "frame_num": args.frame_num}
    limits = {name: value for name, value in named.items() if value is not None}
    about = {
        "machine": machine_document(machine, max(1, len(cards))),
        "settings": settings(pipe),
        "limits": limits,
    }
    to.line.say(say="ready", model=pipe.spec.name, **about)
