"""Estimate the memory of a training, on the real model with fake tensors and without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import TensorInfo
from wanflow.checkpoint.structure import expert_dtypes
from wanflow.config import RequestError
from wanflow.geometry import geometry_of
from wanflow.models.dit import WanDiT, run_blocks
from wanflow.plan.gpus import Machine
from wanflow.train.finetune import attach
from wanflow.train.tuning import TARGETS, FineTune
from wanflow.train.views import Views, flow_loss
from wanflow.units import memory_size

GB = 10**9
COPIES = 4  # of a trained parameter, float32: its gradient, two moments of AdamW, the average


@dataclass(frozen=True)
class Need:
    """Bytes for one expert in training."""

    weights: int
    training: int  # gradients, the optimizer's moments, averaged weights
    activations: int
    trained: int  # parameters, a count

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations

    def words(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and optimizer": self.training,
            "activations": self.activations,
        }
        words = ", ".join(f"{name} {memory_size(size)}" for name, size in parts.items())
        return f"{memory_size(self.total)} ({words})"


def need(checkpoint: Checkpoint, settings: FineTune) -> Need:
    """Return what training one expert takes.

    Parameters are counted on meta; activations on fake tensors through one and two blocks.
    """
    full, spec = settings.method == "full", checkpoint.spec
    with torch.device("meta"):
        model = WanDiT(spec.dit)
    dtype = torch.float32 if full or settings.dtype == torch.float32 else torch.bfloat16
    dtypes = expert_dtypes(model, dtype)
    weights = sum(
        value.numel() * dtypes(name, _info(value)).itemsize
        for name, value in model.named_parameters()
    )
    if full:
        trained = sum(value.numel() for value in model.parameters())
    else:
        trained = _lora_parameters(model, settings)
        weights += trained * torch.float32.itemsize
    one, two = (_saved(checkpoint, settings, layers, dtype) for layers in (1, 2))
    block, rest = two - one, 2 * one - two
    if settings.checkpointing:  # of each block its input, and one block that is computed again
        form = settings.form
        tokens = geometry_of(spec).tokens(form.size, form.frame_num)
        each = _micro_batch(settings) * tokens * spec.dit.dim * torch.float32.itemsize
        rest += block
    else:
        each = block
    activations = rest + each * spec.dit.num_layers
    return Need(weights, trained * 4 * COPIES, activations, trained)


def _lora_parameters(model: WanDiT, settings: FineTune) -> int:
    names = [leaf for target in settings.targets for leaf in TARGETS[target]]
    leaves = [model.get_submodule(f"blocks.0.{name}") for name in names]
    sides = [leaf.in_features + leaf.out_features for leaf in leaves if isinstance(leaf, nn.Linear)]
    return model.config.num_layers * settings.rank * sum(sides)


def _info(value: Tensor) -> TensorInfo:
    return TensorInfo(tuple(value.shape), value.dtype)


def _micro_batch(settings: FineTune) -> int:
    return settings.batch // settings.accumulate


def _saved(checkpoint: Checkpoint, settings: FineTune, layers: int, dtype: torch.dtype) -> int:
    """Return the bytes that autograd stores for a model of `layers` blocks, without parameters."""
    held: dict[int, int] = {}  # by storage, so that each counts once
    alive: list[Tensor] = []  # the address of a freed storage would be used again
    spec = checkpoint.spec
    with FakeTensorMode():
        model = WanDiT(replace(spec.dit, num_layers=layers))
        dtypes = expert_dtypes(model, dtype)
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            stored = nn.Parameter(parameter.detach().to(dtypes(name, _info(parameter))))
            setattr(model.get_submodule(owner), leaf, stored)
        if settings.method == "lora":
            model.requires_grad_(False)
            attach(model, settings)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage.nbytes()
                alive.append(value)
            return value

        views, count = Views(spec, settings.form), _micro_batch(settings)
        latent = torch.randn(count, *views.shape)
        text = torch.randn(count, spec.dit.text_len, spec.dit.text_dim)
        autocast = torch.autocast("cpu", settings.dtype, enabled=settings.dtype != torch.float32)
        with saved_tensors_hooks(pack, lambda value: value), autocast:
            seen = [views.fullest()] * count
            flow_loss(model, seen, latent, latent.clone(), [0.5] * count, text, run_blocks)
    return sum(held.values())


def less(settings: FineTune) -> list[str]:
    """Return flags with which a training takes less memory on the same machine."""
    ways = []
    if not settings.checkpointing:
        ways.append("--activation_checkpointing")
    if _micro_batch(settings) > 1:
        ways.append(f"--grad_accum {settings.batch}")
    if settings.method == "full":
        ways.append("--method lora")
    return ways


def refuse(
    checkpoint: Checkpoint, settings: FineTune, machine: Machine, processes: int = 1
) -> None:
    """Refuse a training that cannot fit.

    Raises:
        RequestError: in three lines: the need, the machine, the remedies.
    """
    needed = need(checkpoint, settings)
    on_gpu = settings.device.startswith("cuda")
    have = machine.gpu if on_gpu else machine.ram_free
    # Sharding divides what belongs to parameters; every process has its own activations.
    each = needed.activations + (needed.weights + needed.training) // processes
    if not have or each <= have:
        return
    what = f"a LoRA of rank {settings.rank}" if settings.method == "lora" else "the full model"
    of = "one expert of " if len(checkpoint.spec.expert_names) > 1 else ""
    gpus = max(2, -(-needed.total // (70 * GB)))
    ways = [*less(settings), f"torchrun --nproc_per_node={gpus} and --fsdp on GPUs of 80 GB"]
    raise RequestError(
        f"training {what} on {of}{checkpoint.spec.name} needs {needed.words()}"
        + (f", {memory_size(each)} in each of {processes} processes" if processes > 1 else ""),
        f"  here: {memory_size(have)} of {'GPU memory' if on_gpu else 'free RAM'}"
        f" ({machine.words()})",
        f"  do: {', '.join(ways)} (--force starts it here anyway)",
    )
