"""The command line. Exit codes: 0 done, 1 failed, 2 bad request or refused, 130 interrupted."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from wanflow.cli import doctor, download, generate, launch, plan, train, weights
from wanflow.cli.flags import Parser
from wanflow.config import RequestError
from wanflow.parallel.watchdog import Watchdog

COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "generate": generate.generate,
    "replay": generate.replay,
    "decode": generate.decode,
    "train": train.train,
    "download": download.download,
    "inspect": weights.inspect,
    "convert": weights.convert,
    "doctor": doctor.doctor,
    "plan": plan.plan,
}


def build_parser() -> Parser:
    """Every command and its flags."""
    from wanflow import __version__

    parser = Parser(
        prog="wanflow",
        description="Run Wan2.2-T2V-A14B, or its miniature nano.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wanflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for module in (generate, download, weights, train, doctor, plan):
        module.add_to(commands)
    return parser


def main(argv: list[str]) -> int:
    """Run one command and return its exit code. One of several processes that fails does not
    return: see `Watch.fail`.
    """
    rank, several = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) > 1
    logging.basicConfig(level=logging.WARNING, format="wanflow: %(message)s", stream=sys.stderr)
    logging.getLogger("wanflow").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    watch = Watchdog(rank=rank)
    try:
        if several:
            watch = _among_others()
        args = build_parser().parse_args(argv)
        args.watch = watch
        watch.timeout_s = getattr(args, "timeout", watch.timeout_s)
        if (
            getattr(args, "gpus", None) is not None
            and args.command != "plan"
            and (processes := launch.prepare(args))
        ):
            return launch.launch(argv, processes)
        COMMANDS[args.command](args)
    except SystemExit:  # --help
        watch.leave()
        raise
    except BrokenPipeError:  # who read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:
        watch.hold()  # before the words are looked for, which reads files
        code, text = _words(error)
        if text is not None:
            return watch.fail(code, text, sure=code != 130)
        if watch.store is None:
            watch.keep()
            raise
        # The end of another process breaks collectives, which is a RuntimeError here; any other is
        # this one's own.
        trace = "".join(traceback.format_exception(error))
        return watch.fail(
            code, f"{type(error).__name__}: {error}", not isinstance(error, RuntimeError), trace
        )
    watch.leave()
    return 0


def _among_others() -> Watchdog:
    """The watch of one of several processes, begun: before anything that can fail in one of
    them.
    """
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # torch prints the stack where a store breaks; we say it in words
    from wanflow.parallel.ranks import connect_store

    watch = connect_store()
    watch.start()
    return watch


def _words(error: BaseException) -> tuple[int, str | None]:
    """Exit code and message for what ends a command; no message for what nobody expected."""
    if isinstance(error, RequestError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return 1, f"{error.name} is not installed; run `make install`, or pip install wanflow"
    if isinstance(error, OSError) or type(error).__name__ == "OutputError":
        return 1, str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return 1, f"out of memory: {error}; try a smaller --size or fewer frames"
    return 1, None


def entry(argv: list[str] | None = None) -> NoReturn:
    """The `wanflow` command and `generate.py`."""
    sys.exit(main(sys.argv[1:] if argv is None else argv))
