"""Ranks of one machine read each weight once, and hold one copy of what waits in RAM.

Real processes speak gloo; one set of them does all that is looked at.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.features import packed
from helpers.memory import measurable
from helpers.processes import CPU, Processes, played
from torch import Tensor

from wanflow.checkpoint import containers, gguf, load
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.reading import share_out
from wanflow.config import RequestError
from wanflow.loaders.parts import open_expert
from wanflow.loaders.placement import Changes, Placement
from wanflow.loaders.streamed import Prefetcher
from wanflow.opening import resolve
from wanflow.parallel import machine, ranks
from wanflow.parallel.groups import Layout, make_groups
from wanflow.runtime import Runtime
from wanflow.transforms.block_streaming import Streaming

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loading.py"
SIZES = [2, pytest.param(4, marks=(pytest.mark.slow, pytest.mark.crowded))]
STREAMED = Runtime(resident_blocks=2, stream_from="ram")
pytestmark = pytest.mark.distributed


def doubled(name: str, weight: Tensor) -> Tensor:
    return weight * 2 + 0.01


# A large tensor, a small one, and one outside the blocks: as a fused LoRA changes them.
FUSED: Changes = dict.fromkeys(
    ("blocks.1.ffn.0.weight", "blocks.3.modulation", "text_embedding.0.weight"), doubled
)
WAYS: dict[str, tuple[str, Runtime, Changes | None]] = {
    "plain": ("nano", Runtime(), None),
    "fused": ("nano", Runtime(), FUSED),
    "fp8": ("nano", Runtime(quantize="fp8", quantize_layers="all"), None),
    "nf4": ("nano", Runtime(quantize="nf4", quantize_layers="all"), FUSED),
    "packed fp8": ("fp8", Runtime(), FUSED),
    "gguf": ("gguf-q8_0", Runtime(), None),
    "streamed": ("nano", STREAMED, None),
    "streamed and fused": ("nano", STREAMED, FUSED),
    "streamed int8": ("nano", replace(STREAMED, quantize="int8"), None),
    "streamed gguf": ("gguf-q8_0", STREAMED, FUSED),
    "streamed from disk": ("nano", replace(STREAMED, stream_from="disk"), None),
}


def ways(size: int) -> list[str]:
    """Those for a number of ranks: two leave out packed files, which take long to make."""
    return [name for name, (model, _, _) in WAYS.items() if size > 2 or model == "nano"]


def checkpoint(model: str) -> Checkpoint:
    return resolve("nano" if model == "nano" else packed("nano", model))


def sample(model: Any, config: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 9, config.text_dim, generator=generator)
    out: Tensor = model(latent, torch.tensor([300.0]), text)
    return out


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the bytes that this process reads from files of weights."""
    read, lock, fill = [0], threading.Lock(), containers.fill

    def counting(part: Tensor, file: Any, path: Path) -> None:
        with lock:
            read[0] += part.nbytes
        fill(part, file, path)

    containers.fill = gguf.fill = counting
    try:
        yield read
    finally:
        containers.fill = gguf.fill = fill


def loaded(name: str, ctx: Any) -> tuple[Any, int, Any]:
    model, runtime, changes = WAYS[name]
    files = checkpoint(model)
    with counted() as read:
        expert = open_expert(
            files, "low", Placement(torch.float32, CPU, runtime, ctx), None, changes
        )
    return expert, read[0], files.spec.dit


def bits(expert: Any) -> dict[str, Tensor]:
    """The bytes of the parameters that hold values now."""
    return {
        name: value.detach().reshape(-1).view(torch.uint8).clone()
        for name, value in expert.named_parameters()
        if value.is_contiguous() and not value.is_meta
    }


def on_a_machine(info: ranks.DistInfo) -> dict[str, Any]:
    """Every way of loading, with what it read; and what shared memory does."""
    ctx = make_groups(Layout(ulysses=info.world_size), info)
    found: dict[str, Any] = {}
    for name in ways(info.world_size):
        expert, read, config = loaded(name, ctx)
        found[name] = {"bits": bits(expert), "out": sample(expert, config), "read": read}
        if isinstance(expert, Streaming):
            expert.close()
    return found | {
        "prefetched": prefetched(ctx),
        "memory": on_shared_memory(ctx),
        "refused": where_it_is_refused(ctx),
        "failure": where_one_cannot_read(ctx),
    }


def prefetched(ctx: Any) -> list[Tensor]:
    files, outs = checkpoint("nano"), []
    for runtime in (Runtime(), STREAMED):
        ahead = Prefetcher(files, "low", Placement(torch.float32, CPU, runtime, ctx), FUSED, ())
        outs.append(sample(ahead.take(), files.spec.dit))
    Prefetcher(files, "low", Placement(torch.float32, CPU, Runtime(), ctx), None, ()).drop()
    return outs


def mapped() -> int:
    """How many maps of our shared memory this process has."""
    return len(re.findall("memfd:wanflow", Path("/proc/self/maps").read_text()))


def on_shared_memory(ctx: Any) -> dict[str, int]:
    """What the others see of a change, and what is left at the end."""
    where = Placement(torch.float32, CPU, STREAMED, ctx)
    expert: Any = open_expert(checkpoint("nano"), "low", where)
    found = {"maps": mapped()}
    bias = expert.model.head.head.bias
    before = float(bias[0])
    bias[0] = before + 1 + ctx.info.rank  # a LoRA changes what is not streamed, in each process
    ctx.world.all_gather("test", torch.zeros(1))
    found["seen"] = round(float(bias[0]) - before)
    block = expert._host_buffers[3]
    if ctx.info.rank == 0:
        block[5] = 77
    ctx.world.all_gather("test", torch.zeros(1))
    found["shared"] = int(block[5])
    expert.close()
    del expert, bias, block
    files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if alive(n)]
    return found | {"left": mapped() + sum("memfd:wanflow" in name for name in files)}


