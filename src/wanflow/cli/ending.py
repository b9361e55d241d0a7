"""How a process without other ranks ends: well, by a failure, or by Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from wanflow.cli.output import Output
from wanflow.described import give_back, take_over

INTERRUPTED = 130
# From a signal to the end of the process where the main thread does not get there: one operation on
# a CPU may take minutes, and Python handles a signal only after it.
STUCK_S = 3.0
UNWINDING_S = 7.0  # where it has heard the signal, and still waits for a file or a thread
AGAIN_S = 0.5  # launchers pass a signal on that the process has got already
SHOW_CURSOR = "\x1b[?25h"


class Alone:
    """How a process without other ranks ends; several have a `Watchdog` with the same methods.

    on_abort: called once before a bad end; returns whether a state of the run is on the disk.
    ending: whether a signal, or a failure, has been noticed.
    cause: of another rank's failure; there is none.
    """

    def __init__(self, output: Output | None = None, rank: int = 0) -> None:
        self.output, self.rank = output or Output(), rank
        self.on_abort: Callable[[], object] | None = None
        self.ending, self.cause = False, ""
        self.timeout_s = 0.0
        self._nothing = ""  # the words for a run without a state
        self._handlers: dict[int, Any] = {}  # of before
        self._failed = threading.Event()
        self._saving = threading.Lock()
        self._wakeup: socket.socket | None = None
        self._signals: socket.socket | None = None

    def hear(self) -> None:
        """Let the first signal interrupt the main thread; one that is ignored stays ignored."""
        self._handlers = take_over(self._interrupt)

    def start(self) -> None:
        """Do nothing: there is no other rank to wait for."""

    def watch(self, nothing: str) -> None:
        """End the process within seconds of a signal from now on, and at once at a second Ctrl-C.

        Args:
            nothing: what to say where there is no state of a run.
        """
        self._nothing = nothing
        if not self._handlers:
            return
        self._wakeup, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(self._wakeup,), name="signals", daemon=True
        ).start()

    def fail(self, code: int, cause: str, sure: bool = True) -> int:
        """Save the state of the run, print the cause and return the exit code."""
        self._failed.set()
        kept = self.save()
        if code == INTERRUPTED and self._nothing and not kept:
            cause = f"{cause}: {self._nothing}"
        with suppress(OSError):  # a terminal may be gone
            if self.rank == 0:
                self.output.error(cause)
            self.output.conclude(code, cause)
        self.leave()
        return code

    def save(self) -> bool:
        """Call `on_abort`, once; return whether a state of the run is on the disk."""
        with self._saving:
            on_abort, self.on_abort = self.on_abort, None
            try:
                return on_abort is not None and on_abort() is True
            except (OSError, RuntimeError) as error:
                with suppress(OSError):
                    self.output.alert(f"the state of the run could not be saved: {error}")
                return False

    def leave(self) -> None:
        """End well: handle signals as before."""
        give_back(self._handlers)
        self._handlers = {}
        if self._wakeup is not None and self._signals is not None:
            signal.set_wakeup_fd(-1)
            self._signals.close()  # which ends the thread
            self._signals = None

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not self.ending:
            self.ending = True
            raise KeyboardInterrupt

    # The watching thread's side

    def _watch(self, wakeup: socket.socket) -> None:
        """Wait for a signal, then for the main thread to end the process; else end it here."""
        began: float | None = None
        with wakeup:
            while True:
                heard, _, _ = select.select([wakeup], [], [], None if began is None else 0.1)
                numbers = wakeup.recv(64) if heard else b""
                if heard and not numbers:
                    return  # the main thread has left
                if began is None:
                    began = time.monotonic() if set(numbers) & set(self._handlers) else None
                    continue
                passed = time.monotonic() - began
                if signal.SIGINT in numbers and passed > AGAIN_S:
                    self._end("interrupted twice: ended at once")
                limit_s = UNWINDING_S if self.ending else STUCK_S
                if passed > limit_s and not self._failed.is_set():
                    kept = self.save()
                    self._end("interrupted" if kept else f"interrupted: {self._nothing}")

    def _end(self, cause: str) -> NoReturn:
        try:
            if sys.stderr.isatty():
                sys.stderr.write(SHOW_CURSOR)  # which bars of progress hide
            self.output.error(cause)
            self.output.conclude(INTERRUPTED, cause)
        finally:
            os._exit(INTERRUPTED)


def exit_with(code: int) -> NoReturn:
    """Exit, and do not wait for threads that still read weights after an interruption."""
    if code == INTERRUPTED:
        late = threading.Timer(STUCK_S, os._exit, [code])
        late.daemon = True
        late.start()
    sys.exit(code)
