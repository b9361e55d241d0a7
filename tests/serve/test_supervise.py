"""A supervisor bears what refuses a later start of its children."""

from __future__ import annotations

import sys

import pytest
from helpers.gangs import wait_for

from wanflow.config import RequestError
from wanflow.serve import supervise
from wanflow.serve.supervise import Child


def test_only_a_first_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [sys.executable, "-c", "raise SystemExit(2)"]
    child = Child("worker", refused)
    child.start()
    with pytest.raises(RequestError, match="the worker was refused"):
        wait_for(lambda: child.look())

    monkeypatch.setattr(supervise, "STEADY_S", -1.0)  # it counts as one that had lived
    child = Child("worker", refused)
    child.start()
    wait_for(lambda: child.look() or child.process is None)
    assert child.due
