"""The training loop: schedule, averaged weights, saved state; the loss is handed in.

Step n draws its data from (seed, n) alone, and the state on disk holds everything else. So a run
that was killed and started again gives the same weights as one that was not.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanflow.config import RequestError
from wanflow.parallel import fsdp
from wanflow.parallel.ranks import DistInfo
from wanflow.screen import Screen
from wanflow.train.saving import read_state, write_state
from wanflow.train.stopping import Stop
from wanflow.untrusted import printable


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


@dataclass
class _Course:
    """How far a training is: what its state on disk holds."""

    trained: dict[str, nn.Parameter]
    optims: list[torch.optim.Optimizer]
    average: dict[str, Tensor]
    train: Train
    info: DistInfo | None
    step: int = 0  # done
    seen: float = 0.0  # the loss, smoothed

    def save(self, file: Path) -> None:
        """Write the state; of several ranks rank 0 writes what all hold."""
        state: dict[str, Any] = {
            "module": {name: value.detach() for name, value in self.trained.items()},
            "optims": [optim.state_dict() for optim in self.optims],
            "average": self.average,
        }
        state |= {"step": self.step, "loss": self.seen, "seed": self.train.seed}
        state["train"] = _about(self.train)
        gathered = state if self.info is None else fsdp.gather(state)
        if gathered is not None:  # rank 0 has it
            write_state(file, gathered)

    def load(self, file: Path, device: str) -> None:
        """Read a saved state into the module and its optimizers, or this rank's shard of it."""
        saved = read_state(file, device)
        try:
            _refuse_other(file, saved, self.train)
            if self.info is not None:
                _scatter(saved, self.trained, self.optims)
            _assign(self.trained, saved["module"])
            for optim, state in zip(self.optims, saved["optims"], strict=True):
                optim.load_state_dict(state)
            _refuse_shapes(saved["average"], self.average)
            self.average = saved["average"]
            self.step, self.seen = int(saved["step"]), float(saved["loss"])
            if not 0 <= self.step <= self.train.steps:
                raise ValueError(f"step {self.step} of {self.train.steps}")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{file} is no state of this training, or is damaged ({printable(error, 80)});"
                " remove it to begin this expert again"
            ) from None


def fit(
    module: nn.Module,
    loss_of: Loss,
    train: Train,
    state_file: Path,
    screen: Screen,
    info: DistInfo | None = None,
    stop: Stop | None = None,
) -> nn.Module:
    """Train `module` in place to the end of the schedule, resuming from `state_file` if it exists.

    Parameters that do not require gradients stay as they are and are not saved. A full disk costs
    no training: the state is written the next time.

    Args:
        module: the model.
        loss_of: (step, rng, generator) -> scalar loss, or parts of it that add up to it (gradient
            accumulation); must draw all randomness from its two generators.
        train: how to train.
        state_file: the state on disk.
        screen: shows progress.
        info: the processes over which the module is sharded (`parallel.fsdp.shard`); each computes
            the loss of its own share.
        stop: asks for the end.

    Returns:
        The module, holding the averaged weights.

    Raises:
        KeyboardInterrupt: when it was stopped; the state is on disk.
        RequestError: for a state that is damaged, or of a training with other settings.
    """
    module.train()
    trained = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    device = next(iter(trained.values())).device.type
    optims = optimizers(module, train)
    full_rates = [[group["lr"] for group in optim.param_groups] for optim in optims]
    average = {name: value.detach().clone() for name, value in trained.items()}
    course, stop = _Course(trained, optims, average, train, info), stop or Stop()
    if os.path.lexists(state_file):
        course.load(state_file, device)
    screen.progress("training", course.step, train.steps, "step")
    keep = _Keeper(course, state_file, screen)
    while course.step < train.steps:
        _set_rates(optims, full_rates, rate(course.step, train))
        autocast = torch.autocast(device, train.dtype, enabled=train.dtype != torch.float32)
        try:
            stop.at_once = info is None  # ranks end together, below
            value = _backward(loss_of, course.step, train.seed, autocast)
            stop.at_once = False
        except KeyboardInterrupt:  # the parameters are those of the last update
            stop.at_once = False
            if info is None:
                keep.at_the_end()
            raise
        nn.utils.clip_grad_norm_(trained.values(), train.clip)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        _update(course.average, trained, min(train.ema, (course.step + 1) / (course.step + 10)))
        due, asked = keep.due(), stop.asked
        if info is not None:  # the ranks' clocks differ, and all save or none
            shared = torch.tensor([value, float(due), float(asked)])
            value, saving, ending = fsdp.mean(shared, info).tolist()
            due, asked = saving > 0, ending > 0
        course.seen = value if course.step == 0 else 0.98 * course.seen + 0.02 * value
        course.step += 1
        note = f"loss {course.seen:.4f}"
        screen.progress("training", course.step, train.steps, "step", note, last_line=True)
        if asked:
            keep.at_the_end()
            raise KeyboardInterrupt
        if due or course.step == train.steps:
            keep()
    _assign(trained, course.average)
    return module.eval()


