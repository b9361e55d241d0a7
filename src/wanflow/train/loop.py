"""The one training loop: schedule, averaged weights, saved state; knows nothing of what is trained.

Step n draws its data from (seed, n) alone, and the state on disk holds everything else, so a run
that was killed and started again gives the same weights as one that was not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.files import atomic_path
from wanflow.parallel import fsdp
from wanflow.parallel.ranks import DistInfo


@dataclass(frozen=True)
class Train:
    """How to train. The learning rate warms up, stays, and falls linearly to zero over the last
    `decay` of the steps.
    """

    steps: int
    batch: int
    learning_rate: float = 2e-3
    muon_rate: float = 0.0  # > 0: the blocks' matrices are trained by Muon at this rate
    warmup: int = 50
    decay: float = 0.3
    ema: float = 0.995
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    save_seconds: float = 60.0
    dtype: torch.dtype = torch.bfloat16


# (step, rng, generator) -> the loss, or its parts one after the other, of which each is let go
# before the next is made.
Loss = Callable[[int, random.Random, torch.Generator], Tensor | Iterator[Tensor]]


def rate(step: int, train: Train) -> float:
    """Share of the full learning rate at a step."""
    falling = max(1, int(train.steps * train.decay))
    return min(1.0, (step + 1) / train.warmup, (train.steps - step) / falling)


def optimizers(module: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside `blocks.` where asked for, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (
                matrices if train.muon_rate and "blocks." in name and parameter.ndim == 2 else rest
            ).append(parameter)
    built: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest, lr=train.learning_rate, betas=(0.9, 0.98), weight_decay=train.weight_decay
        )
    ]
    if matrices:
        built.append(
            torch.optim.Muon(
                matrices,
                lr=train.muon_rate,
                weight_decay=train.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return built


def fit(
    module: nn.Module,
    loss_of: Loss,
    train: Train,
    state_file: Path,
    report: Callable[[str], None],
    info: DistInfo | None = None,
) -> nn.Module:
    """Train `module` in place to the end of the schedule, resuming from `state_file` where it
    exists.

    Args:
        loss_of: (step, rng, generator) -> scalar loss, or parts of it that add up to it (gradient
            accumulation); must draw all randomness from its two generators. What of the module does
            not require gradients stays as it is, and is not saved.
        report: receives a line of progress now and then.
        info: the processes over which the module is split (`parallel.fsdp.shard`); each computes
            the loss of its own share.

    Returns:
        The module, holding the averaged weights.
    """
    module.train()
    trained = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    device = next(iter(trained.values())).device.type
    optims = optimizers(module, train)
    base = [[group["lr"] for group in optim.param_groups] for optim in optims]
    average = {name: value.detach().clone() for name, value in trained.items()}
    first, seen = 0, 0.0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True, map_location=device)
        if info is not None:
            saved = _shared_out(saved, trained, optims)
        if saved["seed"] != train.seed:
            raise RequestError(
                f"{state_file} was begun with seed {saved['seed']}, not {train.seed}; remove it to"
                " start over"
            )
        _assign(trained, saved["module"])
        for optim, state in zip(optims, saved["optims"], strict=True):
            optim.load_state_dict(state)
        average, first, seen = saved["average"], saved["step"], saved["loss"]
    began = last_save = last_report = time.monotonic()
    for step in range(first, train.steps):
        share = rate(step, train)
        for optim, rates in zip(optims, base, strict=True):
            for group, full in zip(optim.param_groups, rates, strict=True):
                group["lr"] = full * share
        rng, generator = (
            random.Random(f"{train.seed}/{step}"),
            torch.Generator().manual_seed(train.seed * 1_000_003 + step),
        )
        value = _backward(
            loss_of,
            step,
            rng,
            generator,
            torch.autocast(device, dtype=train.dtype, enabled=train.dtype != torch.float32),
        )
        nn.utils.clip_grad_norm_(trained.values(), train.clip)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        _update(average, trained, min(train.ema, (step + 1) / (step + 10)))
        now = time.monotonic()
        due = now - last_save > train.save_seconds or step + 1 == train.steps
        if info is not None:  # the clocks differ, and all save or none
            value, saving = fsdp.mean(torch.tensor([value, float(due)]), info).tolist()
            due = saving > 0
        seen = value if step == 0 else 0.98 * seen + 0.02 * value
        if now - last_report > 15 or step + 1 == train.steps:
            pace = (now - began) / (step + 1 - first)
            report(
                f"step {step + 1}/{train.steps}  loss {seen:.4f}  {pace:.2f} s/step "
                f" {pace * (train.steps - step - 1) / 60:.1f} min left"
            )
            last_report = now
        if due:
            _save(
                state_file, trained, optims, average, step + 1, seen, train.seed, info is not None
            )
            last_save = now
    _assign(trained, average)
    return module.eval()


def _backward(
    loss_of: Loss,
    step: int,
    rng: random.Random,
    generator: torch.Generator,
    autocast: torch.autocast,
) -> float:
    """The loss of one step, with its gradients left in the parameters."""
    with autocast:
        loss = loss_of(step, rng, generator)
    if isinstance(loss, Tensor):
        loss.backward()
        return float(loss.detach())
    total = 0.0
    while True:
        with autocast:
            part = next(loss, None)
        if part is None:
            return total
        part.backward()
        total += float(part.detach())


@torch.no_grad()
def _assign(trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    if trained.keys() != values.keys():
        raise RequestError(
            "the saved state is of a training with other settings; remove it to start over"
        )
    for name, value in values.items():
        trained[name].copy_(value)


@torch.no_grad()
def _update(average: dict[str, Tensor], trained: dict[str, nn.Parameter], keep: float) -> None:
    for name, value in trained.items():
        average[name].lerp_(value.to(average[name].dtype), 1 - keep)


def _save(
    file: Path,
    trained: dict[str, nn.Parameter],
    optims: Iterable[torch.optim.Optimizer],
    average: dict[str, Tensor],
    step: int,
    loss: float,
    seed: int,
    split: bool,
) -> None:
    values = {name: value.detach() for name, value in trained.items()}
    states = [optim.state_dict() for optim in optims]
    state: Any = {
        "module": values,
        "optims": states,
        "average": average,
        "step": step,
        "loss": loss,
        "seed": seed,
    }
    if split:
        state = fsdp.gather(state)
    if state is None:
        return  # rank 0 writes
    with atomic_path(file, overwrite=True) as part:
        torch.save(state, part)


def _shared_out(
    saved: dict[str, Any], trained: dict[str, nn.Parameter], optims: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """This process' share of a saved state."""
    shares = {
        part: {name: fsdp.scatter(value, trained[name]) for name, value in saved[part].items()}
        for part in ("module", "average")
    }
    return {
        **saved,
        **shares,
        "optims": [
            fsdp.scatter_optimizer(state, optim)
            for state, optim in zip(saved["optims"], optims, strict=True)
        ],
    }
