"""Read what a launcher left this process: its rank, of how many, and the signals that it hears."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wanflow.config import RequestError
from wanflow.untrusted import printable

MOST_RANKS = 65_536
# That ask a process to end; Windows has no SIGHUP.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
IGNORED = (signal.SIG_IGN, None)  # as nohup does; None is a handler that is not of Python


@dataclass(frozen=True)
class Described:
    """This process among the ranks; alone where nothing is described.

    local_rank, local_world_size: among those of this machine; None where that is not described.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None


def described(environment: Mapping[str, str]) -> Described:
    """Return what an environment says.

    Raises:
        RequestError: for a value that is no number in its range, or that contradicts another.
    """
    world_size = _number(environment, "WORLD_SIZE", 1, MOST_RANKS)
    rank = _number(environment, "RANK", 0, MOST_RANKS)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1, MOST_RANKS)
    local_rank = _number(environment, "LOCAL_RANK", 0, MOST_RANKS)
    _number(environment, "MASTER_PORT", 1, 65_535)
    found = Described(rank or 0, world_size or 1, local_rank, local_size)
    for name, value, size_name, size in (
        ("RANK", found.rank, "WORLD_SIZE", found.world_size),
        ("LOCAL_RANK", local_rank or 0, "LOCAL_WORLD_SIZE", local_size or found.world_size),
        ("LOCAL_WORLD_SIZE", (local_size or 1) - 1, "WORLD_SIZE", found.world_size),
    ):
        if value >= size:
            raise RequestError(
                f"{name} is {environment[name]}, and {size_name} is {size}: they contradict each"
                " other; start the ranks with torchrun or --gpus, or unset both"
            )
    return found


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,9}", text.strip()) or not low <= int(text) <= high:
        raise RequestError(
            f"{name} is {printable(text, 40)!r} in the environment; expected a whole number from"
            f" {low:,} to {high:,} (unset {name})"
        )
    return int(text)


def take_over(handler: Any) -> dict[int, Any]:
    """Handle `SIGNALS` by a handler; return those of before, for `give_back`.

    A signal that is ignored stays ignored. Threads other than the main one have no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) not in IGNORED]
    return {number: signal.signal(number, handler) for number in heard}


def give_back(handlers: Mapping[int, Any]) -> None:
    """Handle signals as before; a handler that is not of Python becomes the system's."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ending(code: int) -> str:
    """Return how a process ended, in words; `code` is as of `subprocess`, below 0 for a signal."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
