"""Run one command. Exit codes: 0 done, 1 failed, 2 bad request or refused, 130 interrupted."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from wanflow.cli.ending import INTERRUPTED, Alone, exit_with
from wanflow.cli.output import Lasting, Output, output_flags
from wanflow.config import RequestError
from wanflow.described import described
from wanflow.outputs import Claims

if TYPE_CHECKING:
    from wanflow.cli.parser import Parser
    from wanflow.parallel.watchdog import Watchdog


@dataclass(frozen=True)
class Command:
    """A command, without importing it.

    module: has `NAME_flags(parser)` and `NAME(args)`.
    page: whether it prints a page on standard output, not the path of what it made.
    brief: whether `--help` names most flags only, and `--help-all` explains them.
    """

    module: str
    help: str
    example: str
    brief: bool = False
    page: bool = False


COMMANDS = {
    "generate": Command(
        "generate",
        "make a video from a prompt, or from a picture and a prompt",
        'wanflow generate --ckpt_dir nano --prompt "a red circle moves left"',
        brief=True,
    ),
    "replay": Command(
        "generate", "make a video again from the recipe in it", "wanflow replay out.mp4"
    ),
    "decode": Command(
        "generate", "finish a run from its saved latent", "wanflow decode out.latent.safetensors"
    ),
    "serve": Command(
        "serve",
        "make videos by HTTP: an API that clients know, a page, and a worker",
        "wanflow serve --ckpt_dir nano",
        brief=True,
    ),
    "download": Command(
        "download",
        "get the weights: resumable, parallel, verified",
        "wanflow download --local_dir T2V_A14B_weights",
        page=True,
    ),
    "inspect": Command(
        "inspect",
        "show what a model, weights, a LoRA, a video or a saved run holds",
        "wanflow inspect T2V_A14B_weights",
        page=True,
    ),
    "convert": Command(
        "convert",
        "write weights in another layout or precision",
        "wanflow convert T2V_A14B_weights T2V_A14B_fp8 --to fp8",
    ),
    "train": Command(
        "train",
        "fine-tune on clips, train nano, or evaluate a model",
        "wanflow train --data clips --ckpt_dir nano --out my_lora",
        brief=True,
    ),
    "doctor": Command(
        "doctor", "examine this machine and suggest settings", "wanflow doctor", page=True
    ),
    "plan": Command(
        "plan",
        "estimate memory, disk and time on this or another machine",
        "wanflow plan --gpu rtx4090 --size 832*480",
        brief=True,
        page=True,
    ),
    "bench": Command(
        "bench",
        "measure the stages of a run, or check what a GPU must answer first",
        "wanflow bench --check --out findings",
        brief=True,
        page=True,
    ),
    "worker": Command(
        "worker",
        "make the videos of a server's queue on this machine",
        "wanflow worker --ckpt_dir nano --data_dir videos",
        brief=True,
    ),
    "completion": Command(
        "completion",
        "print a script for a shell to complete commands",
        'eval "$(wanflow completion bash)"',
        page=True,
    ),
}
# That other commands start, and no user.
HIDDEN = {"gang": Command("worker", "make the jobs of a worker", "wanflow gang --ckpt_dir nano")}
ALL = {**COMMANDS, **HIDDEN}
NOT_HERE = ("plan", "serve", "worker")  # whose --gpus are for no ranks of this command


def build_parser() -> Parser:
    """Return a parser of every command, which imports them all."""
    from wanflow import __version__
    from wanflow.cli.parser import Parser

    parser = Parser(prog="wanflow", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"wanflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in COMMANDS:
        _add_flags(name, commands.add_parser(name, help=COMMANDS[name].help, **_texts(name)))
    return parser


def command_parser(name: str) -> Parser:
    """Return the parser of one command, which imports that command only."""
    from wanflow.cli.parser import Parser

    # The official program takes the beginning of a flag's name: scripts may rely on it.
    parser = Parser(prog=f"wanflow {name}", allow_abbrev=name == "generate", **_texts(name))
    parser.set_defaults(command=name)
    _add_flags(name, parser)
    return parser


DESCRIPTION = "Run Wan2.2 (T2V-A14B, I2V-A14B, TI2V-5B), or its miniatures nano and nano-i2v."


def _texts(name: str) -> dict[str, Any]:
    command = ALL[name]
    description = f"{command.help[0].upper()}{command.help[1:]}."
    return {"description": description, "example": command.example, "brief": command.brief}


def _module(name: str) -> Any:
    return import_module(f"wanflow.cli.{ALL[name].module}")


def _add_flags(name: str, parser: Parser) -> None:
    getattr(_module(name), f"{name}_flags")(parser)
    output_flags(parser)


def overview() -> str:
    """Return every command in a line, with an example of each."""
    lines = [DESCRIPTION, "wanflow COMMAND --help explains a command.", ""]
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        lines += [f"{name:<{width}} {command.help}", f"{'':<{width}}   {command.example}"]
    return "\n".join(lines)


def _parse(argv: list[str]) -> Any:
    """Return the arguments of a command; None after printing the overview.

    Raises:
        RequestError: for an unknown command or flag.
    """
    name = argv[0] if argv else ""
    if name in ALL:
        words = argv[1:]
        if name in HIDDEN or not COMMANDS[name].brief:  # its --help explains every flag
            words = ["--help" if word == "--help-all" else word for word in words]
        return _read(command_parser(name), words)
    if name in ("-h", "--help", "--help-all", "help"):
        print(overview())
        raise SystemExit(0)
    if name == "--version":
        from wanflow import __version__

        print(f"wanflow {__version__}")
        raise SystemExit(0)
    if not name:
        print(overview())
        raise SystemExit(2)
    from wanflow.cli.parser import did_you_mean, short

    raise RequestError(
        f"unknown command {short(name)}{did_you_mean(name, COMMANDS)} (wanflow --help lists the"
        " commands)"
    )


def _read(parser: Parser, words: list[str]) -> Any:
    """Return the arguments that the words give, then those of files and the environment."""
    args = parser.parse_args(words)
    files = getattr(args, "config", None) or getattr(args, "recipe", None)
    if files or "WANFLOW_CKPT_DIR" in os.environ:
        from wanflow.cli.base import fill_in

        fill_in(args, parser, words, {name: partial(command_parser, name) for name in COMMANDS})
    return args


NO_STATE = "no step was complete, so there is nothing to save"


def _nothing(args: Any) -> str:
    """Return what to say where a command is interrupted and no state of a run is stored."""
    source = getattr(args, "resume", None) or getattr(args, "latent", None)
    if source:
        return f"{source} is as it was"
    if not _module(args.command).asks_for_several(args):
        return NO_STATE
    from wanflow.cli.keeping import again

    return f"no step was complete since the last video; go on with: {again(args)}"


def _command(args: Any) -> Callable[[Any], None]:
    """Return what carries out a command; several videos have a path of their own."""
    module = _module(args.command)
    if args.command == "generate" and module.asks_for_several(args):
        module = import_module("wanflow.cli.batch")
    found: Callable[[Any], None] = getattr(module, args.command)
    return found


def main(argv: list[str]) -> int:
    """Run one command and return its exit code. One rank of several that fails does not return."""
    for name in ("COLUMNS", "LINES"):  # a terminal's, which libraries read as they are
        if not re.fullmatch("[1-9][0-9]{0,3}", os.environ.get(name, "80")):
            del os.environ[name]
    with Claims() as claims:  # until the state of an aborted run is saved
        return _run(argv, claims)


def _run(argv: list[str], claims: Claims) -> int:
    output = Output.of(argv)
    alone = Alone(output)
    alone.hear()
    watchdog: Watchdog | Alone = alone
    try:
        ranks = described(os.environ)
        output.begin(ranks.rank)
        _check_folder()
        if ranks.world_size > 1:
            watchdog = _join_watchdog(argv, output, alone) or alone
            watchdog.start()
        args = _parse(argv)
        output.take(args)
        from wanflow.cli import checks

        args.watchdog, args.claims, args.output = watchdog, claims, output
        args.argv = argv
        watchdog.on_abort = claims.close
        if watchdog is alone and args.command in ("generate", "replay", "decode"):
            alone.watch(_nothing(args))
        checks.check(args)
        watchdog.timeout_s = getattr(args, "timeout", watchdog.timeout_s)
        if getattr(args, "gpus", None) is not None and args.command not in NOT_HERE:
            from wanflow.cli import devices, launch

            started = devices.parse_gpus(args)
            if started is not None:
                watchdog.leave()  # the agent handles signals
                return launch.launch(argv, started, output)
        with output.guarded(ALL[args.command].page):
            _command(args)(args)
        output.conclude()
    except SystemExit:  # --help
        watchdog.leave()
        raise
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:
        # What a library makes of a KeyboardInterrupt is one all the same.
        code, text = _words(KeyboardInterrupt() if alone.ending else error)
        watchdog.ending = True
        if text is None and isinstance(watchdog, Alone):
            watchdog.save()
            watchdog.leave()
            output.conclude(code, f"{type(error).__name__}: {error}")
            raise
        # The end of another rank breaks a collective, which is a RuntimeError here.
        sure = code != INTERRUPTED and (text is not None or not isinstance(error, RuntimeError))
        trace = "".join(traceback.format_exception(error)).rstrip()
        return watchdog.fail(code, text or f"{type(error).__name__}: {error}\n{trace}", sure)
    watchdog.leave()
    return 0


def _check_folder() -> None:
    """Raise RequestError in a folder that is gone, where torch's libraries end the process."""
    try:
        os.getcwd()
    except OSError:
        raise RequestError(
            "the folder that this command was started in was deleted; go to another, as in: cd ~"
        ) from None


