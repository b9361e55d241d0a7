"""Measure the anonymous memory of a process that does nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

STATUS = Path("/proc/self/status")
TESTS = Path(__file__).parents[1]
measurable = pytest.mark.skipif(
    not STATUS.exists(), reason="anonymous memory is read from Linux's /proc"
)


def anonymous() -> int:
    """Return the bytes of anonymous memory that this process has."""
    found = re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The most anonymous memory above that at the last reset; a thread looks at it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        with self.lock:  # or the thread adds a value of before the reset
            self.base, self.most = anonymous(), 0

    def look(self) -> int:
        """Return the peak in bytes, which is at least what there is now."""
        with self.lock:
            self.most = max(self.most, anonymous() - self.base)
        return self.most

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.001)


def measured(code: str, *words: object, **env: str) -> list[dict[str, Any]]:
    """Run code in a process, and return the JSON objects that it prints, one a line.

    Args:
        words: its arguments.
        env: added to its environment.
    """
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