def alive(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")  # that of listing them is gone


def where_it_is_refused(ctx: Any) -> dict[str, Any]:
    """The system has no memory files on one rank: each holds its own copy, and the same weights."""
    kept, machine._memory_files = machine._memory_files, lambda sizes: []
    try:
        expert, _, config = loaded("streamed", ctx)
        return {"out": sample(expert, config), "maps": mapped()}
    finally:
        machine._memory_files = kept


def where_one_cannot_read(ctx: Any) -> list[str]:
    """The last rank's disk fails: all say so, loading and streaming."""
    words, kept = [], load.materialize_param

    def broken(*args: Any) -> Any:
        if ctx.info.rank == ctx.layout.size - 1:
            raise RequestError("the disk is gone")
        return kept(*args)

    for name in ("plain", "streamed int8"):
        from wanflow.loaders import streamed

        load.materialize_param = streamed.materialize_param = broken
        try:
            loaded(name, ctx)
        except RequestError as error:
            words.append(str(error))
        finally:
            load.materialize_param = streamed.materialize_param = kept
    return words


@pytest.mark.parametrize("size", SIZES)
def test_ranks_read_a_file_once_and_hold_the_same(size: int, processes: Processes) -> None:
    results = processes(on_a_machine, size)
    for name in ways(size):
        expert, read, config = loaded(name, None)
        expected, out = bits(expert), sample(expert, config)
        for found in results:
            assert torch.equal(found[name]["out"], out), name
            for key, value in found[name]["bits"].items():
                assert torch.equal(value, expected[key]), (name, key)
        if name == "streamed from disk":
            continue
        assert sum(found[name]["read"] for found in results) == read, name
        assert max(found[name]["read"] for found in results) < 1.4 * read / size, name


@pytest.mark.parametrize("size", SIZES)
def test_what_waits_in_ram_is_held_once(size: int, processes: Processes) -> None:
    """Blocks are shared, changes by a LoRA are not, and nothing is left behind."""
    layers = checkpoint("nano").spec.dit.num_layers
    for rank, found in enumerate(processes(on_a_machine, size)):
        memory = found["memory"]
        assert memory["maps"] >= layers
        assert memory["seen"] == 1 + rank and memory["shared"] == 77
        assert memory["left"] == 0


@pytest.mark.parametrize("size", SIZES)
def test_a_prefetched_expert_is_shared_too(size: int, processes: Processes) -> None:
    for runtime, *outs in zip(
        (Runtime(), STREAMED),
        *(found["prefetched"] for found in processes(on_a_machine, size)),
        strict=True,
    ):
        where = Placement(torch.float32, CPU, runtime)
        files = checkpoint("nano")
        expected = sample(open_expert(files, "low", where, None, FUSED), files.spec.dit)
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("size", SIZES)
def test_without_shared_memory_each_holds_its_own(size: int, processes: Processes) -> None:
    for found in processes(on_a_machine, size):
        assert found["refused"]["maps"] == 0
        assert torch.equal(found["refused"]["out"], found["streamed"]["out"])


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_end_where_one_cannot_read(size: int, processes: Processes) -> None:
    *others, last = (found["failure"] for found in processes(on_a_machine, size))
    assert last == ["the disk is gone"] * 2
    for words in others:
        assert re.search(f"rank {size - 1} cannot read it", words[0])
        assert re.search(f"rank {size - 1} of this machine failed", words[1])


@pytest.mark.slow
@pytest.mark.crowded
@measurable
def test_four_that_stream_take_the_memory_of_one() -> None:
    """Five blocks of full width; each page by the number of processes that map it."""
    command = [str(BENCHMARK), "--only", "memory", "--ram_layers", "5", "--ranks", "1", "4"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["ranks"]
    one, four = found["streamed, 1"], found["streamed, 4"]
    assert one["memory_gb"] > 7
    assert four["memory_gb"] <= 1.15 * one["memory_gb"]
    assert four["files_read"] < 1.01


def test_shares_are_even() -> None:
    sizes = {"a": 7, "b": 3, "c": 3, "d": 1, "e": 5}
    assert share_out(sizes, 2) == {"a": 0, "b": 1, "c": 1, "d": 1, "e": 0}
    assert set(share_out(sizes, 1).values()) == {0}


def test_ranks_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with one machine, process namespace and user form a group."""
    asked: list[list[int]] = []

    class Handle:
        pass

    def new_group(ranks: list[int]) -> Handle:
        asked.append(ranks)
        return Handle()

    monkeypatch.setattr(machine.dist, "new_group", new_group)
    monkeypatch.setattr(machine, "Group", lambda stats, handle=None: (handle,))
    with played(1, 4) as info:
        ctx = make_groups(Layout(ulysses=4), info)
        own = torch.tensor(machine.identity())
        other = own + 1
        for places, expected, several in (
            ([own, own, own, own], [], False),
            ([own, own, other, other], [[0, 1], [2, 3]], True),
            ([other, own, other, other], [[0, 2, 3], [1]], False),
        ):
            asked.clear()
            monkeypatch.setattr(ctx.world, "all_gather", lambda *_, found=places: found)
            ctx.machine = None
            group: Any = machine.machine_group(ctx)
            assert asked == expected
            assert (group is ctx.world) == (not expected)
            if expected:
                assert (group[0] is not None) == several
            assert machine.machine_group(ctx) is group  # found once
