"""The whole model on `cuda` without a GPU: fake tensors there refuse what mixes host and device.

It needs a wheel of PyTorch with CUDA; one for CPUs cannot slice such tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wanflow.checkpoint.structure import build, set_chunk
from wanflow.loaders.velocity import make_velocity
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.presets import NANO, T2V_A14B, Expert, ModelSpec
from wanflow.request import Request
from wanflow.sampling.solvers import SolverState, advance
from wanflow.sampling.timeline import schedule_of
from wanflow.transforms import vae_tiling

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this PyTorch was built without CUDA"
)
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def faked() -> Iterator[None]:
    with FakeTensorMode(), torch.no_grad():
        yield


def placed(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """Give a module of `build` fake parameters on the GPU."""
    for leaf in module.modules():
        for name, value in list(leaf.named_parameters(recurse=False)):
            new = torch.empty(value.shape, dtype=dtype, device=GPU)
            setattr(leaf, name, nn.Parameter(new, requires_grad=False))
        for name, value in list(leaf.named_buffers(recurse=False)):
            setattr(leaf, name, torch.empty(value.shape, dtype=value.dtype, device=GPU))
    return module


class Parts:
    """Both experts, and texts, on the fake GPU."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.model: WanDiT = placed(build(WanDiT, spec.dit), dtype)

    def text(self, prompts: list[str]) -> Tensor:
        return torch.empty(len(prompts), self.spec.dit.text_len, self.spec.text.dim, device=GPU)

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT:
        return self.model

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None: ...


def test_a_mixture_is_seen() -> None:
    """The proof that the tests below can fail."""
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=GPU) + torch.ones(2)


@pytest.mark.parametrize(
    ("solver", "batch"), [("unipc", True), ("unipc", False), ("dpm++", True), ("euler", True)]
)
def test_steps_of_every_solver_stay_on_the_gpu(solver: Any, batch: bool) -> None:
    request = Request("a", seed=1, frame_num=5, sample_steps=3, sample_solver=solver).complete(NANO)
    velocity = make_velocity(Parts(NANO, torch.float32), request, cfg_batch=batch)
    width, height = request.size
    state = SolverState(0, torch.empty(1, 16, 2, height // 8, width // 8, device=GPU))
    schedule = schedule_of(request)
    while state.index < len(schedule):
        state = advance(schedule, state, velocity)
        assert state.x.device == GPU
        for value in state.tensors().values():
            assert value.device == GPU


@pytest.mark.parametrize("chunk", [0, 2048])
def test_the_published_model_stays_on_the_gpu(chunk: int) -> None:
    shape = replace(T2V_A14B.dit, num_layers=2)
    model: WanDiT = placed(build(WanDiT, shape), torch.bfloat16)
    set_chunk(model, chunk)
    latent = torch.empty(1, 16, 21, 30, 52, device=GPU)
    text = torch.empty(1, 512, 4096, device=GPU, dtype=torch.bfloat16)
    out = model(latent, torch.full((1,), 900.0, device=GPU), text)
    assert (out.device, out.shape) == (GPU, latent.shape)


def test_the_vae_stays_on_the_gpu() -> None:
    vae: WanVAE = placed(build(WanVAE, NANO.vae))
    latent = torch.empty(1, 16, 3, 16, 16, device=GPU)
    assert {part.device for part in vae.decode_frames(latent)} == {GPU}
    assert vae.encode(torch.empty(1, 3, 5, 64, 64, device=GPU)).device == GPU
    full, local = vae_tiling.halves(vae)
    held = list(vae_tiling.features(vae, full, latent))
    box = vae_tiling.tiles(vae.config, 128, 128, 64)[0]
    tile = vae_tiling.decode_tile(local, held, box, 16, 16, GPU)
    assert {part.device for part in tile} == {GPU}


def test_the_text_encoder_stays_on_the_gpu() -> None:
    encoder = placed(build(UMT5Encoder, NANO.text), torch.bfloat16)
    ids = torch.ones(1, 8, dtype=torch.long, device=GPU)
    assert encoder(ids, torch.ones_like(ids)).device == GPU
