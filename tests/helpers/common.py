"""What many test modules use: prompts, refusals, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from wanflow.checkpoint.key_maps import Kind
from wanflow.checkpoint.source import OfficialSource, official, open_source
from wanflow.config import DiTConfig, RequestError
from wanflow.media import VideoWriter

M = TypeVar("M", bound=nn.Module)
# Small enough that a run takes a fraction of a second.
QUICK = {"frame_num": 5, "sample_steps": 4, "seed": 7}
PROMPT = "a red circle moves left on a blue background"


@cache
def scales_rows() -> bool:
    """Whether this PyTorch multiplies fp8 with a scale for each row on a CPU, as 2.12 does."""
    one, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(one, one.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def open_part(kind: Kind, path: Path) -> OfficialSource:
    """Open a part of a model, in any container and dialect, under official names."""
    return official(kind, open_source(path))


def refusal(action: Callable[[], object]) -> str:
    """Return the one line of the RequestError that an action must raise."""
    with pytest.raises(RequestError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def official_config(dit: DiTConfig) -> dict[str, Any]:
    """Return what the official config.json says of an expert."""
    keys = "model_type text_len in_dim dim ffn_dim freq_dim out_dim num_heads num_layers eps"
    return {key: getattr(dit, key) for key in keys.split()}


def filled(model: M, seed: int) -> M:
    """Fill every parameter at random, also those that start at one or zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    # Attention takes another path, and rounds otherwise, where gradients are needed.
    return model.eval().requires_grad_(False)


def same_bits(a: Tensor | None, b: Tensor) -> bool:
    """Compare dtype, shape and every bit."""
    return (
        a is not None
        and a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def let_appear(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let another program write a file, `mine`, just before a video is published."""
    finish = VideoWriter._finish

    def late(self: VideoWriter) -> None:
        Path(name).write_bytes(b"mine")
        finish(self)

    patch.setattr(VideoWriter, "_finish", late)
