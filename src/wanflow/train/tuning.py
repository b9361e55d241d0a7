"""Say how to fine-tune: what is trained, on which clips, for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from wanflow.config import RequestError
from wanflow.presets import Expert
from wanflow.train.clips import Form
from wanflow.train.limits import check_limits

Method = Literal["lora", "full"]
TARGETS: dict[str, tuple[str, ...]] = {
    "self_attn": ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
    "cross_attn": ("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"),
    "ffn": ("ffn.0", "ffn.2"),
}


@dataclass(frozen=True)
class FineTune:
    """How to fine-tune.

    experts: those to train; () for all of the model's.
    batch: clips for each update.
    accumulate: in how many parts a batch goes through the model (memory against time).
    alpha: the LoRA's output is multiplied by alpha / rank.
    shift: crowds the training sigmas towards noise, as sampling does.
    dropout: share of captions replaced by the empty one, which guidance needs.
    overwrite: replace LoRA files, or a model, that are there at the start.
    """

    data: Path
    out: Path
    work: Path
    form: Form
    method: Method = "lora"
    experts: tuple[Expert, ...] = ()
    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)
    steps: int = 400
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    dropout: float = 0.1
    shift: float = 5.0
    checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    fsdp: bool = False
    seed: int = 0
    save_seconds: float = 60.0
    overwrite: bool = field(default=False, repr=False)  # a state is named after the others

    def __post_init__(self) -> None:
        renamed = {"grad_accum": self.accumulate, "save_every": self.save_seconds}
        check_limits({**vars(self), **renamed})
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise RequestError(
                f"--targets must be some of {','.join(TARGETS)} (got {','.join(self.targets)})"
            )
        if self.batch % self.accumulate:
            raise RequestError(
                f"--batch must divide into --grad_accum equal parts (got {self.batch} and"
                f" {self.accumulate})"
            )
        if not (
            0 < self.learning_rate < 1
            and 0 <= self.dropout < 1
            and 0 < self.alpha <= 4096
            and 0 < self.shift <= 100
        ):
            raise RequestError(
                "--learning_rate and --caption_dropout must be between 0 and 1, --alpha between 0"
                f" and 4096, --train_shift between 0 and 100 (got {self.learning_rate:g},"
                f" {self.dropout:g}, {self.alpha:g}, {self.shift:g})"
            )
