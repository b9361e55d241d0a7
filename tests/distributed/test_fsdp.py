"""Training on several processes: two of them, each with half the batch, learn what one learns with
all of it.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from wanflow.config import DiTConfig, RequestError
from wanflow.models.dit import WanDiT
from wanflow.parallel import fsdp, ranks
from wanflow.transforms import packed
from wanflow.transforms.deltas import LowRank
from wanflow.transforms.lora import Adapters

CONFIG = DiTConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=24, text_len=8, freq_dim=16
)
ALONE = ranks.DistInfo(0, 1, torch.device("cpu"))


def made(lora: bool) -> WanDiT:
    """A small expert, all of it trainable, or frozen with a LoRA on all matrices of its blocks."""
    generator = torch.Generator().manual_seed(1)
    model = WanDiT(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    if lora:
        model.requires_grad_(False)
        changes = {}
        for name, parameter in model.named_parameters():
            if "blocks." in name and parameter.ndim == 2:
                up, down = (
                    torch.randn(*shape, generator=generator) * 0.1
                    for shape in ((len(parameter), 3), (3, parameter.shape[1]))
                )
                changes[name] = LowRank(up, down)
        adapters = Adapters(model)
        adapters.attach("trained", changes)
        for slot in adapters.slots("trained").values():
            slot.up.requires_grad_()
            slot.down.requires_grad_()
    return model


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # eps: below it, a gradient that is nothing but rounding would be a whole step
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=1e-3,
        eps=1e-5,
    )


def train(
    model: WanDiT, optim: torch.optim.Optimizer, info: ranks.DistInfo, steps: range
) -> list[float]:
    """Some steps on this rank's share of each step's batch; the losses of the whole batch, and the
    norms that were clipped.
    """
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        shapes = ((4, 16, 2, 4, 4), (4, 16, 2, 4, 4), (4, CONFIG.text_len, CONFIG.text_dim))
        latent, goal, text = (
            torch.randn(shape, generator=generator)[info.rank :: info.world_size]
            for shape in shapes
        )
        timestep = (torch.rand(4, generator=generator) * 1000)[info.rank :: info.world_size]
        loss = (model(latent, timestep, text) - goal).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        optim.step()
        optim.zero_grad(set_to_none=True)
        seen += [float(fsdp.mean(loss, info)), float(norm.detach())]
    return seen


def join(rank: int, port: int, timeout_s: float, together: Barrier) -> ranks.DistInfo:
    """What torchrun does, and `start`; the timeout does not count what a process does before it."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    together.wait(240)
    return ranks.join_group(torch.device("cpu"), timeout_s)


