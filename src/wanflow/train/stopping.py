"""End a training at a signal: at once where nothing is half done, else after the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wanflow.described import give_back, take_over


@dataclass
class Stop:
    """Whether somebody asked for the end; a handler of signals.

    at_once: the signal raises KeyboardInterrupt where it arrives. Otherwise who trains looks at
        `asked`, between two updates.
    """

    at_once: bool = True
    asked: bool = False

    def __call__(self, *_: object) -> None:
        self.asked = True
        if self.at_once:
            raise KeyboardInterrupt

    def here(self) -> None:
        """From here on a signal may raise; raise if one came before."""
        self.at_once = True
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handle Ctrl-C, SIGTERM and SIGHUP by a `Stop` while the block lasts.

    A signal that is ignored, as under nohup, stays ignored; threads other than the main one have
    no handlers.
    """
    stop = Stop()
    before = take_over(stop)
    try:
        yield stop
    finally:
        give_back(before)
