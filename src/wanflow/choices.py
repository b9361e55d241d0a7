"""Decide what a runtime leaves open: rules for device, dtype, small models and batches.

torch is imported where a value of it is made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from wanflow.config import RequestError
from wanflow.runtime import DTYPES, Runtime

if TYPE_CHECKING:
    import torch

    from wanflow.config import DiTConfig

SMALL = 2 * 2**30  # bytes of an expert: up to here a model stays resident, in float32 on a CPU
# Bytes a token, number of the width and block that compiled blocks do not move: 154 less 64.
COMPILED_AWAY = 90
RATE_GPU, RATE_CPU = 2e12, 1e10  # bytes a second of elementwise work: rough, for `compile auto`
FEW_TOKENS = 8192  # up to here both guidance branches go through the model as one batch


def choose_device(requested: str, alone: bool = True) -> torch.device:
    """Return the device of this name; `auto` is an accelerator, else the CPU.

    Of several NVIDIA GPUs, `auto` and `cuda` are the one with the most free memory. That changes
    while a run works, so a run asks once and hands on the answer.

    Args:
        requested: `auto`, or a name that PyTorch knows.
        alone: False for one of several ranks, each of which has a GPU of its own: none is chosen.

    Raises:
        RequestError: for a device that this machine lacks.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        requested = next(name for name, here in present.items() if here)
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise RequestError(
            f"device {requested!r} is not one PyTorch knows; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if not present.get(device.type, False):
        raise RequestError(
            f"device {requested!r}: this machine has none; --device auto takes what is here"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {requested!r}: this machine has {torch.cuda.device_count()} GPUs, numbered"
            " from 0"
        )
    if alone and device.type == "cuda" and device.index is None:
        from wanflow.hardware import gpu_memory_free

        count = torch.cuda.device_count()
        free = gpu_memory_free(range(count)) if count > 1 else [0]
        device = torch.device("cuda", free.index(max(free)))
    return device


def is_small(expert_bytes: int) -> bool:
    """Return whether a model, by the bytes of one expert, always stays resident."""
    return expert_bytes < SMALL


def with_defaults(runtime: Runtime, **values: object) -> Runtime:
    """Return the runtime with these values where nothing is set."""
    unset = {name: value for name, value in values.items() if getattr(runtime, name) is None}
    return replace(runtime, **unset)  # type: ignore[arg-type]


def all_resident(runtime: Runtime, layers: int, on_gpu: bool) -> Runtime:
    """Return the complete runtime of a small model: all of it stays on the device."""
    return with_defaults(
        runtime,
        t5_cpu=False,
        keep_experts=True,
        prefetch=False,
        resident_blocks=layers,
        chunk_tokens=0,
        vae_tile=0,
        stream_from="ram" if on_gpu else "disk",
        dit_fsdp=False,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16; NVIDIA's GPUs from Ampere on do."""
    from wanflow.transforms.attention import card_of

    card = card_of(device)
    return card is None or card.bfloat16


def choose_dtype(
    requested: str, on_cpu: bool, float32_bytes: int, bfloat16: bool = True
) -> torch.dtype:
    """Return the experts' dtype.

    `auto` is bfloat16, float16 on a GPU without it, and float32 for a small model on a CPU.

    Args:
        requested: `auto` or one of `DTYPES`.
        on_cpu: whether the experts compute on a CPU.
        float32_bytes: what one expert takes in float32.
        bfloat16: whether the GPU computes in it.

    Raises:
        RequestError: for a dtype that is none of these.
    """
    import torch

    if requested == "auto":
        if on_cpu:
            return torch.float32 if is_small(float32_bytes) else torch.bfloat16
        return torch.bfloat16 if bfloat16 else torch.float16
    if requested not in DTYPES:
        raise RequestError(f"dtype {requested!r} is none of auto, {', '.join(DTYPES)}")
    return dtype_of_name(requested)


def choose_text_dtype(dtype: torch.dtype, small: bool) -> torch.dtype:
    """Return the text encoder's dtype, given the experts' dtype.

    The large encoder is published in bfloat16, and its activations overflow float16. A GPU without
    bfloat16 multiplies in it all the same, by float32 and slower.
    """
    import torch

    return dtype if small and dtype != torch.float16 else torch.bfloat16


def batch_guidance(cfg_batch: bool | None, tokens: int) -> bool:
    """Return whether both branches of guidance go through the model as one batch."""
    return tokens <= FEW_TOKENS if cfg_batch is None else cfg_batch


def compiling_saves(
    config: DiTConfig, tokens: int, passes: int, processes: int, on_gpu: bool
) -> float:
    """Return about how many seconds compiled blocks save in so many passes through an expert."""
    moved = tokens * config.dim * config.num_layers * passes * COMPILED_AWAY / processes
    return moved / (RATE_GPU if on_gpu else RATE_CPU)


def dtype_of_name(name: str) -> torch.dtype:
    """Return torch's dtype of a name, such as `bfloat16`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
