"""Run every part of a check in a process of its own, so that one failure hides nothing.

No part shares a process, a context or an error with another. This process imports no torch: it
starts parts, ends those that hang, and reads what they wrote.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanflow.bench.record import Finding, read_found
from wanflow.config import RequestError
from wanflow.untrusted import printable

SECONDS = 480.0  # of all parts together
GRACE = 5.0  # seconds that a killed process has to end; one in the driver may never
TAIL = 5  # lines of a part's log that a failure shows
MODULE = "wanflow.bench.part"


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        title: what it answers, in words.
        limit: seconds it may take, the start of Python and of CUDA included.
    """

    name: str
    title: str
    limit: float


PARTS = (
    Part("machine", "versions, memory of a context, the doctor", 30),
    Part("nano", "nano with every feature, against the CPU's latents", 80),
    Part("pinning", "pinned memory that the driver refuses", 15),
    Part("block", "one block at the published width, and its attention kernels", 65),
    Part("compiled", "rewrites with the same bits, and the compiled block", 65),
    Part("expert", "one pass of a random expert, beside the plan", 60),
    Part("streaming", "streamed blocks, and copies from RAM", 50),
    Part("vae", "a decode in every way", 50),
    Part("ffn", "the feed-forward's products in every precision", 30),
    Part("loading", "reading weights, and a clip by the command line", 35),
)
NAMES = tuple(part.name for part in PARTS)


@dataclass(frozen=True)
class Result:
    """What a part found."""

    part: Part
    findings: tuple[Finding, ...]
    seconds: float
    calibration: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(finding.state == "failed" for finding in self.findings)


def parts_named(names: Iterable[str]) -> tuple[Part, ...]:
    """Return these parts in their order; all for no names.

    Raises:
        RequestError: for an unknown name.
    """
    wanted = tuple(names) or NAMES
    for name in wanted:
        if name not in NAMES:
            raise RequestError(f"--parts {printable(name)}: expected one of {', '.join(NAMES)}")
    return tuple(part for part in PARTS if part.name in wanted)


def check(
    parts: Iterable[Part],
    folder: Path,
    device: str,
    on_part: Callable[[Part], object] = lambda _: None,
    seconds: float = SECONDS,
) -> Iterator[Result]:
    """Run parts one after the other and yield what each found.

    Args:
        parts: in their order.
        folder: gets `NAME.json` and `NAME.log` of each.
        device: where they compute.
        on_part: called before each.
        seconds: that all may take together.
    """
    ends = time.monotonic() + seconds
    for part in parts:
        on_part(part)
        yield run_part(part, folder, device, min(part.limit, ends - time.monotonic()))


def run_part(part: Part, folder: Path, device: str, limit: float) -> Result:
    """Run a part in a process of its own, and end it after `limit` seconds."""
    began = time.monotonic()
    if limit <= 0:
        late = Finding(part.title, "failed", "not started: the time of the check was spent")
        return Result(part, (late,), 0.0)
    file, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command(part, file, device, limit),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix",
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when the check is interrupted; its own processes end with it
            _end(child)
    seconds = time.monotonic() - began
    found = read_found(file)
    findings = found.findings
    if code != 0 or found.asking:
        why = f"ended after {limit:.0f} s" if code is None else _ended(code)
        last = f" while it asked: {found.asking}" if found.asking else ""
        trace = "; ".join(_tail(log))
        value = f"{why}{last}{f' ({trace})' if trace else ''}"
        what = f"the process of {part.name}"
        findings.append(Finding(what, "failed", value, "it ends by itself"))
    return Result(part, tuple(findings), seconds, found.calibration, found.about)


def command(part: Part, file: Path, device: str, limit: float) -> list[str]:
    """Return what runs a part."""
    return [sys.executable, "-m", MODULE, part.name, str(file), device, f"{limit:.3f}"]


def _ended(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def _tail(log: Path) -> list[str]:
    """Return the last lines of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return [printable(line) for line in lines if line.strip()][-TAIL:]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process with those that it started; wait for it, but not for ever."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    elif child.poll() is None:
        child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
