"""What a denoising step moves: bytes of its elementwise kernels, copies from the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanflow.models.dit import (
    Block,
    Conditioning,
    LayerNorm,
    RMSNorm,
    modulated,
    rope_table,
    rotate,
)
from wanflow.presets import T2V_A14B

EAGER = 148  # bytes for each token and channel; 238 before, and 154 are allowed
LAUNCHED_BY_OTHERS = ("mm", "attention", "empty", "detach")  # matmuls, and what moves no bytes


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Moved(TorchDispatchMode):
    """Counts the bytes that kernels other than matmuls and attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not any(word in str(function) for word in LAUNCHED_BY_OTHERS):
            self.nbytes += sum(each.nbytes for each in tensors((args, kwargs, out)))
        return out


def test_bytes_that_a_block_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes for each token and channel of `dim`, with bfloat16 matmuls, as CUDA runs them eagerly.

    Each kernel counts the tensors that it reads and those that it writes, as they are (broadcast:
    as stored). Views count nothing; matmuls and attention are left out. An RMS norm is one kernel,
    as on a GPU; the CPU runs it as six.
    """
    config, tokens, moved = T2V_A14B.dit, 2048, Moved()

    def one_kernel(x: Tensor, *_: object) -> Tensor:
        moved.nbytes += 2 * x.nbytes
        return x

    monkeypatch.setattr(F, "rms_norm", one_kernel)
    with torch.no_grad(), torch.device("meta"):
        block = Block(config)
        for leaf in block.modules():
            if isinstance(leaf, torch.nn.Linear):
                leaf.weight.data = leaf.weight.bfloat16()
        for attention in (block.self_attn, block.cross_attn):
            attention.attend = lambda q, k, v: q
        x, rope = torch.empty(1, tokens, config.dim), torch.empty(tokens, 64, 2)
        time, modulation = torch.empty(1, 1, config.dim), torch.empty(1, 1, 6, config.dim)
        text = torch.empty(1, 512, 40, 128, dtype=torch.bfloat16)
        with moved:
            block(x, Conditioning(time, modulation, None, rope, ()), (text, text))
    assert moved.nbytes / tokens / config.dim <= EAGER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotation_has_the_bits_of_complex_numbers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = rope_table((2, 3, 4), 32, torch.device("cpu"))
    x = torch.randn(2, 24, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    eager = rotate(x, rope, dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(eager, rotate(x, rope, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_few_kernels_have_the_bits_of_many(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 50, 96, generator=generator)
    shift, scale = torch.randn(2, 1, 1, 96, generator=generator)
    norm, rms = LayerNorm(96, 1e-6, elementwise_affine=False), RMSNorm(96, 1e-6)
    expected = torch.addcmul(shift, F.layer_norm(x, (96,), eps=1e-6), 1 + scale)
    assert torch.equal(modulated(norm, x, shift, scale), expected)
    assert torch.equal(modulated(norm, x, shift.expand(1, 50, 96), scale), expected)
    rounded = x.to(dtype)
    expected = F.rms_norm(rounded.float(), (96,), None, 1e-6).to(dtype) * rms.weight
    assert torch.equal(rms(rounded), expected)
