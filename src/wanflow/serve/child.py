"""Run the HTTP process: `python -m wanflow.serve.child`, which only the supervisor starts.

What it serves comes as a line of JSON on standard input, so that no token is on a command line. The
end of standard input is the end of the supervisor, and of this process.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanflow.config import RequestError
from wanflow.presets import EMBEDDED, ModelSpec
from wanflow.serve.fitting import Fitting
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import StoreError
from wanflow.serve.limits import Limits
from wanflow.serve.loras import registered
from wanflow.serve.planner import Planner
from wanflow.serve.service import SPECS, Service
from wanflow.serve.stores import open_store

SWITCH_S = 0.0005  # between threads: those that ask the store never keep an answer waiting
GRACE_S = 5  # for answers to end


def main() -> None:
    """Serve until the supervisor asks to leave, or is gone."""
    import uvicorn

    from wanflow.serve.http import create_app

    sys.setswitchinterval(SWITCH_S)
    setup = json.loads(sys.stdin.readline())
    logging.basicConfig(format="wanflow: %(message)s", level=logging.WARNING)
    logging.getLogger("wanflow").setLevel(logging.INFO)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        service = service_of(setup)
    except (RequestError, StoreError) as error:
        print(f"wanflow: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, RequestError) else 1) from None
    server: list[uvicorn.Server] = []
    app = create_app(
        service,
        setup["token"],
        setup["log"],
        leaving=lambda: bool(server and server[0].should_exit),
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # it would write queries
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        backlog=2048,
    )
    server.append(uvicorn.Server(config))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the supervisor decides
    server[0].run(sockets=[_socket(setup)])


def service_of(setup: Mapping[str, Any]) -> Service:
    """Return the service that a supervisor describes."""
    ckpt_dir, folder = setup["ckpt_dir"], Path(setup["data_dir"])
    planner = Planner(ckpt_dir, setup["parts"])
    return Service(
        open_store(setup["db"], folder),
        DataFolder(folder),
        Limits(**setup["limits"]),
        spec_of(ckpt_dir, planner, bool(setup["parts"])),
        registered(map(Path, setup["lora_dir"])),
        Fitting(planner),
    )


def spec_of(ckpt_dir: str | None, planner: Planner, parts: bool) -> ModelSpec | None:
    """Return the model of a folder and files; None where only the workers know.

    Raises:
        RequestError: for files that are no model.
    """
    if ckpt_dir is None and not parts:
        return None
    return SPECS[ckpt_dir if ckpt_dir in EMBEDDED else planner.model()]


def _socket(setup: Mapping[str, Any]) -> socket.socket:
    """Return the listening socket, which outlives this process in the supervisor."""
    if "fd" in setup:
        return socket.socket(fileno=setup["fd"])
    return socket.fromshare(base64.b64decode(setup["share"]))  # type: ignore[attr-defined,no-any-return,unused-ignore]


def _end_with_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
