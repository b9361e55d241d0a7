"""Damaged files of every kind end in one clear error or none: no crash, no hang, no memory for a lie. `make fuzz` tries ten times as many.

What is damaged, and how, is in tools/fuzz.py and tools/mutations.py; `python tests/tools/fuzz.py CONTAINER SEED 1` shows one again.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import fuzz

COUNT = int(os.environ.get("WANFLOW_FUZZ", "200"))
ENOUGH = 3  # failures to be told of at once


@pytest.fixture(scope="module")
def worker() -> Iterator[fuzz.Worker]:
    with fuzz.worker() as one:
        yield one


@pytest.fixture(scope="module")
def bare() -> Iterator[fuzz.Worker]:
    with fuzz.worker(bare=True) as one:
        yield one


@pytest.mark.parametrize("container", fuzz.CONTAINERS)
def test_nothing_but_one_clear_error(container: str, worker: fuzz.Worker) -> None:
    refused, faults = 0, list[str]()
    for seed in range(COUNT):
        result = worker.try_one(container, seed)
        refused += result.get("refused", 0) > 0
        if "fault" in result:
            faults.append(f"{container}, seed {seed}: {result['fault']}")
            if len(faults) == ENOUGH:
                break
    assert not faults, "\n".join(faults)
    assert COUNT / 5 < refused < COUNT  # most damage is seen, and not everything is refused


# The net itself: one with a hole in it would pass everything.


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("allocate", "allocate memory"),
        ("touch", "memory grew"),
        ("another error", "KeyError"),
        ("two lines", "the message holds"),
        ("no name", "does not name the file"),
        ("code", "code of the file was run"),
        ("crash", "Segmentation"),
        ("hang", "Timeout"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory that is only asked for is not seen")
def test_every_fault_is_seen(fault: str, told: str, bare: fuzz.Worker) -> None:
    result = bare.try_one(fault, 0, 0.5 if fault == "hang" else fuzz.SECONDS)
    assert "fault" in result
    assert re.search(told, result["fault"]), result["fault"]


def test_a_seed_is_always_the_same_file(tmp_path: Path) -> None:
    bench = fuzz.Bench(tmp_path)
    for name, container in fuzz.CONTAINERS.items():
        one, other = bench.damaged(name, 7), bench.damaged(name, 7)
        assert one == other and one[1] != bench.good[one[0]] and one[0] in dict(container.files)
