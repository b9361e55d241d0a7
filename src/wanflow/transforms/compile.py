"""Compile the blocks of an expert with torch.compile, which fuses their elementwise work.

A block is compiled in two parts, before and after its self-attention. Between them runs what does
not trace everywhere: the attention kernels, and the ranks' communication. Parameters, and the
strengths of LoRAs, are inputs of the compiled code, and the number of tokens is a symbol. So one
pair of graphs serves all blocks of both experts, streamed ones, every length and every chunk; a
batch goes through it sample by sample. Other shapes or forms of weights are other graphs: another
model, dtype or quantisation, LoRAs of another rank, a timestep for each token.

torch compiles at the first call. So it does not matter whether slots of LoRAs, packed leaves or
FSDP's hooks are attached before this or after it. FSDP's hooks stay outside of the compiled code.
"""

from __future__ import annotations

import logging
import shutil
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.models.dit import Block, Conditioning
from wanflow.out_of_memory import is_out_of_memory
from wanflow.remembered import of_device

logger = logging.getLogger("wanflow")

Graph = Callable[..., Any]
TextKV = tuple[Tensor, Tensor]
# Seconds of a first compile, before this machine has measured one (two graphs, on two CPU cores).
UNMEASURED_S = 45.0
# Graphs that one process may hold of each part. torch stops at 8, and each thread count, dtype and
# rank of a LoRA is one.
MOST_GRAPHS = 64


class Compiler:
    """Compiles the blocks of experts, and remembers what that takes.

    wanted: whether blocks run compiled now. graphs, seconds: compiled so far, and what that took.

    Args:
        device: of the experts.
        strict: whether a failure ends the run; else it goes on uncompiled, with one warning.
        folder: of what is kept between runs; None: inductor's files are where torch puts them.
        what: everything that makes another compile of it: the model's width, its dtype.
    """

    def __init__(
        self, device: torch.device, strict: bool, folder: str | Path | None, *what: object
    ) -> None:
        self.strict, self.folder, self.wanted = strict, folder, True
        self.graphs, self.seconds, self._failed = 0, 0.0, False
        self._remembered, self._key = of_device(folder, device), ("compile", *what)
        if not strict and (lacking := missing_here(device)):
            self._failed = True
            logger.info("compile auto: this machine lacks %s; blocks run uncompiled", lacking)

    def pays(self, saved: float) -> bool:
        """Return whether a compile takes less than the seconds that compiled blocks save."""
        return not self._failed and self.expected_seconds() < saved

    def expected_seconds(self) -> float:
        """Return how long the compile takes, as the last one did; else a guess."""
        found = self._remembered.get(*self._key)
        known = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if known and 0 <= found < 3600 else UNMEASURED_S

    def attach(self, model: nn.Module) -> None:
        """Let the blocks of a model run compiled while it is wanted; twice is as good as once."""
        for block in model.modules():
            if isinstance(block, Block) and "before" not in vars(block):
                block.before = partial(self._run, "before", block)  # type: ignore[method-assign]
                block.after = partial(self._run, "after", block)  # type: ignore[method-assign]
                block.forward = partial(by_sample, block)  # type: ignore[method-assign]

    def _run(self, part: str, block: Block, *inputs: Any) -> Any:
        """Run a part of a block, compiled where that is possible."""
        plain: Callable[..., Any] = getattr(Block, part)
        if not self.wanted or self._failed or inputs[0].shape[1] < 2:  # a symbol is neither 0 nor 1
            return plain(block, *inputs)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        known, began = self.graphs, time.perf_counter()
        active = ACTIVE.set(self)
        try:
            result = compiled_parts()[part](block, *of_any_length(inputs))
        except (TorchDynamoException, FailOnRecompileLimitHit) as problem:
            self._fail(problem)
            return plain(block, *inputs)
        finally:
            ACTIVE.reset(active)
        if self.graphs > known:
            self.seconds += time.perf_counter() - began
            if part == "after":
                self._finish()
        return result

    def _finish(self) -> None:
        self._remembered.put(round(self.seconds, 1), *self._key)
        kept = ", kept for the next run" if self.folder is not None else ""
        logger.info("compiled a block: %.0f s%s", self.seconds, kept)

    def _fail(self, problem: Exception) -> None:
        cause = getattr(problem, "inner_exception", problem)
        if is_out_of_memory(cause):
            raise cause
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        why = f"{type(cause).__name__}{f': {lines[0]}' if lines else ''}"
        if self.strict:
            raise RequestError(
                f"compile on: the compiler failed ({why}); --compile off runs without it"
            ) from problem
        self._failed = True
        logger.warning("compile auto: the compiler failed (%s); blocks run uncompiled", why)