def _join_watchdog(argv: list[str], output: Output, alone: Alone) -> Watchdog | None:
    """Return the heartbeat of one rank of several, before anything can fail in one of them."""
    from wanflow import __version__

    # torch prints the stack where a store breaks; the watchdog prints one message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # NCCL would abort a rank whose peer is gone; the watchdog saves the state first.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # A second watch of NCCL's kills a rank whose GPU does not answer for 8 minutes.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    from wanflow.cli.devices import LAUNCHED
    from wanflow.parallel.ranks import connect_store

    agent = os.environ.get(LAUNCHED)
    if agent is not None and os.getppid() != int(agent):
        os._exit(1)  # it was killed: its store would be awaited for minutes
    given = _given_timeout(argv)
    watchdog = connect_store(*([] if given is None else [given]))
    alone.rank = described(os.environ).rank  # from now on others may speak
    if watchdog is not None:
        alone.leave()  # the watchdog handles signals
        watchdog.command = [f"wanflow {__version__}", *argv]
        watchdog.say, watchdog.on_end = output.error, output.conclude
    return watchdog


def _given_timeout(argv: list[str]) -> float | None:
    """Return the value of `--timeout`, if it is valid: ranks join before they parse the rest."""
    joined = re.search(r"(?:^|\0)--timeout[=\0]([0-9.]+)(?:\0|$)", "\0".join(argv))
    try:
        return min(float(joined[1]), 1e6) or None if joined else None
    except ValueError:
        return None


