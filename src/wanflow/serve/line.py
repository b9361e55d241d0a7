"""Connect a worker with its gang: JSON over a local connection that only these two can open.

Nothing is pickled. The end of the connection is how each side learns that the other is gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from wanflow.described import ending
from wanflow.files import remove
from wanflow.serve.jobs import process_runs

WHERE = "WANFLOW_GANG"  # the environment variable that tells the gang where its worker listens
LONGEST = 16 << 20  # bytes of a message
FOLDER = "wanflow-gang-"  # in TMPDIR, while a gang starts
LEFT_S = 3600.0  # a folder so old, of no process here, is that of a worker which was killed
JOIN_S = 20.0  # for the ranks to let go of the connection after the agent is gone

Message = Mapping[str, Any]


class Line:
    """One end of a connection; any thread may say something."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, Lock()

    def say(self, **message: Any) -> None:
        """Send a message; one to a side that is gone is lost."""
        with self._lock, suppress(OSError):
            self._connection.send_bytes(json.dumps(message).encode())

    def hear(self, take: Callable[[Message], object]) -> None:
        """Hand each message on, until the other side is gone."""
        with suppress(EOFError, OSError):
            while True:
                take(json.loads(self._connection.recv_bytes(LONGEST)))

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


def connected(text: str) -> Line:
    """Return the gang's end, to the worker that the value of `WHERE` names."""
    where = json.loads(text)
    address = where["address"]
    place = tuple(address) if isinstance(address, list) else address
    return Line(Client(place, authkey=bytes.fromhex(where["key"])))


class Gang:
    """A gang as its worker sees it: a process, and the connection to its rank 0.

    Args:
        command: that starts it.
        environment: of the process, which gets `WHERE` besides.
        take: is called from threads with each message. The last one is `{"say": "ended"}`, with the
            exit code.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], take: Callable[[Message], object]
    ) -> None:
        self._take, self._key = take, secrets.token_bytes(32)
        self._folder = _made()
        self._listener = _listening(self._folder, self._key)
        self._line: Line | None = None
        self._address = self._listener.address
        where = {"address": self._address, "key": self._key.hex()}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is the worker's
            env={**environment, WHERE: json.dumps(where)},
            start_new_session=True,  # Ctrl-C in a terminal is for the worker
        )
        self._hearing = Thread(target=self._hear, name="gang-line", daemon=True)
        self._hearing.start()
        Thread(target=self._watch, name="gang-process", daemon=True).start()

    @property
    def pid(self) -> int:
        """The number of the process, which is the agent of several ranks."""
        return self._process.pid

    def say(self, **message: Any) -> None:
        """Send a message to rank 0."""
        if self._line is not None:
            self._line.say(**message)

    def kill(self) -> None:
        """End the gang at once; its ranks end with it."""
        with suppress(OSError):
            self._process.kill()

    def _hear(self) -> None:
        while self._line is None and self._process.poll() is None:
            with suppress(OSError, EOFError, AuthenticationError):  # it was a stranger
                self._line = Line(self._listener.accept())
        if self._line is not None:  # else the gang ended before it connected
            self._shut()  # nobody else connects; and if this process dies, nothing is left
            self._line.hear(self._take)

    def _watch(self) -> None:
        code = self._process.wait()
        try:
            self._wake()
            self._hearing.join(JOIN_S)
            if self._line is not None:
                self._line.close()
            self._shut()
        finally:  # a worker that does not hear of it would wait for ever
            self._take({"say": "ended", "code": code})

    def _shut(self) -> None:
        self._listener.close()
        if self._folder is not None:
            remove(self._folder)

    def _wake(self) -> None:
        """Let a thread go on that waits for a connection."""
        address = self._address
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as one:
            one.connect(address)


def _made() -> Path | None:
    """Return a new folder for this user alone; None where nothing can be written in TMPDIR."""
    with suppress(OSError):  # a container with a read-only disk, or a full one
        remove_left()
        return Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
    return None


def _listening(folder: Path | None, key: bytes) -> Listener:
    """Return a socket in a folder; on loopback, where there is none or the system takes none."""
    if folder is not None and hasattr(socket, "AF_UNIX"):
        with suppress(OSError):  # the path has more than 107 bytes, or the disk has no sockets
            return Listener(str(folder / "gang"), authkey=key)
    return Listener(("127.0.0.1", 0), authkey=key)


def remove_left() -> None:
    """Delete the folders of workers that were killed while their gang started."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        number = folder.name.removeprefix(FOLDER).partition("-")[0]
        with suppress(OSError):  # a clock that jumps makes each folder old
            old = time.time() - folder.lstat().st_mtime > LEFT_S
            if old and not process_runs(number):
                remove(folder)


def die_with_parent(parent: int | None = None) -> None:
    """Let Linux end this process with its parent; one that is frozen notices nothing itself.

    Args:
        parent: its process number, where the parent may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def gang_ending(code: int) -> str:
    """Return how the gang ended, in words."""
    return f"the gang {'was' if code < 0 else 'ended with'} {ending(code)}"
