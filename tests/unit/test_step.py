"""What a denoising step moves: bytes of its elementwise kernels, copies from the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanflow.checkpoint.structure import set_chunk
from wanflow.conditioning import FirstFrame, conditioning_of
from wanflow.config import DiTConfig, Solver
from wanflow.loaders.velocity import make_velocity
from wanflow.models.dit import (
    Block,
    Conditioning,
    LayerNorm,
    RMSNorm,
    Runs,
    WanDiT,
    modulated,
    rope_table,
    rotate,
    time_features,
)
from wanflow.presets import NANO, T2V_A14B, TI2V_5B, Expert
from wanflow.request import Request
from wanflow.sampling.solvers import SolverState, advance
from wanflow.sampling.timeline import schedule_of

EAGER = 148  # bytes for each token and channel; 238 before, and 154 are allowed
LAUNCHED_BY_OTHERS = ("mm", "attention", "empty", "detach")  # matmuls, and what moves no bytes


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Moved(TorchDispatchMode):
    """Counts the bytes that kernels other than matmuls and attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not any(word in str(function) for word in LAUNCHED_BY_OTHERS):
            self.nbytes += sum(each.nbytes for each in tensors((args, kwargs, out)))
        return out


def moved_bytes(config: DiTConfig, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes for each token and channel of `dim`, with bfloat16 matmuls, as CUDA runs them eagerly.

    Each kernel counts the tensors that it reads and those that it writes, as they are (broadcast:
    as stored). Views count nothing; matmuls and attention are left out. An RMS norm is one kernel,
    as on a GPU; the CPU runs it as six.
    """
    tokens, moved, rows = 2048, Moved(), max(1, len(runs))

    def one_kernel(x: Tensor, *_: object) -> Tensor:
        moved.nbytes += 2 * x.nbytes
        return x

    monkeypatch.setattr(F, "rms_norm", one_kernel)
    with torch.no_grad(), torch.device("meta"):
        block = Block(config)
        for leaf in block.modules():
            if isinstance(leaf, torch.nn.Linear):
                leaf.weight.data = leaf.weight.bfloat16()
        for attention in (block.self_attn, block.cross_attn):
            attention.attend = lambda q, k, v: q
        x, rope = torch.empty(1, tokens, config.dim), torch.empty(tokens, 64, 2)
        time, modulation = torch.empty(1, rows, config.dim), torch.empty(1, rows, 6, config.dim)
        text = torch.empty(1, 512, config.num_heads, 128, dtype=torch.bfloat16)
        index = torch.empty(1, tokens, dtype=torch.long) if runs else None
        with moved:
            block(x, Conditioning(time, modulation, index, rope, (), runs), (text, text))
    return moved.nbytes / tokens / config.dim


def test_bytes_that_a_block_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moved_bytes(T2V_A14B.dit, (), monkeypatch) <= EAGER


def test_two_times_move_few_more_bytes_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of 31 latent frames has a time of its own; with a row per token it were 283 bytes.

    A GPU writes no row out for each token, and computes the first frame's tokens twice.
    """
    first = 2048 // 31
    one, two = (
        moved_bytes(TI2V_5B.dit, runs, monkeypatch)
        for runs in ((), ((0, first), (1, 2048 - first)))
    )
    assert one < two < 1.03 * one


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunk", [0, 5, 12])
@torch.no_grad()
def test_runs_of_tokens_give_what_a_time_per_token_gives(batch: int, chunk: int) -> None:
    """Rows that are written out for every token, and rows that are not."""
    generator = torch.Generator().manual_seed(0)
    model = WanDiT(TINY)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    set_chunk(model, chunk)
    latent = torch.randn(batch, TINY.in_dim, 3, 4, 6, generator=generator)
    text = torch.randn(batch, TINY.text_len, TINY.text_dim, generator=generator)
    per_token = torch.tensor([0.0] * 6 + [871.0] * 12).expand(batch, -1)
    expected = model(latent, per_token, text)
    features = time_features(torch.tensor([[0.0, 871.0]]).expand(batch, -1), TINY.freq_dim)
    found = model(latent, features, text, runs=((0, 6), (1, 12)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    other = model(latent, features, text, runs=((0, 7), (1, 11)))
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotation_has_the_bits_of_complex_numbers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = rope_table((2, 3, 4), 32, torch.device("cpu"))
    x = torch.randn(2, 24, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    eager = rotate(x, rope, dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(eager, rotate(x, rope, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_few_kernels_have_the_bits_of_many(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 50, 96, generator=generator)
    shift, scale = torch.randn(2, 1, 1, 96, generator=generator)
    norm, rms = LayerNorm(96, 1e-6, elementwise_affine=False), RMSNorm(96, 1e-6)
    expected = torch.addcmul(shift, F.layer_norm(x, (96,), eps=1e-6), 1 + scale)
    assert torch.equal(modulated(norm, x, shift, scale), expected)
    assert torch.equal(modulated(norm, x, shift.expand(1, 50, 96), scale), expected)
    rounded = x.to(dtype)
    expected = F.rms_norm(rounded.float(), (96,), None, 1e-6).to(dtype) * rms.weight
    assert torch.equal(rms(rounded), expected)


class CopiesBetween(TorchDispatchMode):
    """Notes each kernel that has tensors on the host and on the device, or reads a value back."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        devices = {each.device.type for each in tensors((args, kwargs, out))}
        if len(devices) > 1 or "_local_scalar_dense" in str(function):
            self.noted.append(str(function))
        return out


class OnMeta:
    """The parts of nano on the meta device, which gives no value back."""

    spec = NANO

    def __init__(self) -> None:
        with torch.device("meta"):
            self.models = {which: WanDiT(NANO.dit) for which in NANO.expert_names}

    def text(self, prompts: list[str]) -> Tensor:
        return torch.empty(len(prompts), NANO.dit.text_len, NANO.dit.text_dim, device="meta")

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT:
        return self.models[which]

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None:
        pass


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
@torch.no_grad()
def test_a_step_copies_nothing_to_or_from_the_device(solver: Solver, batch: bool) -> None:
    request = Request("a circle", sample_solver=solver, sample_steps=4, frame_num=5).complete(NANO)
    velocity = make_velocity(OnMeta(), request, cfg_batch=batch)
    schedule = schedule_of(request)
    shape = conditioning_of(NANO, request).shape
    state = SolverState(0, torch.empty(1, *shape, device="meta"))
    with CopiesBetween() as copies:
        while state.index < len(schedule):
            state = advance(schedule, state, velocity)
    assert copies.noted == []


@torch.no_grad()
def test_a_step_with_a_held_frame_copies_nothing_either() -> None:
    request = Request("a circle", sample_steps=4, frame_num=5).complete(NANO)
    shape = conditioning_of(NANO, request).shape
    held = FirstFrame(shape, torch.empty(1, shape[0], 1, *shape[2:], device="meta"))
    velocity = make_velocity(OnMeta(), request, conditioning=held)
    schedule = schedule_of(request)
    state = SolverState(0, torch.empty(1, *shape, device="meta"))
    with CopiesBetween() as copies:
        while state.index < len(schedule):
            state = advance(schedule, state, velocity)
            held.held(state.x)
    assert copies.noted == []


@torch.no_grad()
def test_a_copy_within_a_step_is_noted() -> None:
    model = OnMeta().models["high"]
    latent, text = torch.empty(1, 16, 2, 4, 4, device="meta"), OnMeta().text([""])
    with CopiesBetween() as copies:
        model(latent, torch.tensor([500]), text)
    assert copies.noted  # the table of rotary positions, and the time


@torch.no_grad()
def test_tables_of_a_run_change_no_bit() -> None:
    model = WanDiT(NANO.dit)
    latent, time = torch.randn(2, 16, 2, 4, 6), torch.tensor([500.0, 3.25])
    text = torch.randn(2, NANO.dit.text_len, NANO.dit.text_dim)
    rope = rope_table((2, 2, 3), NANO.dit.dim // NANO.dit.num_heads, torch.device("cpu"))
    features = time_features(time.unsqueeze(1), NANO.dit.freq_dim)
    made_once = model(latent, features, text, rope=rope)
    assert torch.equal(made_once, model(latent, time, text))
