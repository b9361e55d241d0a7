"""Check a decode in every way: direct, paired, in half precision, with TF32, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wanflow.bench.nano import refuse_without_compiler
from wanflow.bench.record import Record, Skip
from wanflow.bench.tools import Peak, Scale, distance, randn, random_vae, seconds, weighing
from wanflow.models import vae as model
from wanflow.models.vae import ResidualBlock, WanVAE
from wanflow.plan.decoding import frames
from wanflow.units import memory_size


@contextmanager
def _setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value while the block lasts, in this process alone."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def vae(record: Record, scale: Scale) -> None:
    """Decode one latent in every way; the first is wanflow's own."""
    net = random_vae(scale)
    latent = randn(scale.vae_latent, torch.float32, scale.device)
    with record.asking("a decode"):
        true = _decode(record, scale, net, latent)
    cudnn: Any = torch.backends.cudnn
    with (
        record.asking("a decode, direct convolutions"),
        _setting(model, "_pairs_pay", lambda *_: False),
    ):
        _variant(record, scale, "direct convolutions", net, latent, true)
    with record.asking("a decode, bfloat16"):
        half = random_vae(scale)
        half.load_state_dict(net.state_dict())
        _variant(record, scale, "bfloat16", half.bfloat16(), latent.bfloat16(), true)
        del half
    for what, name in (("TF32", "allow_tf32"), ("cudnn.benchmark", "benchmark")):
        with record.asking(f"a decode, {what}"):
            if not scale.cuda:
                raise Skip("needs CUDA")
            with _setting(cudnn, name, not getattr(cudnn, name)):
                other = f"{what} {'on' if getattr(cudnn, name) else 'off'}"
                _variant(record, scale, other, net, latent, true)
    with record.asking("convolutions with TF32 against the CPU"):
        _tf32(record, scale)
    with record.asking("a decode, compiled"):
        if not scale.cuda:
            raise Skip("needs CUDA: on a CPU a compiler takes minutes")
        refuse_without_compiler()
        for layer in net.decoder.modules():  # what remains is a table of states
            if isinstance(layer, ResidualBlock):
                layer.compile()
        _variant(record, scale, "compiled", net, latent, true)


def _timed(run: Callable[[], Tensor], scale: Scale) -> tuple[Tensor, float, Peak]:
    """Return a decode's frames, its median seconds and its peak memory."""
    out = run()
    with weighing(scale.device) as peak:
        took = seconds(run, scale.device, scale.rounds)
    return out.float(), took, peak


def _decode(record: Record, scale: Scale, net: WanVAE, latent: Tensor) -> Tensor:
    """Decode in wanflow's own way; compare its memory with the plan's trace."""
    out, took, peak = _timed(lambda: net.decode(latent), scale)
    traced = frames(scale.spec.vae, scale.vae_latent)
    flops = sum(traced.work.flops.values())
    weights = sum(value.nbytes for value in net.parameters())
    planned = weights + traced.activations + out.nbytes
    numbers: dict[str, Any] = {"flops": flops, "planned": planned, **peak.numbers()}
    expected = f"{memory_size(planned)} in tensors"
    value = f"{took:.4g} s, {flops / took / 1e12:.3g} TFLOP/s"
    moved = traced.work.traffic / elementwise_rate(scale)
    record.calibrate(float32=flops / max(took - moved, took / 10))
    if peak.allocated:
        workspace = max(0, peak.allocated - planned)
        record.calibrate(workspace=workspace)
        value = (
            f"{value}; {memory_size(peak.allocated)}, of which workspace {memory_size(workspace)}"
        )
    record.measured("a decode", value, expected, seconds=took, **numbers)
    return out


def elementwise_rate(scale: Scale) -> float:
    """Return the bytes/s of a product of two large tensors."""
    x = randn((scale.file // 4,), torch.float32, scale.device)
    return 3 * x.nbytes / seconds(lambda: x * x, scale.device)


def _variant(
    record: Record, scale: Scale, name: str, net: WanVAE, latent: Tensor, true: Tensor
) -> None:
    out, took, peak = _timed(lambda: net.decode(latent), scale)
    away = distance(out, true)
    numbers: dict[str, Any] = {"seconds": took, "error": away, **peak.numbers()}
    memory = f"; {memory_size(peak.allocated)}" if peak.allocated else ""
    record.measured(f"a decode, {name}", f"{took:.4g} s, {away:.2g} away{memory}", **numbers)


def _tf32(record: Record, scale: Scale) -> None:
    """Convolve in 2D and 3D, in float32 and with TF32, against the CPU in float64."""
    if not scale.cuda:
        raise Skip("needs CUDA")
    cudnn: Any = torch.backends.cudnn
    cases: dict[str, tuple[Any, Any, Any]] = {
        "conv2d": (F.conv2d, (1, 96, 90, 160), (96, 96, 3, 3))
    }
    cases["conv3d"] = (F.conv3d, (1, 96, 6, 45, 80), (96, 96, 3, 3, 3))
    for name, (convolve, shape, taps) in cases.items():
        x, w = randn(shape, torch.float32, "cpu"), randn(taps, torch.float32, "cpu") * 0.02
        true = convolve(x.double(), w.double(), padding=1)
        for tf32, bound in ((False, 1e-5), (True, 5e-3)):
            with _setting(cudnn, "allow_tf32", tf32):
                found = convolve(x.to(scale.device), w.to(scale.device), padding=1)
            away, kind = distance(found, true), "TF32" if tf32 else "float32"
            value = f"{away:.2g} away from float64"
            expected = f"at most {bound:g}"
            record.passed(f"{name} in {kind}", away <= bound, value, expected, error=away)