def _words(error: BaseException) -> tuple[int, str | None]:
    """Return the exit code and message of what ended a command; no message for a fault of ours."""
    if isinstance(error, RequestError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return 1, f"{error.name} is not installed; run `make install`, or pip install wanflow"
    from wanflow import out_of_memory

    if out_of_memory.is_out_of_memory(error):
        return 1, out_of_memory.words(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError) or kinds & {"OutputError", "StoreError"}:
        return 1, str(error)
    return 1, None


def open_streams() -> None:
    """Give standard streams that are closed a place, and letters that one lacks an escape.

    A run outlives the reader, the terminal or the disk of its standard error.

    Python's `print` takes standard output where standard error is closed, and a file that is opened
    then would take its number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, Lasting(sys.stderr))


def grow_segments() -> None:
    """Let PyTorch's CUDA allocator grow its segments, so that it loses less memory to gaps.

    torch reads this when it is imported. Only CUDA on Linux has it, and what the user says stays.
    """
    asked = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)
    if sys.platform == "linux" and not asked and not os.path.exists("/dev/kfd"):  # of AMD
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def entry(argv: list[str] | None = None) -> NoReturn:
    """Run the `wanflow` command, or `generate.py`."""
    open_streams()
    # Threads that wait for each other spin, which costs a busy machine many times their work. The
    # library of threads reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    grow_segments()
    argv = sys.argv[1:] if argv is None else argv
    logging.captureWarnings(not {"--json", "--quiet"}.isdisjoint(argv))  # they become log lines
    exit_with(main(argv))
