"""Compile blocks in a test, by inductor or (in no time) by running torch's graphs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from wanflow.models.dit import Block
from wanflow.transforms.compile import Compiler

Make = Callable[..., Any]


def as_it_is(graph: torch.fx.GraphModule, inputs: object) -> Any:
    return graph.forward


@contextmanager
def without_inductor(make: Make = as_it_is) -> Iterator[None]:
    """Put another function in place of inductor, which takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", make)
        yield


@contextmanager
def traced(make: Make = as_it_is) -> Iterator[None]:
    """Compile without inductor, and forget what was compiled, before and after."""
    torch._dynamo.reset()
    with without_inductor(make):
        yield
    torch._dynamo.reset()


@contextmanager
def no_recompile() -> Iterator[None]:
    """Fail where torch compiles a function for the second time."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@contextmanager
def compiled(*models: nn.Module) -> Iterator[Compiler]:
    """Let the blocks of models run compiled by inductor while the block lasts."""
    torch._dynamo.reset()
    compiler = Compiler(torch.device("cpu"), True, None, "test")
    blocks = [block for one in models for block in one.modules() if isinstance(block, Block)]
    for model in models:
        compiler.attach(model)
    try:
        with torch.no_grad():
            yield compiler
    finally:
        for block in blocks:
            for name in ("before", "after", "forward"):
                delattr(block, name)
