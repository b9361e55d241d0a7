"""The table of attention kernels for the `attend` slot of the DiT.

Shapes: q [B, L, N, K], k and v [B, S, N, K] -> [B, L, N, K]
    (B batch, L queries, S keys, N heads of size K).
With the log-sum-exp of each row of scores, which joins attention over parts of the keys (ring
attention): [B, N, L] float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanflow.models.dit import Attend, sdpa

AttendWithLse: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Capability: TypeAlias = tuple[int, int]

HALF = (torch.bfloat16, torch.float16)
ANY = (torch.float32, torch.float64, *HALF)
MAXWELL, AMPERE, HOPPER, BLACKWELL, NO_LIMIT = (5, 0), (8, 0), (9, 0), (10, 0), (99, 0)


@dataclass(frozen=True)
class Backend:
    """A kernel.

    package: what must be installed, "" for PyTorch's own; `distribution` is its name in an index.
    exact: equal to the others to rounding; else it changes the video.
    capability: CUDA compute capabilities it is built for, from the first to below the second.
    amd: whether it is built for AMD's GPUs too, which count as "cuda".
    head_dim: the largest.
    """

    name: str
    about: str
    attend: Attend
    with_lse: AttendWithLse | None
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = HALF
    package: str = ""
    distribution: str = ""
    exact: bool = True
    capability: tuple[Capability, Capability] = ((0, 0), NO_LIMIT)
    amd: bool = False
    head_dim: int = 256


# PyTorch's


def _pinned(kernel: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa(q, k, v)

    return attend


def _heads_first(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.transpose(1, 2) for x in tensors)


def _finish(out: Tensor, lse: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Cut the log-sum-exp: some kernels pad its rows, or add a dimension at its end."""
    return out.transpose(1, 2), lse.flatten(2)[..., :queries].float()


def _math_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Written out: the complete matrix of scores is in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(wide) for x in _heads_first(q, k, v))
    scores = queries @ keys.mT / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp().matmul(values).to(v.dtype)
    return out.transpose(1, 2), lse.float()


def _flash_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = aten._scaled_dot_product_flash_attention
    out, lse = kernel(*_heads_first(q, k, v))[:2]
    return _finish(out, lse, q.shape[1])


def _aten_lse(name: str) -> AttendWithLse:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kernel = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
        out, lse = kernel(*_heads_first(q, k, v), None, True)[:2]
        return _finish(out, lse, q.shape[1])

    return attend


_efficient_lse, _cudnn_lse = _aten_lse("efficient"), _aten_lse("cudnn")


def _sdpa_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a kernel as PyTorch does, whose own choice returns no log-sum-exp."""
    if q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype in HALF):
        return _flash_lse(q, k, v)
    return _efficient_lse(q, k, v) if q.device.type == "cuda" else _math_lse(q, k, v)


# Packages. Each is imported by statement inside its function: torch.compile follows that, and not
# import_module.


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return flash_attn_func(q, k, v)


def _flash_attn_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    return out, lse[..., : q.shape[1]].float()


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out = flash_attn_func(q, k, v)
    # Builds from before 2025-08 always return the log-sum-exp, and take no flag for it.
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_3_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    try:
        out, lse = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    except TypeError:
        out, lse = flash_attn_func(q, k, v)[:2]
    return out, lse[..., : q.shape[1]].float()


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out = flash_attn_func(q, k, v)  # and None in place of the log-sum-exp
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_4_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out, lse = flash_attn_func(q, k, v, return_lse=True)
    return out, lse[..., : q.shape[1]].float()


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _sage_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's is to base 2 and of keys without their mean; the package corrects both."""
    from sageattention import sageattn  # type: ignore[import-not-found, import-untyped, unused-ignore]

    out, lse = sageattn(q, k, v, tensor_layout="NHD", is_causal=False, return_lse=True)
    return out, lse[..., : q.shape[1]].float()


def _sage_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattn3 import sageattn3_blackwell  # type: ignore[import-not-found, import-untyped, unused-ignore]

    # It subtracts the mean from the keys that it is given, in place: those of the text stay.
    queries, keys, values = _heads_first(q, k.clone(), v)
    return sageattn3_blackwell(queries, keys, values, is_causal=False).transpose(1, 2)


FLASH, CUDNN = _pinned(SDPBackend.FLASH_ATTENTION), _pinned(SDPBackend.CUDNN_ATTENTION)
EFFICIENT, MATH = _pinned(SDPBackend.EFFICIENT_ATTENTION), _pinned(SDPBackend.MATH)
FROM_AMPERE, FROM_MAXWELL = (AMPERE, NO_LIMIT), (MAXWELL, NO_LIMIT)
ON_HOPPER, FROM_BLACKWELL = (HOPPER, BLACKWELL), (BLACKWELL, NO_LIMIT)
_TABLE = (
    Backend("sdpa", "PyTorch chooses", sdpa, _sdpa_lse, ("cpu", "cuda", "mps"), ANY, amd=True),
    Backend("cudnn", "cuDNN's", CUDNN, _cudnn_lse, capability=FROM_AMPERE),
    Backend(
        "flash",
        "PyTorch's FlashAttention",
        FLASH,
        _flash_lse,
        ("cpu", "cuda"),
        ANY,
        capability=FROM_AMPERE,
        amd=True,
    ),
    Backend(
        "efficient",
        "PyTorch's memory-efficient",
        EFFICIENT,
        _efficient_lse,
        dtypes=(torch.float32, *HALF),
        capability=FROM_MAXWELL,
        amd=True,
    ),
    Backend(
        "math",
        "plain matrix products, memory grows with L squared",
        MATH,
        _math_lse,
        ("cpu", "cuda"),
        ANY,
        amd=True,
    ),
    Backend(
        "flash_attn",
        "FlashAttention 2",
        _flash_attn,
        _flash_attn_lse,
        package="flash_attn",
        distribution="flash-attn",
        capability=FROM_AMPERE,
        amd=True,
    ),
    Backend(
        "flash_attn_3",
        "FlashAttention 3",
        _flash_attn_3,
        _flash_attn_3_lse,
        package="flash_attn_interface",
        distribution="flash-attn-3",
        capability=ON_HOPPER,
    ),
    Backend(
        "flash_attn_4",
        "FlashAttention 4",
        _flash_attn_4,
        _flash_attn_4_lse,
        package="flash_attn.cute",
        distribution="flash-attn-4",
        capability=FROM_AMPERE,
        head_dim=128,
    ),
    Backend(
        "sage",
        "SageAttention, 8-bit",
        _sage,
        _sage_lse,
        package="sageattention",
        distribution="sageattention",
        exact=False,
        capability=FROM_AMPERE,
        head_dim=128,
    ),
    Backend(
        "sage_3",
        "SageAttention 3, 4-bit",
        _sage_3,
        None,
        package="sageattn3",
        distribution="sageattn3",
        exact=False,
        capability=FROM_BLACKWELL,
        head_dim=128,
    ),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _TABLE}
