"""The command line. Exit codes: 0 done, 1 failed, 2 bad request or refused, 130 interrupted."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from wanflow.cli import doctor, download, generate, plan, train, weights
from wanflow.cli.flags import Parser
from wanflow.config import RequestError

RANK_ZERO_SPEAKS = 5.0  # seconds: torchrun ends all processes when one ends, and the first to end should be the one that says why

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

    parser = Parser(prog="wanflow", description="Run Wan2.2-T2V-A14B, or its miniature nano.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"wanflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for module in (generate, download, weights, train, doctor, plan):
        module.add_to(commands)
    return parser


def main(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    quiet = int(os.environ.get("RANK", "0")) != 0
    logging.basicConfig(level=logging.WARNING, format="wanflow: %(message)s", stream=sys.stderr)
    logging.getLogger("wanflow").setLevel(logging.INFO)

    def fail(code: int, text: str) -> int:
        if quiet:
            time.sleep(RANK_ZERO_SPEAKS)
        else:
            print(f"wanflow: {text}", file=sys.stderr, flush=True)
        return code

    try:
        COMMANDS[args.command](args)
    except RequestError as error:
        return fail(2, str(error))
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except ModuleNotFoundError as error:
        return fail(1, f"{error.name} is not installed; run `make install`, or pip install wanflow")
    except BrokenPipeError:  # who read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return fail(1, str(error))
    except RuntimeError as error:
        if type(error).__name__ not in ("OutputError", "OutOfMemoryError"):
            raise
        return fail(
            1, f"{error}" if type(error).__name__ == "OutputError" else f"out of memory: {error}; try a smaller --size or fewer frames"
        )
    return 0


def entry(argv: list[str] | None = None) -> NoReturn:
    """The `wanflow` command and `generate.py`."""
    sys.exit(main(sys.argv[1:] if argv is None else argv))
