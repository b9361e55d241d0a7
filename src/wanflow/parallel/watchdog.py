"""Heartbeats of a run's ranks: all end when one fails, and one message names the rank and cause.

Each rank runs a heartbeat thread that polls a shared store every 0.5 s. The thread finds a failure
that a rank announced, a rank without a heartbeat, and a rank that is late to a collective. The
first failure in the store is the run's. Every rank then saves its state and exits with its code.
The elastic agent (`parallel.agent`, or torchrun) does the rest: it notices a rank that exits,
interrupts the others, and kills what does not end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from wanflow.described import IGNORED, SIGNALS
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

HEARTBEAT_S = 0.5
HEARTBEAT_TIMEOUT_S = 30.0  # a large library may hold the threads of a rank back for seconds
NEWS_S = 5.0  # how long a rank that sees an effect (SIGTERM, a broken connection) awaits the cause
GRACE_S = 3.0  # for the main thread to come out of its work, and again for saving the state
# Torch's own timeout is no judge: NCCL counts from when the host gives work to the GPU, perhaps a
# step before it begins, and ends a rank without a message.
GROUP_MARGIN_S = 86_400.0
LEFT, SILENT = "left", "no heartbeat: killed, out of memory, or frozen"


class Failure(NamedTuple):
    """The exit code of all ranks, and the message."""

    code: int
    message: str


INTERRUPTED = Failure(130, "interrupted")


def report(message: str) -> None:
    """Print a failure."""
    print(f"wanflow: {message}", file=sys.stderr, flush=True)


def announce(store: Store, failure: Failure, by: int, say: Callable[[str], None] = report) -> None:
    """Make it the run's failure and print it, unless there is one."""
    value = json.dumps([*failure, by])
    if store.compare_set("failure", "", value) == value.encode():
        say(failure.message)


def announced(store: Store) -> Failure | None:
    """Return the run's failure, if there is one."""
    return Failure(*json.loads(store.get("failure"))[:2]) if store.check(["failure"]) else None