ACTIVE: ContextVar[Compiler] = ContextVar("compiler")


def by_sample(block: Block, x: Tensor, conditioning: Conditioning, text: TextKV) -> Tensor:
    """Run a block for one sample after the other: torch compiles one and two as two graphs."""
    samples = [
        Block.forward(
            block,
            x[rows].contiguous(),  # the first block gets the transposed output of a convolution
            sample_of(conditioning, rows),
            (text[0][rows], text[1][rows]),
        )
        for rows in (slice(n, n + 1) for n in range(len(x)))
    ]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def sample_of(conditioning: Conditioning, rows: slice) -> Conditioning:
    """Return the conditioning of some samples, without what blocks do not read."""
    index = conditioning.index
    return replace(
        conditioning,
        time=conditioning.time[rows],
        modulation=conditioning.modulation[rows],
        index=None if index is None else index[rows],
        text=(),
    )


def of_any_length(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs whose number of tokens is a symbol, and whose strides are those of a tensor."""

    def tokens(value: Tensor) -> Tensor:
        value = value[0].unsqueeze(0)  # of a chunk, the first stride is that of all tokens
        torch._dynamo.mark_dynamic(value, 1)
        return value

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tokens(value)
        if not isinstance(value, Conditioning):
            return value
        torch._dynamo.mark_dynamic(value.rope, 0)
        return replace(value, index=None if value.index is None else tokens(value.index))

    return tuple(of(value) for value in inputs)


@cache
def compiled_parts() -> dict[str, Graph]:
    """Return both parts of a block, compiled; the same for the whole process."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    return {
        part: torch.compile(getattr(Block, part), fullgraph=True, backend=inductor)
        for part in ("before", "after")
    }


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Graph:
    """Compile a graph as torch does by default, for the compiler whose block runs."""
    from torch._inductor.compile_fx import compile_fx

    compiler = ACTIVE.get()
    if not compiler.graphs:
        logger.info("compiling a block, once for all: about %.0f s", compiler.expected_seconds())
    compiler.graphs += 1
    with keeping_files(compiler.folder):
        return cast(Graph, compile_fx(graph, inputs))


def keeping_files(folder: str | Path | None) -> AbstractContextManager[None]:
    """Let inductor keep its files in a folder, unless the user chose one (torch's variable)."""
    from torch._inductor.runtime import cache_dir_utils as folders

    chosen = folders.cache_dir() != folders.default_cache_dir()
    if folder is None or chosen or not hasattr(folders, "temporary_cache_dir"):
        return nullcontext()
    return folders.temporary_cache_dir(str(Path(folder) / "inductor"))


def refuse_compile(device: torch.device) -> None:
    """Raise RequestError for a machine that cannot compile for a device."""
    if lacking := missing_here(device):
        raise RequestError(
            f"compile on: this machine lacks {lacking}; --compile off runs without it"
        )


def missing_here(device: torch.device) -> str:
    """Return what this machine lacks to compile for a device, in words; "" where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile for the device {device.type}, which wanflow has not tried"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (Python.h; on Debian and Ubuntu: python3-dev)"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton for this GPU (pip install triton; on Windows triton-windows)"
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
            return "a C compiler (gcc or clang), which Triton calls"
        return ""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return "a C++ compiler (g++ or clang++), which torch.compile calls for a CPU"
    return ""
