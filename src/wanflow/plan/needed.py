"""Say what a published model needs, and what to do where a machine lacks it; without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from wanflow.plan.gpus import Machine
from wanflow.presets import FAMILY, T2V_A14B

GIB = 2**30


@dataclass(frozen=True)
class Needed:
    """What a model takes as its authors run it, and the least that it streams with, in GB.

    Attributes:
        gpu, ram, disk: of the authors' own commands.
        least: GPU memory and RAM that the default video runs with; tests hold the plan to it.
    """

    gpu: int
    ram: int
    disk: int
    least: tuple[int, int]

    @property
    def reported(self) -> tuple[int, int]:
        """Bytes of GPU memory and RAM; drivers and systems report a little less."""
        return round(self.gpu * 0.93) * GIB, round(self.ram * 0.9) * GIB


A14B, TI2V_5B = Needed(80, 64, 150, (12, 32)), Needed(24, 32, 50, (8, 16))


def needed(model: str) -> Needed:
    """Return what a model needs, by its name."""
    return TI2V_5B if model.endswith("-5B") else A14B


def named(folder: str) -> str:
    """Return the model that a folder's name tells; T2V-A14B where it tells none."""
    words = re.split(r"[^0-9a-z]+", folder.lower())
    found = (spec.name for spec in FAMILY if set(spec.task.lower().split("-")) <= set(words))
    return next(found, T2V_A14B.name)


def where_else(model: str) -> str:
    """Return what to do where a machine is too small for a model, for a message."""
    one = needed(model)
    cards = "an RTX 3090 or 4090" if one.gpu <= 24 else "an A100 or H100"
    return (
        f"run it on a server or cloud machine with a GPU of {one.gpu} GB, such as {cards} (Alibaba"
        " PAI, Tencent TI, AWS, Azure, Google Cloud, or a container platform: docs/guides/deploy),"
        f" or on any GPU with {one.least[0]} GB; on this machine, --ckpt_dir nano runs the"
        " miniature"
    )


def needed_words(model: str) -> str:
    """Return what a model needs, for a message."""
    one = needed(model)
    return (
        f"{model} needs a GPU with {one.gpu} GB, {one.ram} GB of RAM and {one.disk} GB of disk for"
        f" its weights; with {one.least[0]} GB and {one.least[1]} GB of RAM it runs by streaming"
        " them"
    )


def enough_for_full_size(machine: Machine, model: str) -> bool:
    """Return whether a machine has the GPU and the RAM that a model's authors ask for."""
    gpu, ram = needed(model).reported
    return machine.gpu >= gpu and (machine.ram == 0 or machine.ram >= ram)