class Watchdog:
    """The heartbeat of this rank, and how the rank ends.

    Args:
        store: shared by all ranks.
        rank, world_size: of the run.
        rank0_hosts: whether rank 0 holds the store, rather than an elastic agent.
        join_s: how long every rank may take to join.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        rank0_hosts: bool = False,
        join_s: float = 60.0,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.join_s = join_s
        self.command: list[str] = []  # of this rank; that of every rank must be the same
        self._agreed = threading.Event()  # the command of rank 0 is this rank's
        if rank == 0:
            self._agreed.set()
        self._host = 0 if rank0_hosts else None
        self.timeout_s = 600.0  # how late a rank may be to a collective
        # How far this rank is, and whether its GPU has more work that others wait for.
        self.progress: Callable[[], tuple[int, bool]] = lambda: (0, False)
        # Called once before the rank exits with a failure, perhaps from another thread.
        self.on_abort: Callable[[], object] | None = None
        self.say: Callable[[str], None] = report  # prints the run's failure
        # Called with the run's exit code and message before the rank exits with a failure.
        self.on_end: Callable[[int, str], None] = lambda code, message: None
        self.ending = False  # from now on no signal interrupts the main thread
        self._leaving = False
        self._failure: Failure | None = None  # the run's
        self._reported = threading.Event()
        self._own: Failure | None = None  # this rank's
        self._sure = False  # that it is not an effect of another rank's
        self._effect_at: float | None = None  # when an effect was seen first
        self._saving = threading.Lock()
        self._clock, self._looked = 0.0, time.monotonic()
        self._beats = [("", 0.0)] * world_size  # the last of each rank, and when it changed
        self._far: tuple[dict[int, int], float] = {}, 0.0  # by rank, and when it changed
        self._at_work: list[int] = []  # the ranks whose GPUs have more work
        self._wakeup, self._signals = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def cause(self) -> str:
        """The message of the run's failure; empty as long as there is none."""
        return "" if self._failure is None else self._failure.message

    # The main thread's side

    def start(self) -> None:
        """Begin the heartbeat, and wait for the command of rank 0.

        From now on SIGINT, SIGTERM, SIGHUP, and the run's first failure interrupt the main thread,
        once.
        """
        self._signals.setblocking(False)
        for number in SIGNALS:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) not in IGNORED:
                signal.signal(number, self._interrupt)
        # The thread hears signals, too: the main thread may be stuck in a call.
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        self.agree()  # before anything begins that a refusal would have to undo

    def agree(self) -> None:
        """Wait until rank 0 has stored its command, if it is this one; else be interrupted."""
        self._agreed.wait()

    def fail(self, code: int, cause: str, sure: bool = True) -> NoReturn:
        """End this rank, and with it the run, with a failure.

        A refusal by rank 0 (code 2) is taken for every rank's, so other ranks wait for it.

        Args:
            code: the exit code, should this be the run's first failure.
            cause: what to print.
            sure: that it is not the end of another rank.
        """
        self.ending = True
        if code == INTERRUPTED.code or (code == 2 and self.rank == 0):
            own = Failure(code, cause)
        else:
            own, sure = self._blame(self.rank, cause, code), sure and code != 2
        self._own, self._sure = self._own or own, self._sure or sure
        if not self._sure and code != INTERRUPTED.code:
            self._reported.wait(NEWS_S)  # the cause in another rank decides how the run goes on
        self.save()
        self._reported.wait(HEARTBEAT_TIMEOUT_S)
        self._exit()

    def leave(self) -> None:
        """End well. The rank that hosts the store leaves last."""
        self.ending = self._leaving = True
        if self._thread.is_alive():
            self._thread.join()

    def save(self) -> None:
        """Call `on_abort`, once."""
        with self._saving:
            on_abort, self.on_abort = self.on_abort, None
            try:
                if on_abort is not None:
                    on_abort()
            except (OSError, RuntimeError) as error:
                print(f"the state of the run could not be saved: {error}", file=sys.stderr)

    def _interrupt(self, *_: object) -> None:
        if not self.ending:
            self.ending = True
            raise KeyboardInterrupt

    def _exit(self) -> NoReturn:
        """Exit at once: destructors and other threads may wait for ranks that are gone."""
        code = 1 if self._failure is None else self._failure.code
        threading.Timer(GRACE_S, os._exit, [code]).start()  # a hung GPU returns no tensors
        self.save()
        with suppress(RuntimeError):
            while not self._turn(LEFT):
                time.sleep(HEARTBEAT_S)
        self.on_end(code, self.cause)
        sys.stdout.flush()
        os._exit(code)

    # The heartbeat thread's side

    def _run(self) -> None:
        try:
            self._failure = self._watch()
        except RuntimeError:  # the store is gone
            self._failure = None if self._leaving else self._store_lost()
        if self._failure is None:
            return
        self._reported.set()
        if not self.ending:
            signal.raise_signal(signal.SIGINT)
        time.sleep(GRACE_S)
        self._exit()

    def _watch(self) -> Failure | None:
        """Look for the run's failure, and announce what this rank finds, until it leaves."""
        if self.rank == 0:
            self.store.set("command", json.dumps(self.command))
        while not (self._turn() and self._leaving):
            found = announced(self.store) or self._other_command() or self._judge()
            if found is not None:
                announce(self.store, found, self.rank, self.say)
                return announced(self.store)
            self._listen()
        self._turn(LEFT)
        return None

    def _store_lost(self) -> Failure:
        """Return whose end took the store along; the lowest rank that is left prints it."""
        failure = Failure(1, "the process that started the ranks is gone")
        if self._host == 0:
            failure = self._blame(0, SILENT)
        if self.rank == (1 if self._host == 0 else 0):
            self.say(failure.message)
        return failure

    def _listen(self) -> None:
        """Wait until the next heartbeat, or a signal."""
        heard, _, _ = select.select([self._wakeup], [], [], HEARTBEAT_S)
        signals = self._wakeup.recv(64) if heard else b""
        unsure = self._own is not None and not self._sure
        if any(number in signals for number in SIGNALS[1:]) or (
            unsure and self._beats[0][0]
        ):  # rank 0 has started
            self._effect_at = self._effect_at or time.monotonic()
        elif signal.SIGINT in signals and self._effect_at is None:
            self._own, self._sure = self._own or INTERRUPTED, True

    def _turn(self, beat: str = "") -> bool:
        """Leave a heartbeat and read the others'; return whether this rank may leave."""
        now = time.monotonic()
        # A rank that was stopped itself, as by Ctrl-Z, has not waited for the others meanwhile.
        self._clock, self._looked = self._clock + min(now - self._looked, 2 * HEARTBEAT_S), now
        far, more = self.progress()
        self.store.set(f"beat/{self.rank}", beat or f"{self._clock} {far} {int(more)}")
        for rank, (before, _) in enumerate(self._beats):
            key = f"beat/{rank}"
            found = self.store.get(key).decode() if self.store.check([key]) else ""
            if found != before:
                self._beats[rank] = found, self._clock
        beats = {rank: found.split() for rank, (found, _) in enumerate(self._beats) if " " in found}
        self._at_work = [rank for rank, found in beats.items() if found[2:] == ["1"]]
        marks = {rank: int(found[1]) for rank, found in beats.items()}
        if marks != self._far[0]:
            self._far = marks, self._clock
        return self.rank != self._host or all(found == LEFT for found, _ in self._beats[1:])

    def _other_command(self) -> Failure | None:
        """Return a refusal if rank 0 was given another command."""
        if self._agreed.is_set() or not self.store.check(["command"]):
            return None
        first = json.loads(self.store.get("command"))
        if self.command == first:
            self._agreed.set()
            return None
        mine, other = next(
            pair for pair in zip_longest(self.command, first, fillvalue="") if pair[0] != pair[1]
        )
        here, there = (printable(word or "nothing", 60) for word in (mine, other))
        return self._blame(
            self.rank,
            f"its command has {here} where that of rank 0 has {there}; give every rank the same",
            2,
        )

    def _judge(self) -> Failure | None:
        """Return the failure that this rank sees, if any."""
        if self._own is not None and self._sure:
            return self._own
        effect = self._effect_at is not None
        if self._effect_at is not None and time.monotonic() - self._effect_at < NEWS_S:
            return None
        if effect and self._own is not None and self._own.code == 2:
            return self._own
        for rank, (beat, changed) in enumerate(self._beats):
            limit_s = HEARTBEAT_TIMEOUT_S if beat else self.join_s
            if beat != LEFT and self._clock - changed > (NEWS_S - 1 if effect else limit_s):
                missing = f"has not joined within {self.join_s:g} s (--timeout waits longer)"
                return self._blame(rank, SILENT if beat else missing)
        if effect:
            return self._own or INTERRUPTED
        far, changed = self._far
        if self._clock - changed <= self.timeout_s:
            return None
        last, late = min(far, key=lambda rank: far[rank]), f"{self.timeout_s:g} s (--timeout)"
        if far[last] < max(far.values()):
            return self._blame(last, f"late to a collective by {late}")
        if self._at_work:  # all wait in one collective, or on the same way to it
            return self._blame(self._at_work[0], f"its GPU, as all others, stands still for {late}")
        return None

    def _blame(self, rank: int, cause: str, code: int = 1) -> Failure:
        return Failure(code, f"rank {rank} of {self.world_size}: {cause}")
