"""Compile without a compiler: torch traces as always, and the graphs run as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo import config
from torch._inductor import compile_fx


@contextmanager
def traced(make: Callable[..., Any] = lambda graph, inputs: graph.forward) -> Iterator[None]:
    """Put another function in place of inductor, and forget what was compiled, before and after."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", make)
        yield
    torch._dynamo.reset()


@contextmanager
def no_recompile() -> Iterator[None]:
    """Fail where torch compiles a function for the second time."""
    with config.patch(error_on_recompile=True):
        yield
