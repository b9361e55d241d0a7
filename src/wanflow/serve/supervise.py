"""Keep the processes of a server alive: start them, start again what ends, end them all."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from wanflow.config import RequestError
from wanflow.described import ending
from wanflow.serve.jobs import Store, StoreError, worker_name

logger = logging.getLogger("wanflow")
LOOK_S = 0.2  # between two looks at the children
STEADY_S = 30.0  # after this time, the next start is at once again
LONGEST_S = 30.0  # between two starts
RECOVER_S = 5.0  # between two looks for workers that are gone
PORT_S = 3.0  # for a port to become free
BACKLOG = 2048  # connections that wait while the HTTP process starts again
DRAIN_S = 600.0  # for a worker to finish its step; a second signal does not wait


@dataclass
class Child:
    """A process that is started again when it ends.

    name: in messages. command: that starts it. first: what it reads first from standard input, of
    which the end is the end of its parent; it is called with the process. fds: that it inherits.
    ended: called after each end, with the number of the process.
    """

    name: str
    command: Sequence[str]
    first: Callable[[subprocess.Popen[bytes]], bytes] = lambda process: b""
    fds: Sequence[int] = ()
    ended: Callable[[int], object] = lambda process: None
    process: subprocess.Popen[bytes] | None = None
    troubles: int = field(default=0, init=False)
    began: float = field(default=0.0, init=False)
    lived: bool = field(default=False, init=False)  # one was steady: what refuses now may pass
    due: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Start the process, in a session of its own: Ctrl-C is for the supervisor."""
        options: dict[str, Any] = {}
        if os.name == "posix":
            options = {"pass_fds": tuple(self.fds), "start_new_session": True}
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, **options)
        self.began = time.monotonic()
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended: the next look says so
            self.process.stdin.write(self.first(self.process))
            self.process.stdin.flush()

    def look(self) -> None:
        """Start the process again where it has ended, later each time.

        Raises:
            RequestError: where it was refused at its first start: it would be again.
        """
        now = time.monotonic()
        if self.process is None:
            if now >= self.due:
                self.start()
            return
        code = self.process.poll()
        if code is None:
            return
        self.ended(self.process.pid)
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None
        steady = now - self.began > STEADY_S
        self.lived = self.lived or steady
        if code == 2 and not self.lived:
            raise RequestError(f"the {self.name} was refused; its words are above")
        self.troubles = 0 if steady else self.troubles + 1
        pause = min(LONGEST_S, 0.25 * 2**self.troubles)
        self.due = now + pause
        logger.warning("the %s ended (%s); starting it again", self.name, ending(code))

    def signal(self, number: int) -> None:
        """Send a signal, if the process lives."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    @property
    def lives(self) -> bool:
        """Whether the process has not ended."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End the process at once and wait for it."""
        if self.process is not None:
            with suppress(OSError):
                self.process.kill()
            self.process.wait()


class Supervisor:
    """Runs the children until a signal ends all."""

    def __init__(self, children: Sequence[Child], store: Store | None) -> None:
        self._children, self._store = children, store
        self._signals: list[int] = []

    def run(self) -> int:
        """Return the signal that ended it.

        Raises:
            RequestError: where a child was refused.
        """
        before = {
            number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)
        }
        over = threading.Event()
        recovering = threading.Thread(target=self._recover, args=(over,), daemon=True)
        recovering.start()
        try:
            while not self._signals:
                for child in self._children:
                    child.look()
                time.sleep(LOOK_S)
            self._drain()
        finally:
            over.set()
            for child in self._children:
                child.kill()
            recovering.join(RECOVER_S)
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._signals[0]

    def _hear(self, number: int, _: object) -> None:
        self._signals.append(number)

    def _drain(self) -> None:
        """Ask the children to leave, and wait; pass each further signal on."""
        passed, until = 0, time.monotonic() + DRAIN_S
        while any(child.lives for child in self._children) and time.monotonic() < until:
            if passed < len(self._signals):
                passed += 1
                if passed > 2:
                    return
                for child in self._children:
                    child.signal(signal.SIGTERM)
            time.sleep(LOOK_S / 4)

    def _recover(self, over: threading.Event) -> None:
        """Put back the jobs of workers that are gone, again and again."""
        while self._store is not None and not over.wait(RECOVER_S):
            recover(self._store)


def recover(store: Store, process: int | None = None) -> None:
    """Put back the jobs of workers that are gone; one whose process has ended is so at once."""
    try:
        if process is not None:
            for worker in store.workers():
                if worker.id.startswith(worker_name(process)):
                    store.leave(worker.id)
        for job in store.recover():
            logger.warning("job %s: %s after its worker was gone", job.id, job.state)
    except StoreError as error:
        logger.warning("%s", error)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; the HTTP process gets it, each time it starts.

    The HTTP process of a server that was killed holds the port for a moment longer.

    Raises:
        RequestError: for a host that is none, or a port that is taken.
    """
    until = time.monotonic() + PORT_S
    while True:
        try:
            return _listening(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < until:
                time.sleep(LOOK_S)
                continue
            raise RequestError(
                f"--host {host} --port {port}: {error.strerror or error}; name another, or end the"
                " program that has it"
            ) from None


def _listening(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


def python(module: str, *words: str) -> list[str]:
    """Return the command that runs a module in this Python."""
    return [sys.executable, "-m", module, *words]
