"""Time, weigh and fill what a check or a benchmark runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanflow.checkpoint.structure import expert_structure, vae_of
from wanflow.config import DiTConfig
from wanflow.models.dit import Block, Conditioning, Head, WanDiT, run_blocks
from wanflow.models.vae import WanVAE
from wanflow.plan.trace import Work, fake, materialise
from wanflow.presets import NANO, T2V_A14B, ModelSpec
from wanflow.runtime import Runtime
from wanflow.transforms.attention import synchronize
from wanflow.transforms.quant import QuantLinear

Shape = tuple[int, ...]
ENOUGH = 2.0  # seconds of rounds after which no further one is made


@dataclass(frozen=True)
class Scale:
    """What a check runs on: the published model at its published size, or a small one.

    Attributes:
        device: where it computes.
        spec: the model.
        dtype: of its experts.
        latents: [C, T, H, W] of the sizes that are measured, the largest first.
        vae_latent: [1, C, T, H, W] of a decode.
        file: bytes of a file that is read.
        rounds: how often each call is timed.
    """

    device: torch.device
    spec: ModelSpec
    dtype: torch.dtype
    latents: tuple[Shape, ...]
    vae_latent: Shape
    file: int
    rounds: int = 3

    @property
    def full(self) -> bool:
        return self.spec is T2V_A14B

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def tokens(self, latent: Shape) -> int:
        """Return how many tokens a latent has."""
        return latent[1] * latent[2] * latent[3] // 4

    def empty(self) -> None:
        """Give back what PyTorch keeps of freed memory."""
        if self.cuda:
            torch.cuda.empty_cache()


def scale_of(device: torch.device) -> Scale:
    """Return what is checked on a device: all of it on a GPU, seconds of work on a CPU."""
    if device.type == "cuda":
        half = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = torch.bfloat16 if half else torch.float16
        latents = ((16, 21, 90, 160), (16, 21, 60, 104))
        return Scale(device, T2V_A14B, dtype, latents, (1, 16, 4, 90, 160), 2**30)
    latents = ((16, 3, 16, 16), (16, 2, 8, 8))
    return Scale(device, NANO, torch.float32, latents, (1, 16, 2, 8, 8), 2**22, 1)


def seconds(run: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Return the median seconds of a call, after one that prepares kernels and memory.

    A slow device makes fewer rounds, at least one.
    """
    run()
    times: list[float] = []
    while len(times) < rounds and sum(times) < ENOUGH:
        times.append(once(run, device))
    return statistics.median(times)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


@dataclass
class Peak:
    """Bytes of a GPU at their peak: in tensors, kept by PyTorch, and taken from the driver."""

    allocated: int = 0
    reserved: int = 0
    driver: int = 0

    def numbers(self) -> dict[str, int]:
        """Return them for a finding; empty on a CPU."""
        return {name: count for name, count in vars(self).items() if count}


@contextmanager
def weighing(device: torch.device) -> Iterator[Peak]:
    """Yield the peak of the block's GPU memory, known at the block's end."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        synchronize(device)
        peak.allocated = torch.cuda.max_memory_allocated(device)
        peak.reserved = torch.cuda.max_memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        peak.driver = total - free


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `b`."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


# random weights


def randn(
    shape: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return random numbers, made on the device."""
    return torch.randn(*shape, dtype=dtype, device=device, generator=generator)


def random_weight(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: Any,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return random values of the size that keeps activations near one."""
    noise = randn(shape, dtype, device, generator)
    if "norm" in name or "gamma" in name:
        return noise.mul_(0.1).add_(1)
    if len(shape) < 2 or "modulation" in name:
        return noise.mul_(0.1)
    return noise.mul_(noise[0].numel() ** -0.5)


def fill(module: nn.Module, device: torch.device) -> nn.Module:
    """Give a module on meta random weights on the device, in the form that each leaf holds."""
    for path, owner in module.named_modules():
        values: dict[str, Tensor] = {}
        for key, old in owner.named_parameters(recurse=False):
            if isinstance(owner, QuantLinear) and key != "bias":
                continue
            values[key] = random_weight(f"{path}.{key}", tuple(old.shape), old.dtype, device)
        if isinstance(owner, QuantLinear):
            shape = owner.out_features, owner.in_features
            values |= owner.quantise(random_weight("weight", shape, owner.compute_dtype, device))
        for key, value in values.items():
            setattr(owner, key, nn.Parameter(value, requires_grad=False))
    return module


def random_expert(scale: Scale, layers: int, runtime: Runtime | None = None) -> WanDiT:
    """Return an expert of random weights on the device, with so many blocks."""
    config = replace(scale.spec.dit, num_layers=layers)
    model = expert_structure(config, None, runtime or Runtime(), scale.dtype, scale.device)
    return cast(WanDiT, fill(model, scale.device))


def random_vae(scale: Scale) -> WanVAE:
    """Return a VAE of random weights on the device."""
    return cast(WanVAE, fill(vae_of(scale.spec.vae), scale.device))


def expert_inputs(config: DiTConfig, latent: Shape, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return a latent, a timestep and the states of a text, for a pass."""
    text = torch.randn(1, config.text_len, config.text_dim, device=device)
    return torch.randn(1, *latent, device=device), torch.tensor([500.0], device=device), text


# one block


def _no_head(tokens: Tensor, _: Conditioning) -> Tensor:
    return tokens


@dataclass(frozen=True)
class OneBlock:
    """A block with its inputs; calling it runs the block."""

    block: Block
    tokens: Tensor
    conditioning: Conditioning

    def __call__(self) -> Tensor:
        return self.by(self.block)

    def by(self, block: Any) -> Tensor:
        """Run another block, such as a compiled one, on the same inputs."""
        return run_blocks([block], cast(Head, _no_head), self.tokens, self.conditioning)


def one_block(model: WanDiT, latent: Shape, device: Any) -> OneBlock:
    """Return the first block of a model with the inputs that a pass gives it."""
    found: list[OneBlock] = []

    def trunk(blocks: Any, head: Head, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        first = replace(conditioning, text=conditioning.text[:1])
        found.append(OneBlock(next(iter(blocks)), tokens, first))
        return cast(Tensor, head(tokens, conditioning))

    with torch.no_grad():
        x, timestep, text = expert_inputs(model.config, latent, device)
        model(x, timestep, model.text_states(text), trunk)
    return found[0]


def block_work(scale: Scale, latent: Shape) -> Work:
    """Return what one block computes and moves, traced without memory."""
    config = replace(scale.spec.dit, num_layers=1)
    model = expert_structure(config, None, Runtime(), scale.dtype, torch.device("cpu"))
    with fake() as trace:
        materialise(model)
        run = one_block(model, latent, "cpu")
        trace.mark()
        run()
        return trace.work
