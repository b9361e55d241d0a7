"""How a run on several processes ends when one fails: all learn of it, all end in a stated time,
and one says who failed and why.

Each process has a thread that meets the others' in a store every half second, whatever the main
thread is stuck in. It leaves a sign of life there, and looks for a failure that somebody announced,
for processes that leave no signs any more, and for one that the others wait for. The first failure
that is announced is the run's; who announced it says it. Then every main thread is asked to come
out of its work, and after a while the process is ended from here.

Nothing of this needs torch: the store is given (`mesh.meet`), and alone (no store) only the last
will and the message are left.
"""

from __future__ import annotations

import _thread
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

EVERY = 0.5  # seconds between two signs of life
# without a sign for so long a process is gone; a large library may hold a process' threads back for
# seconds
LOST = 30.0
# so long a process may take until its first sign of life, however short --timeout is: libraries are
# read from slow disks
START = 60.0
# the same, where a broken connection or torchrun's signal shows that something has happened already
SUSPECT = 4.0
# how long the others may take to refuse a request, too, before it is called one process' own
AGREE = 2.0
# after a failure became known all work is interrupted; what has not come out by then is ended,
# after its last will
GRACE = 6.0
WILL = 3.0  # how long that may take: a GPU that hangs does not give its tensors back
# so long after the watch would have ended a run do torch's own limits hold; NCCL's end a process
# without a word
LATER = 30.0
# from what fails to the end of all processes; where nothing shows it, LOST or the run's timeout
# comes before that
ALL_END = 15.0


class Store(Protocol):
    """What is asked of a store of torch's; each call raises RuntimeError when the store is gone."""

    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True)
class Failure:
    """Which process failed (None: no process in particular), the exit code of all, and why, in
    words.
    """

    rank: int | None
    code: int
    text: str

    def line(self, size: int) -> str:
        return self.text if self.rank is None else f"process {self.rank} of {size}: {self.text}"


INTERRUPTED = Failure(None, 130, "interrupted")


def announce(store: Store, failure: Failure, by: int) -> bool:
    """Make it the run's failure, unless there is one; whether it is now, and so is for this process
    (`by`) to say.
    """
    value = json.dumps([failure.rank, failure.code, failure.text, by])
    return store.compare_set("failure", "", value) == value.encode()


def announced(store: Store) -> Failure | None:
    """The run's failure, if there is one."""
    return Failure(*json.loads(store.get("failure"))[:3]) if store.check(["failure"]) else None


