"""What a training would take, measured on the real model with tensors that have no memory, before a
weight is read.
"""

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
from wanflow.plan import Machine
from wanflow.train.finetune import TARGETS, FineTune, attach

GB = 10**9
# AdamW keeps two moments and `fit` an average beside each trained parameter and its gradient, all
# float32.
COPIES = 4


@dataclass(frozen=True)
class Need:
    """Bytes for one expert in training."""

    weights: int
    training: int  # gradients, the optimiser's moments, averaged weights
    activations: int
    trained: int  # parameters, a count

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations

    def words(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and optimiser": self.training,
            "activations": self.activations,
        }
        return (
            f"{self.total / GB:.0f} GB"
            f" ({', '.join(f'{name} {size / GB:.1f}' for name, size in parts.items())})"
        )


def need(checkpoint: Checkpoint, settings: FineTune) -> Need:
    """What training one expert takes: parameters are counted on meta, activations on fake tensors
    through one and two blocks.
    """
    full = settings.method == "full"
    config = checkpoint.spec.dit
    with torch.device("meta"):
        model = WanDiT(config)
    dtype = torch.float32 if full or settings.dtype == torch.float32 else torch.bfloat16
    place = expert_dtypes(model, dtype)
    weights: int = sum(
        p.numel() * place(name, _info(p)).itemsize for name, p in model.named_parameters()
    )
    trained = (
        sum(p.numel() for p in model.parameters()) if full else _lora_parameters(model, settings)
    )
    weights += 0 if full else trained * 4
    one, two = (_saved(checkpoint, settings, layers, dtype) for layers in (1, 2))
    block, rest = two - one, 2 * one - two
    tokens = block if not settings.checkpointing else _saved_by_checkpoint(checkpoint, settings)
    activations = rest + (
        tokens * config.num_layers
        if not settings.checkpointing
        else tokens * config.num_layers + block
    )
    return Need(weights, trained * 4 * COPIES, activations, trained)


def _lora_parameters(model: WanDiT, settings: FineTune) -> int:
    leaves = [
        model.get_submodule(f"blocks.0.{leaf}")
        for target in settings.targets
        for leaf in TARGETS[target]
    ]
    per_block = sum(
        settings.rank * (leaf.in_features + leaf.out_features)
        for leaf in leaves
        if isinstance(leaf, nn.Linear)
    )
    return model.config.num_layers * per_block


def _info(value: Tensor) -> TensorInfo:
    return TensorInfo(tuple(value.shape), value.dtype)


def _micro_batch(settings: FineTune) -> int:
    return settings.batch // settings.accumulate


def _latent_shape(checkpoint: Checkpoint, settings: FineTune) -> tuple[int, ...]:
    form = settings.form
    shape = geometry_of(checkpoint.spec).latent_shape(form.size, form.frame_num)
    return _micro_batch(settings), *shape


def _saved_by_checkpoint(checkpoint: Checkpoint, settings: FineTune) -> int:
    """A block's input, which is all that is kept of it."""
    form, spec = settings.form, checkpoint.spec
    tokens = geometry_of(spec).tokens(form.size, form.frame_num)
    return _micro_batch(settings) * tokens * spec.dit.dim * torch.float32.itemsize


def _saved(checkpoint: Checkpoint, settings: FineTune, layers: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for a model of so many blocks, its parameters aside; each storage
    counted once.
    """
    held: dict[int, int] = {}
    keep: list[Tensor] = []  # a freed storage's place would be counted as another's

    with FakeTensorMode():
        model = WanDiT(replace(checkpoint.spec.dit, num_layers=layers))
        place = expert_dtypes(model, dtype)
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            kept = nn.Parameter(parameter.detach().to(place(name, _info(parameter))))
            setattr(model.get_submodule(owner), leaf, kept)
        if settings.method == "lora":
            model.requires_grad_(False)
            attach(model, settings)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage.nbytes()
                keep.append(value)
            return value

        latent = torch.randn(_latent_shape(checkpoint, settings))
        text = torch.randn(len(latent), checkpoint.spec.dit.text_len, checkpoint.spec.dit.text_dim)
        autocast = torch.autocast(
            "cpu", dtype=settings.dtype, enabled=settings.dtype != torch.float32
        )
        with saved_tensors_hooks(pack, lambda value: value), autocast:
            model(latent, torch.full((len(latent),), 500.0), text, run_blocks).square().mean()
    return sum(held.values())


def refuse(
    checkpoint: Checkpoint, settings: FineTune, machine: Machine, processes: int = 1
) -> None:
    """Refuse a training that cannot fit.

    Raises:
        RequestError: in three lines: what is needed, what is here, what to do.
    """
    wanted = need(checkpoint, settings)
    on_gpu = settings.device.startswith("cuda")
    have = machine.gpu if on_gpu else machine.ram_free
    # Sharding divides what belongs to parameters; every process has its own activations.
    each = wanted.activations + (wanted.weights + wanted.training) // processes
    if not have or each <= have:
        return
    what = (
        "a LoRA of rank " + str(settings.rank) if settings.method == "lora" else "the whole model"
    )
    ways = []
    if not settings.checkpointing:
        ways.append("--activation_checkpointing")
    if _micro_batch(settings) > 1:
        ways.append(f"--grad_accum {settings.batch}")
    if settings.method == "full":
        ways.append("--method lora")
    ways.append(
        f"torchrun --nproc_per_node={max(2, -(-wanted.total // (70 * GB)))} and --fsdp on GPUs of"
        " 80 GB"
    )
    raise RequestError(
        f"training {what} on one expert of {checkpoint.spec.name} needs {wanted.words()}"
        + (f", {each / GB:.0f} GB in each of {processes} processes" if processes > 1 else ""),
        f"  here: {have / GB:.0f} GB of {'GPU memory' if on_gpu else 'free RAM'}"
        f" ({machine.words()})",
        f"  do: {', '.join(ways)} (--force starts it here all the same)",
    )
