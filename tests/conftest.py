"""Shared by all tests: a small folder in the official layout with random weights, and the embedded
miniature.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.processes import processes as processes  # a fixture

import wanflow
from wanflow.api import Pipeline

# One thread a process, in the processes that tests start too: on a shared machine two threads that
# wait for each other at every small operation are many times slower than one, and the tests run
# side by side instead.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Tests of lines measure the width that they set, not that of the terminal they are started in.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# Servers of tests are on this machine, where a proxy of the environment finds none.
for name in ("no_proxy", "NO_PROXY"):
    there = (os.environ.get(name), "127.0.0.1", "localhost")
    os.environ[name] = ",".join(filter(None, there))

# A shell starts a background command with SIGINT ignored, and so would be the processes of tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without collections of garbage, of which imports make next to none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def settled() -> None:
    """Spare what lives by now from collections of garbage, which pipelines ask for as they swap.

    What all tests and libraries keep is a million objects, and would take a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def nano() -> Pipeline:
    """The embedded miniature, loaded once; tests must not change it."""
    return wanflow.load("nano", device="cpu")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers: tests/golden, or what WANFLOW_GOLDEN names."""
    folder = Path(os.environ.get("WANFLOW_GOLDEN", Path(__file__).parent / "golden"))
    assert folder.is_dir(), f"WANFLOW_GOLDEN: there is no folder {folder}"
    return folder
