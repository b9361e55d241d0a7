"""Record what a part of a check finds, on the disk as it goes; standard library only."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.untrusted import printable, read_json

logger = logging.getLogger("wanflow")

State = Literal["passed", "failed", "measured", "skipped"]
MOST_BYTES = 1 << 20  # of a part's file
TRACE = 3000  # characters of a traceback that are kept


class Skip(Exception):
    """Why something is not checked here."""


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        what: was asked.
        value: what was found, in words.
        expected: in words; "" where nothing was.
        numbers: for programs.
    """

    what: str
    state: State
    value: str
    expected: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


class Record:
    """The findings of one part; its file holds all that was found so far.

    Args:
        name: of the part.
        file: is replaced after each finding; None keeps all in memory.

    Attributes:
        about: the device, its memory, its dtype and the versions.
        small: whether the device is too small for the published sizes: running out of memory is
            no fault there.
    """

    def __init__(self, name: str, file: Path | None = None) -> None:
        self.name, self.file = name, file
        self.findings: list[Finding] = []
        self.calibration: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        self.small = False
        self.now = "the start"
        self._began = time.monotonic()

    def passed(self, what: str, right: bool, value: str, expected: str, **numbers: Any) -> None:
        """Add an answer that is right or wrong."""
        self._add(Finding(what, "passed" if right else "failed", value, expected, numbers))

    def measured(self, what: str, value: str, expected: str = "", **numbers: Any) -> None:
        """Add an answer that is neither."""
        self._add(Finding(what, "measured", value, expected, numbers))

    def skipped(self, what: str, why: str) -> None:
        """Add what is not asked here."""
        self._add(Finding(what, "skipped", why))

    def calibrate(self, **values: float | int | None) -> None:
        """Take fields of `plan.calibration.Calibration`."""
        self.calibration |= {name: value for name, value in values.items() if value is not None}
        self.save()

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turn an exception of the block into a finding: what follows is asked all the same."""
        self.now = what
        self.save()
        try:
            yield
        except Skip as why:
            self.skipped(what, str(why))
        except Exception as error:  # anything may break here, and that is the answer
            trace = traceback.format_exc()[-TRACE:]
            words = f"{type(error).__name__}: {printable(error)}"
            if self.small and type(error).__name__ == "OutOfMemoryError":
                return self.skipped(what, f"this device is too small ({words})")
            self._add(Finding(what, "failed", words, "no error", {"traceback": trace}))

    def save(self, ended: bool = False) -> None:
        """Publish what was found so far."""
        if self.file is None:
            return
        document = {
            "name": self.name,
            "ended": ended,
            "asking": self.now,
            "seconds": round(time.monotonic() - self._began, 3),
            "findings": [asdict(one) for one in self.findings],
            "calibration": self.calibration,
            "about": self.about,
        }
        write_bytes(self.file, json.dumps(document, indent=1).encode(), overwrite=True)

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        logger.info("%s: %s: %s", finding.what, finding.state, finding.value)
        self.save()


@dataclass(frozen=True)
class Found:
    """What a part's file holds; `asking`: what it was at when its process ended, "" at its end."""

    findings: list[Finding]
    calibration: dict[str, Any]
    about: dict[str, Any]
    asking: str


def read_found(file: Path) -> Found:
    """Return what a `Record` wrote; of a process that died before, nothing."""
    try:
        document = read_json(file, MOST_BYTES)
        findings = [Finding(**one) for one in document["findings"]]
        if any(one.state not in get_args(State) for one in findings):
            raise TypeError("a finding of an unknown state")
        asking = "" if document["ended"] else str(document["asking"])
        return Found(findings, dict(document["calibration"]), dict(document["about"]), asking)
    except (RequestError, KeyError, TypeError, ValueError):
        return Found([], {}, {}, "nothing yet")
