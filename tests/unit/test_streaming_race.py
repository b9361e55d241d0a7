"""Streaming's slots and events on two asynchronous streams: copies and work of random length.

A thread stands for each stream. It does what it is given in order and late, as a GPU does.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanflow.config import DiTConfig
from wanflow.models.dit import WanDiT
from wanflow.transforms import block_streaming
from wanflow.transforms.block_streaming import BlockBuffers, Streaming

CONFIG = DiTConfig(
    dim=16, ffn_dim=32, freq_dim=16, in_dim=16, out_dim=16, num_heads=2, num_layers=7, text_len=4
)


class Stream:
    """Work in order, each piece after a while."""

    def __init__(self) -> None:
        self.work: queue.Queue[Callable[[], object]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.work.get()()
            self.work.task_done()


class Event(threading.Event):
    """The moment when a stream has come to it."""

    synchronize = threading.Event.wait


class Copies:
    """A `CopyStream` of two simulated streams; `broken` names the wait that is left out."""

    def __init__(self, late: Callable[[], None], broken: str) -> None:
        self.late, self.broken = late, broken
        self.copying, self.computing = Stream(), Stream()
        self.stream = SimpleNamespace(synchronize=self.copying.work.join)
        self.after: list[Any] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Event:
        done, half = Event(), len(target) // 2
        self.after.append(after)

        def work() -> None:
            if after is not None and self.broken != "copies wait for work":
                after.wait()
            for part in (slice(half), slice(half, None)):
                self.late()
                target[part].copy_(source[part])
            done.set()

        self.copying.work.put(work)
        return done

    def wait(self, event: Event | None) -> None:
        if event is not None and self.broken != "work waits for copies":
            self.computing.work.put(event.wait)

    def mark(self) -> Event:
        done = Event()
        self.computing.work.put(done.set)
        return done


def violations(seed: int, home: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks computed with weights of another, in four passes; one may be abandoned."""
    chance = random.Random(seed)

    def late() -> None:
        if chance.random() < 0.7:
            time.sleep(chance.random() * 0.002)

    copies = Copies(late, broken)
    monkeypatch.setattr(block_streaming, "CopyStream", lambda device: copies)
    model = WanDiT(CONFIG).requires_grad_(False)
    layers = [BlockBuffers(block).layout for block in model.blocks]

    def fetch(index: int, views: Any) -> None:
        late()
        for view in views.values():
            view.fill_(float(index + 1))

    buffers = {}
    for index, layout in enumerate(layers):
        buffers[index] = torch.empty(layout.nbytes, dtype=torch.uint8)
        fetch(index, layout.views(buffers[index]))
    resident = set(chance.sample(range(7), chance.randrange(0, 6)))
    from_disk = home == "disk"
    stream = Streaming(model, fetch, resident, torch.device("cpu"), None if from_disk else buffers)
    if broken == "files wait for copies":
        monkeypatch.setattr(Event, "synchronize", lambda event: None)
    if from_disk:  # through a host buffer, as on a GPU
        for slot in stream._free:
            slot.staging = torch.empty(len(slot.buffer), dtype=torch.uint8)
    found: list[int] = []
    for number in range(4):
        for index, block in enumerate(stream.stream()):
            weights = [block.ffn[0].weight, block.self_attn.q.weight, block.cross_attn.o.weight]

            def compute(weights: list[torch.Tensor] = weights, value: int = index + 1) -> None:
                late()
                if not all(bool((weight == value).all()) for weight in weights):
                    found.append(value)
                late()

            copies.computing.work.put(compute)
            if number == 2 and chance.random() < 0.1:
                break
    copies.computing.work.join()
    stream.close()
    return len(found)


@pytest.mark.parametrize("home", ["ram", "disk"])
def test_no_block_sees_weights_of_another(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert sum(violations(seed, home, "", patch) for seed in range(6)) == 0


@pytest.mark.parametrize(
    ("home", "broken"),
    [
        ("ram", "copies wait for work"),
        ("ram", "work waits for copies"),
        ("disk", "files wait for copies"),
    ],
)
def test_without_one_of_the_waits_the_race_is_seen(
    home: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        assert any(violations(seed, home, broken, patch) for seed in range(60))


def test_the_first_copies_wait_for_work_that_the_device_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The allocator may give a slot memory that work in the other stream still uses."""
    copies = Copies(lambda: None, "")
    monkeypatch.setattr(block_streaming, "CopyStream", lambda device: copies)
    ready = threading.Event()
    copies.computing.work.put(ready.wait)  # the device is still at work
    model = WanDiT(CONFIG).requires_grad_(False)
    buffers = {
        index: torch.ones(BlockBuffers(block).layout.nbytes, dtype=torch.uint8)
        for index, block in enumerate(model.blocks)
    }
    stream = Streaming(model, lambda *given: None, (), torch.device("cpu"), buffers)
    slots = [slot.buffer.zero_() for slot in stream._free]
    next(blocks := stream.stream())
    assert copies.after[0] is not None
    time.sleep(0.02)
    assert not any(bool(slot.any()) for slot in slots)
    ready.set()
    copies.copying.work.join()
    assert all(bool(slot.any()) for slot in slots)
    blocks.close()
    stream.close()
