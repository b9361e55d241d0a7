"""Inputs of strangers end in success or one clear refusal: no traceback, no hang, no memory.

What they hand in, and how, is in helpers/strangers.py; `python tests/helpers/strangers.py KIND SEED
1` shows one again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from helpers import strangers
from helpers.fuzz import Worker

COUNT = int(os.environ.get("WANFLOW_FUZZ", strangers.MANY))


@pytest.fixture(scope="module")
def process() -> Iterator[Worker]:
    with strangers.process() as one:
        yield one


@pytest.mark.parametrize("kind", strangers.STRANGERS)
def test_a_few(kind: str, process: Worker) -> None:
    refused, faults = strangers.faults_of(process, kind, range(strangers.FEW))
    assert not faults, "\n".join(faults)
    assert refused > strangers.FEW / 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", strangers.STRANGERS)
def test_many(kind: str, process: Worker) -> None:
    refused, faults = strangers.faults_of(process, kind, range(strangers.FEW, COUNT))
    assert not faults, "\n".join(faults)
    assert refused > (COUNT - strangers.FEW) / 5