def say(text: str) -> None:
    """One message on standard error."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Peer:
    """What is known of a process: its last sign of life, how long ago it changed, and the same for
    its collectives. Seconds.
    """

    sign: str = ""
    silent: float = 0.0
    entered: int = -1
    still: float = 0.0

    @property
    def left(self) -> bool:
        return self.sign == "left"

    def look(self, sign: str, passed: float) -> None:
        entered = int(sign.split()[1]) if " " in sign else self.entered
        self.silent = 0.0 if sign != self.sign else self.silent + passed
        self.still = 0.0 if entered != self.entered else self.still + passed
        self.sign, self.entered = sign, entered


class Watchdog:
    """This process among the others of its run, as long as the run lasts.

    Args:
        store: where the processes meet; None for a process that is alone.
        rank, size: this process' number, and how many there are.
        hosts: whether process 0 holds the store, rather than what started the processes.

    Set while it runs:
        timeout_s: a process that does not enter a collective for so long while others wait for it
            ends the run, in seconds.
        progress: says how many collectives this process has entered; without it nobody can tell who
            is waited for.
        last_will: what to do before the process ends by a failure, once; it may be called from
            another thread.
    """

    def __init__(
        self, store: Store | None = None, rank: int = 0, size: int = 1, hosts: bool = False
    ) -> None:
        self.store, self.rank, self.size, self.hosts = store, rank, size, hosts
        self.timeout_s = 600.0
        self.progress: Callable[[], int] | None = None
        self.last_will: Callable[[], None] | None = None
        self.failure: Failure | None = None  # the run's, once it is known
        self._peers = [Peer() for _ in range(size)]
        self._own: Failure | None = None  # what this process' main thread ended with
        self._trace = ""
        self._sure = self._mine = self._said = self._spoke = self._held = self._nudged = (
            self._interrupted
        ) = self._lost = False
        self._out = False  # the main thread waits to leave
        self._gone = threading.Event()  # and may
        self._doubt: float | None = None  # since when something has looked wrong
        self._since = 0.0  # when the failure became known
        self._looked, self._count = time.monotonic(), 0
        self._ears, self._bell = socket.socketpair()

    # --- the main thread's side
    # -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch. Ctrl-C and SIGTERM interrupt the main thread once, and the others with
        it.
        """
        if self.store is None:
            return
        self._bell.setblocking(False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)
        signal.set_wakeup_fd(
            self._bell.fileno(), warn_on_full_buffer=False
        )  # heard although the main thread is stuck
        threading.Thread(target=self._work, name="watch", daemon=True).start()

    def fail(self, code: int, text: str, sure: bool = True, trace: str = "") -> int:
        """End with a failure: the last will, and the one message, here or elsewhere. Of several
        processes none returns from this.

        Args:
            code: the exit code, should this be the first failure of the run.
            text: what went wrong, in words.
            sure: that the cause lies here. What the end of another process can cause, too, waits
                for news of it first.
            trace: is shown before the message by the process that speaks.
        """
        self.hold()
        if self.store is None:
            self.keep()
            if self.rank == 0:
                say(f"{trace}wanflow: {text}")
            return code
        self._trace, self._sure = trace, sure
        self._own = INTERRUPTED if code == INTERRUPTED.code else Failure(self.rank, code, text)
        self._ring()
        self.keep()
        self._out = True
        if not self._gone.wait(LOST + ALL_END):
            self._orphaned()  # the store neither answers nor breaks
        self._exit()

    def leave(self) -> None:
        """End well: the others no longer expect a sign of life. Whoever holds the store leaves
        last.
        """
        self._held = self._out = True
        if self.store is not None:
            self._ring()
            self._gone.wait(None if self.hosts and self.rank == 0 else ALL_END)

    def hold(self) -> None:
        """From now on no signal interrupts the main thread: torchrun's, or a second Ctrl-C, must
        not break what it does at the end.
        """
        self._held = True

    def _signalled(self, *_: object) -> None:
        if not self._held:
            self._held = True
            raise KeyboardInterrupt

    def keep(self) -> None:
        """Do the last will, once."""
        will, self.last_will = self.last_will, None
        if will is not None:
            try:
                will()
            except (OSError, RuntimeError) as error:
                say(f"the state of the run could not be saved: {error}")

    def _exit(self) -> NoReturn:
        """End now: destructors and other threads may wait for processes that are no more."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self.failure.code if self.failure else 1)

    def _ring(self) -> None:
        self._bell.send(b"\0")

    # --- the thread's side
    # ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        assert self.store is not None
        while not self._gone.is_set():
            try:
                if not self._lost:
                    self._turn(self.store)
            except RuntimeError:  # no answer: who holds the store is gone
                self._orphaned()
            if self._lost and self._out:
                self._gone.set()
            if self.failure is not None and not self._out:
                self._end()
            if not self._gone.is_set():
                self._listen()

    def _turn(self, store: Store) -> None:
        self._meet(store)
        self._tell(store)
        if self.failure is None:
            self._judge(store)
        if self._mine and not self._spoke:
            self._speak(store)
        if self._out and self._may_leave():
            self._part()
            self._gone.set()

    def _part(self) -> None:
        """The last sign of life."""
        try:
            if self.store is not None and not self._lost:
                self.store.set(f"sign/{self.rank}", "left")
        except RuntimeError:
            self._lost = True

    def _listen(self) -> None:
        """Wait for the next turn, or for a signal."""
        heard, _, _ = select.select(
            [self._ears], [], [], EVERY if self.failure is None else EVERY / 5
        )
        for number in self._ears.recv(64) if heard else b"":
            if (
                number == signal.SIGTERM and not self._interrupted
            ):  # torchrun's, for another's end; or somebody's
                self._doubt = self._doubt or time.monotonic()
            self._interrupted |= number == signal.SIGINT and self._doubt is None
        if self._own is not None and not self._sure:
            self._doubt = self._doubt or time.monotonic()

    def _meet(self, store: Store) -> None:
        """Leave a sign of life, and look at the others'."""
        self._count += 1
        try:
            entered = self.progress() if self.progress is not None else -1
        except RuntimeError:  # the main thread changed what is summed up
            entered = self._peers[self.rank].entered
        store.set(f"sign/{self.rank}", f"{self._count} {entered}")
        now = time.monotonic()
        # A process that was stopped for a while, as by Ctrl-Z, has not waited for the others
        # meanwhile.
        passed, self._looked = min(now - self._looked, 2 * EVERY), now
        there = [
            rank
            for rank in range(self.size)
            if self._peers[rank].sign or store.check([f"sign/{rank}"])
        ]
        signs = dict(zip(there, store.multi_get([f"sign/{rank}" for rank in there]), strict=True))
        for rank, peer in enumerate(self._peers):
            peer.look(signs.get(rank, b"").decode(), passed)

    def _judge(self, store: Store) -> None:
        """Take note of the run's failure, or announce one."""
        failure = announced(store)
        found = self._found() if failure is None else None
        if found is not None:
            self._mine = announce(store, found, self.rank)
            failure = found if self._mine else announced(store)
        if failure is not None:
            self.failure, self._since = failure, time.monotonic()

    def _found(self) -> Failure | None:
        """What this process knows to be wrong."""
        if self._own is not None and self._sure:
            return self._own
        if self._interrupted:
            return INTERRUPTED
        limit = LOST if self._doubt is None else SUSPECT
        for rank, peer in enumerate(self._peers):
            if peer.sign and not peer.left and peer.silent > limit:
                why = (
                    f"no sign of life for {LOST:g} s: "
                    if self._doubt is None
                    else "gone without a word: "
                )
                return Failure(
                    rank,
                    1,
                    f"{why}killed, out of memory{', or frozen' if self._doubt is None else ''}",
                )
            if not peer.sign and peer.silent > max(self.timeout_s, START):
                return Failure(rank, 1, f"has not started within {max(self.timeout_s, START):g} s")
        at_work = [
            (peer.entered, rank)
            for rank, peer in enumerate(self._peers)
            if peer.sign and not peer.left
        ]
        if (
            min(self._peers[rank].still for _, rank in at_work) > self.timeout_s
            and min(at_work)[0] < max(at_work)[0]
        ):
            return Failure(
                min(at_work)[1],
                1,
                f"did not join the others, who waited for {self.timeout_s:g} s (--timeout)",
            )
        if self._doubt is not None and time.monotonic() - self._doubt > SUSPECT + 3 * EVERY:
            absent = [rank for rank, peer in enumerate(self._peers) if not peer.sign]
            return (
                Failure(absent[0], 1, "ended before it began")
                if absent
                else self._own or INTERRUPTED
            )
        return None

    def _tell(self, store: Store) -> None:
        """Leave this process' own words where the one that speaks can compare them."""
        if self._own is not None and self._sure and not self._said:
            self._said = True
            store.set(f"said/{self.rank}", self._own.text)

    def _speak(self, store: Store) -> None:
        """Say the failure, once it is clear whether all processes fail alike."""
        assert self.failure is not None
        keys, line = [f"said/{rank}" for rank in range(self.size)], self.failure.line(self.size)
        if self._said and self._common():
            said = set(store.multi_get(keys)) if store.check(keys) else set()
            if not said and time.monotonic() - self._since < AGREE:
                return
            line = self.failure.text if len(said) == 1 else line
        self._spoke = True
        say(f"{self._trace if self.failure == self._own else ''}wanflow: {line}")

    def _common(self) -> bool:
        """Whether the failure is of a kind that all processes come upon, each by itself: a bad
        request.
        """
        return self.failure is not None and self.failure.code == 2

    def _may_leave(self) -> bool:
        if self._own is not None and self.failure is None:
            return False
        if self._mine and not self._spoke:
            return False
        if not self.hosts or self.rank != 0:
            return True
        over = self.failure is not None and time.monotonic() - self._since > GRACE + WILL
        return over or all(
            peer.left or (self.failure and peer.silent > SUSPECT) for peer in self._peers[1:]
        )

    def _end(self) -> None:
        """A failure is known, and the main thread is still at work: first it is asked to stop, then
        it is not asked.
        """
        passed = time.monotonic() - self._since
        if not self._nudged and passed >= (AGREE if self._common() else 0):
            self._nudged = True
            _thread.interrupt_main()
        if passed > GRACE:
            keeper = threading.Thread(target=self.keep, daemon=True)
            keeper.start()
            keeper.join(WILL)
            self._part()
            self._exit()

    def _orphaned(self) -> None:
        """The store is gone, and who held it: process 0, or what started all. The lowest that is
        left says so.
        """
        self._lost = True
        if self.failure is None:
            text = (
                "gone without a word: killed, out of memory"
                if self.hosts
                else "what started the processes of this run is gone"
            )
            self.failure, self._since = (
                Failure(0 if self.hosts else None, 1, text),
                time.monotonic(),
            )
            self._mine = self.rank == (1 if self.hosts else 0)
        if self._mine and not self._spoke:
            self._spoke = True
            say(f"wanflow: {self.failure.line(self.size)}")
