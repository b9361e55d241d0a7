"""The training loop: schedule, averaged weights, saved state; the loss is handed in.

Step n draws its data from (seed, n) alone, and the state on disk holds everything else. So a run
that was killed and started again gives the same weights as one that was not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.files import atomic_path
from wanflow.parallel import fsdp
from wanflow.parallel.ranks import DistInfo
from wanflow.screen import Screen


@dataclass(frozen=True)
class Train:
    """How to train.

    The learning rate warms up, stays, and falls linearly to zero over the last `decay` of the
    steps.
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


# (step, rng, generator) -> the loss, or its parts one by one; each part is freed before the next.
Loss = Callable[[int, random.Random, torch.Generator], Tensor | Iterator[Tensor]]


def rate(step: int, train: Train) -> float:
    """Return the share of the full learning rate at a step."""
    falling = max(1, int(train.steps * train.decay))
    return min(1.0, (step + 1) / train.warmup, (train.steps - step) / falling)


def optimizers(module: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon for the matrices inside `blocks.` if `muon_rate` is set."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = "blocks." in name and parameter.ndim == 2
            (matrices if train.muon_rate and is_matrix else rest).append(parameter)
    decay = train.weight_decay
    adam = torch.optim.AdamW(rest, train.learning_rate, betas=(0.9, 0.98), weight_decay=decay)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(
        matrices, train.muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adam, muon]


def fit(
    module: nn.Module,
    loss_of: Loss,
    train: Train,
    state_file: Path,
    screen: Screen,
    info: DistInfo | None = None,
) -> nn.Module:
    """Train `module` in place to the end of the schedule, resuming from `state_file` if it exists.

    Parameters that do not require gradients stay as they are and are not saved.

    Args:
        loss_of: (step, rng, generator) -> scalar loss, or parts of it that add up to it (gradient
            accumulation); must draw all randomness from its two generators.
        info: the processes over which the module is sharded (`parallel.fsdp.shard`); each computes
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
    full_rates = [[group["lr"] for group in optim.param_groups] for optim in optims]
    average = {name: value.detach().clone() for name, value in trained.items()}
    first, seen = 0, 0.0
    if state_file.exists():
        saved = _load(state_file, device, train.seed, trained, optims, info)
        average, first, seen = saved["average"], saved["step"], saved["loss"]
    screen.progress("training", first, train.steps, "step")
    last_save = time.monotonic()
    for step in range(first, train.steps):
        share = rate(step, train)
        for optim, rates in zip(optims, full_rates, strict=True):
            for group, full in zip(optim.param_groups, rates, strict=True):
                group["lr"] = full * share
        rng = random.Random(f"{train.seed}/{step}")
        generator = torch.Generator().manual_seed(train.seed * 1_000_003 + step)
        autocast = torch.autocast(device, train.dtype, enabled=train.dtype != torch.float32)
        value = _backward(loss_of, step, rng, generator, autocast)
        nn.utils.clip_grad_norm_(trained.values(), train.clip)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        _update(average, trained, min(train.ema, (step + 1) / (step + 10)))
        due = time.monotonic() - last_save > train.save_seconds or step + 1 == train.steps
        if info is not None:  # the ranks' clocks differ, and all save or none
            value, saving = fsdp.mean(torch.tensor([value, float(due)]), info).tolist()
            due = saving > 0
        seen = value if step == 0 else 0.98 * seen + 0.02 * value
        note = f"loss {seen:.4f}"
        screen.progress("training", step + 1, train.steps, "step", note, last_line=True)
        if due:
            state: dict[str, Any] = {
                "module": {name: value.detach() for name, value in trained.items()},
                "optims": [optim.state_dict() for optim in optims],
                "average": average,
            }
            state |= {"step": step + 1, "loss": seen, "seed": train.seed}
            gathered = state if info is None else fsdp.gather(state)
            if gathered is not None:  # rank 0 has it
                with atomic_path(state_file, overwrite=True) as part:
                    torch.save(gathered, part)
            last_save = time.monotonic()
    _assign(trained, average)
    return module.eval()


def _backward(
    loss_of: Loss,
    step: int,
    rng: random.Random,
    generator: torch.Generator,
    autocast: torch.autocast,
) -> float:
    """Return the loss of one step; its gradients are in the parameters."""
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


def _load(
    file: Path,
    device: str,
    seed: int,
    trained: dict[str, nn.Parameter],
    optims: Sequence[torch.optim.Optimizer],
    info: DistInfo | None,
) -> dict[str, Any]:
    """Read a saved state into the module and its optimizers; return it, or this rank's shard."""
    saved: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
    if saved["seed"] != seed:
        raise RequestError(
            f"{file} was begun with seed {saved['seed']}, not {seed}; remove it to start over"
        )
    if info is not None:
        for part in ("module", "average"):
            saved[part] = {
                name: fsdp.scatter(value, trained[name]) for name, value in saved[part].items()
            }
        saved["optims"] = [
            fsdp.scatter_optimizer(state, optim)
            for state, optim in zip(saved["optims"], optims, strict=True)
        ]
    _assign(trained, saved["module"])
    for optim, state in zip(optims, saved["optims"], strict=True):
        optim.load_state_dict(state)
    return saved
