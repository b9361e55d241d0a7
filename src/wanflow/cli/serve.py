"""Run `wanflow serve`: the HTTP interface, its page and one worker, which are kept alive."""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli.flags import (
    CKPT_DIR,
    ENVIRONMENT,
    GROUPS,
    given_parts,
    part_flags,
    runtime_from,
    take_environment,
)
from wanflow.cli.parser import Parser, add_settings, file_path, number, settings_from, words_of
from wanflow.config import RequestError
from wanflow.runtime import Runtime
from wanflow.serve.limits import Limits
from wanflow.untrusted import printable

if TYPE_CHECKING:
    import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DATA_DIR = "wanflow_data"


def serve_flags(p: Parser) -> None:
    """Add the command's flags."""
    main = p.add_argument_group("server")
    main.add_argument(
        "--ckpt_dir",
        metavar="DIR",
        help=f"folder of the weights, or nano, the miniature (default: {CKPT_DIR})",
    )
    main.add_argument("--host", metavar="HOST", help="to listen on (default: 127.0.0.1)")
    main.add_argument(
        "--port", type=number(int, 0, 65535), metavar="N", help="0: any (default: 8000)"
    )
    main.add_argument(
        "--token", metavar="TEXT", help="that clients must send; better in WANFLOW_TOKEN"
    )
    main.add_argument(
        "--data_dir",
        type=file_path,
        metavar="DIR",
        help=f"jobs, videos, pictures (default: {DATA_DIR})",
    )
    more = p.add_argument_group("workers and clients")
    more.add_argument(
        "--db", metavar="URL", help="postgresql://... of a fleet (default: a file in --data_dir)"
    )
    more.add_argument("--no_worker", action="store_true", help="HTTP only; workers run elsewhere")
    more.add_argument("--gpus", metavar="0,1,...", help="of the worker")
    more.add_argument(
        "--lora_dir",
        type=file_path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders of LoRAs that clients may name",
    )
    more.add_argument("--access_log", action="store_true", help="log each request, without prompts")
    add_settings(Limits, {name: p.add_argument_group(name) for name in ("limits", "storage")})
    names = ("memory", "parallel", "LoRA", "sampling")  # of the worker
    add_settings(Runtime, {name: p.add_argument_group(*GROUPS[name]) for name in names})
    part_flags(p.add_argument_group(*GROUPS["parts"]))


def serve(args: argparse.Namespace) -> None:
    """Serve until a signal.

    Raises:
        RequestError: for settings that do not go together, and what a child was refused for.
    """
    _need_packages()
    from wanflow.serve.jobs import StoreError
    from wanflow.serve.local import LocalStore, own_folder
    from wanflow.serve.stores import open_store
    from wanflow.serve.supervise import Child, Supervisor, listen, python, recover

    limits = Limits(**settings_from(Limits, args))
    folder = _data_folder(args)
    with ExitStack() as held:
        if args.db is None:
            held.enter_context(own_folder(folder))
        listening = held.enter_context(listen(args.host, args.port))
        try:
            store = open_store(args.db, folder)
        except StoreError as error:
            raise OSError(f"the store of jobs does not answer: {error}") from None
        held.callback(store.close)
        if isinstance(store, LocalStore):
            store.recover(everything=True)
        setup = {
            "ckpt_dir": args.ckpt_dir,
            "parts": {part: str(file) for part, file in given_parts(args).items()},
            "data_dir": str(folder),
            "db": args.db,
            "token": args.token,
            "log": args.access_log,
            "lora_dir": [str(one) for one in args.lora_dir or ()],
            "limits": asdict(limits),
        }
        http = Child(
            "HTTP process", python("wanflow.serve.child"), _teller(setup, listening),
            fds=[listening.fileno()],
        )  # fmt: skip
        children = [http]
        if not args.no_worker:
            gone = partial(recover, store)
            children.append(Child("worker", worker_command(args, folder), ended=gone))
        port = listening.getsockname()[1]
        _greet(args, port)
        args.watchdog.leave()  # the supervisor handles signals
        ended = Supervisor(children, store).run()
    args.output.alert("wanflow: the server has ended")
    if ended == signal.SIGINT:
        raise KeyboardInterrupt


def environment(args: argparse.Namespace) -> None:
    """Fill in what flags leave open: from the environment, then defaults."""
    take_environment(args)
    defaults = {"host": "127.0.0.1", "port": 8000, "data_dir": Path(DATA_DIR), "token": ""}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_serve(args: argparse.Namespace) -> None:
    """Raise RequestError for settings that no server can have, or should not."""
    if not args.token and args.host not in LOOPBACK:
        raise RequestError(
            f"--host {printable(args.host)}: others could make and delete videos here; set a token"
            " that clients must send: WANFLOW_TOKEN=... or --token, or leave --host at 127.0.0.1"
        )
    if not args.token.isascii() or not args.token.isprintable() or " " in args.token:
        raise RequestError("--token must be visible ASCII characters, without a space")
    runtime_from(args)
    if args.ckpt_dir is None and not given_parts(args) and not args.no_worker:
        raise RequestError(
            "serve needs --ckpt_dir DIR, a folder of weights or nano, for its worker; --no_worker"
            " leaves the worker out"
        )


def _data_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.data_dir.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"--data_dir {printable(folder)}: {error.strerror}; name a folder that you may write"
        ) from None
    return folder


def _need_packages() -> None:
    try:
        for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
            import_module(name)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"serve needs {error.name}, which is not installed; run: pip install wanflow[serve]"
        ) from None


def _teller(
    setup: dict[str, Any], listening: socket.socket
) -> Callable[[subprocess.Popen[bytes]], bytes]:
    """Return what tells a new HTTP process what to serve, and on which socket."""

    def tell(process: subprocess.Popen[bytes]) -> bytes:
        if os.name == "posix":
            where: dict[str, Any] = {"fd": listening.fileno()}
        else:
            shared = listening.share(process.pid)  # type: ignore[attr-defined,unused-ignore]
            where = {"share": base64.b64encode(shared).decode()}
        return json.dumps({**setup, **where}).encode() + b"\n"

    return tell


def worker_command(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of the worker."""
    from wanflow.serve.supervise import python

    words = ["--with_parent", "--data_dir", str(folder)]
    for name in ("ckpt_dir", "db", "gpus"):
        value = getattr(args, name)
        # What came by the environment goes on by it: a command line shows a password to everyone.
        if value is not None and value != os.environ.get(ENVIRONMENT[name]):
            words += [f"--{name}", value]
    if args.lora_dir:
        words += ["--lora_dir", *map(str, args.lora_dir)]
    for part, file in given_parts(args).items():
        words += [f"--{part}", str(file)]
    words += words_of(Runtime, settings_from(Runtime, args))
    return python("wanflow", "worker", *words)


def _greet(args: argparse.Namespace, port: int) -> None:
    """Say where the server and its page are."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    args.output.alert(f"wanflow serves http://{host}:{port} (the page is http://{host}:{port}/)")