def work(rank: int, ports: list[int], together: Barrier, folder: Path) -> None:
    """All that the tests look at, in one pair of processes: starting them takes longer than what
    they do.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    info = join(rank, ports[0], 60, together)
    for lora in (False, True):
        learn(lora, info, folder / f"{lora}.pt")
    ranks.leave_group()
    ends = {}
    for way, port in zip(("stays", "raises"), ports[1:], strict=True):
        info = join(rank, port, 5, together)
        model = made(True)
        fsdp.shard(model, info)
        optim = optimizer(model)
        train(model, optim, info, range(1))
        together.wait(240)
        if rank == 1:
            if way == "raises":
                raise RuntimeError("rank 1 fails")
        else:
            began = time.monotonic()
            with pytest.raises(RuntimeError) as error:
                train(model, optim, info, range(1, 2))
            ends[way] = {"error": str(error.value), "took": time.monotonic() - began}
            (folder / "ends.json").write_text(json.dumps(ends))
        if way == "stays":
            together.wait(240)
        ranks.leave_group()


def learn(lora: bool, info: ranks.DistInfo, file: Path) -> None:
    """Train for three steps, save what there was after two, and take the third once more from
    there.
    """
    model = made(lora)
    fsdp.shard(model, info)
    held, everything = (
        sum(sizes)
        for sizes in zip(
            *((p.to_local().numel(), p.numel()) for p in model.parameters()), strict=True
        )
    )
    assert held < 0.6 * everything
    optim = optimizer(model)
    seen = train(model, optim, info, range(2))
    state = fsdp.gather({"model": model.state_dict(), "optim": optim.state_dict(), "step": 2})
    seen += train(model, optim, info, range(2, 3))
    after = fsdp.gather({n: p for n, p in model.named_parameters() if p.requires_grad})
    assert (state is None) == (not after) == (info.rank > 0)
    if info.rank == 0:
        torch.save({"state": state, "seen": seen, "after": after}, file)
    fsdp.mean(torch.zeros(()), info)  # wait for the file
    again = made(lora)
    fsdp.shard(again, info)
    resume(again, info, file)
    assert all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def resume(model: WanDiT, info: ranks.DistInfo, file: Path) -> None:
    """Take the third step from a state saved after two."""
    state = torch.load(file, weights_only=True, mmap=True)["state"]
    model.load_state_dict(
        {
            name: fsdp.scatter(state["model"][name], value)
            for name, value in model.state_dict().items()
        }
    )
    optim = optimizer(model)
    optim.load_state_dict(fsdp.scatter_optimizer(state["optim"], optim))
    train(model, optim, info, range(state["step"], 3))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes left."""
    folder = tmp_path_factory.mktemp("worked")
    context = mp.get_context("spawn")
    together, ports = context.Barrier(2), free_ports(3)
    processes = [
        context.Process(target=work, args=(rank, ports, together, folder), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [
        0,
        1,
    ]  # the second raises in the end, and the first survives it
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_learn_what_one_does(worked: Path, lora: bool) -> None:
    two = torch.load(worked / f"{lora}.pt", weights_only=True)
    before, model = dict(made(lora).named_parameters()), made(lora)
    fsdp.shard(model, ALONE)
    seen = train(model, optimizer(model), ALONE, range(3))
    assert two["seen"] == pytest.approx(seen, abs=1e-5)
    trained = {
        name: value.detach() for name, value in model.named_parameters() if value.requires_grad
    }
    assert two["after"].keys() == trained.keys()
    for name, value in trained.items():
        assert not torch.equal(before[name], value)
        torch.testing.assert_close(two["after"][name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_one_process_goes_on_where_two_stopped(worked: Path, lora: bool) -> None:
    model = made(lora)
    resume(model, ALONE, worked / f"{lora}.pt")
    after: dict[str, Tensor] = torch.load(worked / f"{lora}.pt", weights_only=True)["after"]
    found = dict(model.named_parameters())
    for name, value in after.items():
        torch.testing.assert_close(value, found[name].detach(), atol=1e-5, rtol=0)


def test_a_rank_left_alone_fails_in_time(worked: Path) -> None:
    ends = json.loads((worked / "ends.json").read_text())
    assert 4 < ends["stays"]["took"] < 60 and "imed out" in ends["stays"]["error"]
    assert ends["raises"]["took"] < 60


def test_what_cannot_be_split_is_refused() -> None:
    """By two processes; one takes it as it is."""
    two = ranks.DistInfo(0, 2, torch.device("cpu"))
    model = made(False)
    packed.replace_with_packed(model, {"blocks.1.ffn.0.weight": "F8_E4M3"}, torch.float32)
    fsdp.shard(model, ALONE)
    with pytest.raises(
        RequestError, match=r"blocks\.1\.ffn\.0\.data is torch\.float8_e4m3fn: packed weights"
    ):
        fsdp.shard(model, two)
    model = made(False)
    model.blocks[0].ffn.bfloat16()
    fsdp.shard(model, ALONE)
    with pytest.raises(RequestError, match="one dtype"):
        fsdp.shard(model, two)


def test_the_environment_describes_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.join_group(torch.device("cpu")) == ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.join_group(torch.device("cpu")) == ALONE
    ranks.leave_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="RANK, MASTER_ADDR, MASTER_PORT missing .* torchrun"):
        ranks.join_group(torch.device("cpu"))
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="mps"):
        ranks.join_group(torch.device("mps"))
