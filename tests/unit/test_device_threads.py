"""Threads that touch a GPU work on the run's GPU, which a new thread does not by itself."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Thread, current_thread
from types import SimpleNamespace

import pytest
import torch

import wanflow
from wanflow.loaders.streamed import Prefetcher
from wanflow.loaders.text_encoder import StreamedEncoder
from wanflow.transforms import block_streaming
from wanflow.transforms.block_streaming import Streaming


@pytest.mark.parametrize("who", ["streaming", "ahead", "text"])
def test_every_worker_takes_the_gpu_of_its_run(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three executors, made for `cuda:1` on a machine without one."""
    gpu, taken = torch.device("cuda", 1), list[tuple[str, torch.device]]()
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: taken.append((current_thread().name, device))
    )
    if who == "streaming":
        model = wanflow.load("nano", device="cpu").parts.expert("high")
        monkeypatch.setattr(block_streaming, "CopyStream", lambda device: None)
        monkeypatch.setattr(Streaming, "_load_resident", lambda *given: None)
        made = Streaming(model, lambda index, views: None, range(6), gpu)
        made._worker.submit(lambda: None).result()
        made._worker.shutdown()
    elif who == "ahead":
        where = SimpleNamespace(device=gpu)
        blocks = SimpleNamespace(fill=lambda *given, **more: None)
        read = SimpleNamespace(blocks=blocks, fetch=None)
        monkeypatch.setattr("wanflow.loaders.streamed.HostExpert", lambda *given: read)
        Prefetcher(None, "high", where, None, None).drop()  # type: ignore[arg-type]
    else:
        monkeypatch.setattr("wanflow.loaders.text_encoder._read", lambda *given: [])
        encoder = StreamedEncoder(None, torch.float32, gpu)  # type: ignore[arg-type]
        list(encoder._loaded([torch.nn.Identity()], None))  # type: ignore[list-item, arg-type]
    ((thread, device),) = taken
    assert thread.startswith("wanflow-") and device == gpu


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_thread_of_the_users_works_on_the_gpu_of_the_model(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = wanflow.load("nano", device="cpu")
    run = pipe.begin(wanflow.Request("a red circle", frame_num=1, sample_steps=2, seed=1))
    taken: list[torch.device] = []
    monkeypatch.setattr(pipe.parts, "device", torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)

    def work() -> None:
        with pytest.raises((RuntimeError, AssertionError)):  # there is no such GPU here
            if stage == "denoise":
                pipe.engine.velocity(run, pipe.engine.condition(run))
            else:
                list(pipe.engine.decode(run.state.x.to("cuda:1"), None))

    if stage == "decode":
        monkeypatch.setattr(pipe.parts, "vae", lambda: torch.empty(1, device="cuda:1"))
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *where: x)
    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert set(taken) == {torch.device("cuda", 1)}


def test_executors_are_made_in_one_place() -> None:
    """So that none of them forgets its device."""
    for folder in ("loaders", "transforms", "checkpoint", "lora", "parallel"):
        for file in (Path(wanflow.__file__).parent / folder).rglob("*.py"):
            found = re.search(r"\bThreadPoolExecutor\(", file.read_text(encoding="utf-8"))
            assert not found, f"{file.name} makes an executor; use hardware.thread_on"