def _set_rates(
    optims: Sequence[torch.optim.Optimizer], full: Sequence[Sequence[float]], share: float
) -> None:
    """Give every group of parameters this share of its full learning rate."""
    for optim, rates in zip(optims, full, strict=True):
        for group, largest in zip(optim.param_groups, rates, strict=True):
            group["lr"] = largest * share


class _Keeper:
    """Writes the state of a training now and then; where the disk is full, again later."""

    def __init__(self, course: _Course, file: Path, screen: Screen) -> None:
        self.course, self.file, self.screen = course, file, screen
        self.last, self.warned = time.monotonic(), False
        self.stored = course.step if os.path.lexists(file) else None

    def due(self) -> bool:
        return time.monotonic() - self.last > self.course.train.save_seconds

    def __call__(self) -> None:
        """Write the state; say once if the disk refuses it."""
        try:
            self.course.save(self.file)
            self.stored = self.course.step
        except OSError as error:
            if not self.warned:
                self.screen.say(f"the state of the training is not saved for now: {error}")
            self.warned = True
        self.last = time.monotonic()

    def at_the_end(self) -> None:
        """Write the state of a training that was stopped, and say where it stands."""
        several = self.course.info is not None  # all save or none
        if (several or self.stored != self.course.step) and self.course.step:
            self()
        self.screen.close()
        stands = f"stopped at step {self.course.step} of {self.course.train.steps}"
        if self.stored == self.course.step:
            self.screen.say(f"{stands}; its state is {self.file}")
        elif self.stored is None:
            self.screen.say(f"{stands}; no state is stored")
        else:
            self.screen.say(f"{stands}; the state of step {self.stored} is {self.file}")


def _backward(loss_of: Loss, step: int, seed: int, autocast: torch.autocast) -> float:
    """Return the loss of one step; its gradients are in the parameters."""
    rng = random.Random(f"{seed}/{step}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
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


def _refuse_shapes(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless two sets of tensors have the same names and shapes."""
    if {name: value.shape for name, value in values.items()} != {
        name: value.shape for name, value in like.items()
    }:
        raise ValueError("its tensors are those of another model")


@torch.no_grad()
def _assign(trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    _refuse_shapes(values, trained)
    for name, value in values.items():
        trained[name].copy_(value)


@torch.no_grad()
def _update(average: dict[str, Tensor], trained: dict[str, nn.Parameter], keep: float) -> None:
    for name, value in trained.items():
        average[name].lerp_(value.to(average[name].dtype), 1 - keep)


def _about(train: Train) -> dict[str, str]:
    """Return the settings that change the result, as text."""
    about = {one.name: str(getattr(train, one.name)) for one in fields(train)}
    return {name: text for name, text in about.items() if name != "save_seconds"}


def _refuse_other(file: Path, saved: dict[str, Any], train: Train) -> None:
    """Raise RequestError for a state that a training with other settings wrote."""
    now = _about(train)
    # Earlier versions stored the seed only.
    then = {"seed": str(saved["seed"])} | dict(saved.get("train", {}))
    for name, value in then.items():
        if now.get(name, value) != value:
            raise RequestError(
                f"{file} was begun with {name} {printable(value, 40)}, not {now[name]}; train with"
                " that, or remove the file to start over"
            )


def _scatter(
    saved: dict[str, Any], trained: dict[str, nn.Parameter], optims: Sequence[torch.optim.Optimizer]
) -> None:
    """Turn a complete state into this rank's shard, in place."""
    for part in ("module", "average"):
        saved[part] = {
            name: fsdp.scatter(value, trained[name]) for name, value in saved[part].items()
        }
    saved["optims"] = [
        fsdp.scatter_optimizer(state, optim)
        for state, optim in zip(saved["optims"], optims, strict=True)
    ]
