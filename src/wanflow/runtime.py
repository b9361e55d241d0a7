"""Say how to run: `Runtime`, and the one home of device, dtype, "small" and the batch rule.

Standard library only; torch is imported where a value of it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from wanflow.config import RequestError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")  # what the experts compute in
SMALL = 2 * 2**30  # bytes of an expert: up to here a model stays resident, in float32 on a CPU
FEW_TOKENS = 8192  # up to here both guidance branches go through the model as one batch

Quantization = Literal["fp8", "int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("fp8", "int8", "nf4")


@dataclass(frozen=True)
class Runtime:
    """How to run. None leaves a choice to the plan; only `noise_device` and `quantize` change what
    is made beyond rounding.

    t5_cpu: the text encoder works on the CPU.
    keep_experts: both experts stay on the device; else the one at work only.
    prefetch: the next expert is read into RAM while the current one works.
    resident_blocks: how many of an expert's blocks stay on the device; the others are streamed, one
        ahead of the one at work.
    stream_from: where streamed blocks wait: in pinned RAM, or in their files.
    chunk_tokens: how many tokens go at a time through all that works token by token (everything but
        attention); 0: all.
    vae_tile: the side in pixels of the tiles that the VAE decodes one after the other; 0: whole
        frames.
    quantize, quantize_layers: round the Linear weights of the blocks while they are read ("" keeps
        them), of the feed-forward or all.
    attention: the kernel, by a name of `wanflow doctor`; "auto" takes the first that works.
    text_cache: a folder where encoded prompts are kept; None keeps none.
    cfg_parallel, ring_size, ulysses_size: how several processes share a forward: a branch of
        guidance each, keys and values that go round, attention heads. Their product is the number
        of processes.
    dit_fsdp: each process keeps a share of the experts' weights, and has a block whole while it
        works.
    lora: "live" computes LoRAs beside the weights, so that strengths change and LoRAs go without
        reloading; "fused" adds them to the weights while those are read, which costs nothing per
        step, and reads an expert again when something changes for it.
    """

    device: str = "auto"
    dtype: str = "auto"
    t5_cpu: bool | None = None
    keep_experts: bool | None = None
    cfg_batch: bool | None = None
    noise_device: Literal["cpu", "cuda"] = "cpu"
    lora: Literal["live", "fused"] = "live"
    prefetch: bool | None = None
    resident_blocks: int | None = None
    stream_from: Literal["ram", "disk"] | None = None
    chunk_tokens: int | None = None
    vae_tile: int | None = None
    quantize: Quantization | Literal[""] = ""
    quantize_layers: Literal["ffn", "all"] = "ffn"
    attention: str = "auto"
    text_cache: str | None = None
    cfg_parallel: bool | None = None
    ring_size: int | None = None
    ulysses_size: int | None = None
    dit_fsdp: bool | None = None


def choose_device(requested: str) -> torch.device:
    """Return the device of this name; `auto` is the first accelerator, else the CPU.

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
        return torch.device(next(name for name, here in present.items() if here))
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
    return device


def is_small(expert_bytes: int) -> bool:
    """Return whether a model, by the bytes of one expert, stays resident as a matter of course."""
    return expert_bytes < SMALL


def choose_dtype(requested: str, on_cpu: bool, float32_bytes: int) -> torch.dtype:
    """Return the experts' dtype; `auto` is bfloat16, but float32 for a small model on a CPU.

    Args:
        requested: `auto` or one of `DTYPES`.
        on_cpu: whether the experts compute on a CPU.
        float32_bytes: what one expert takes in float32.

    Raises:
        RequestError: for a dtype that is none of these.
    """
    import torch

    if requested == "auto":
        return torch.float32 if on_cpu and is_small(float32_bytes) else torch.bfloat16
    if requested not in DTYPES:
        raise RequestError(f"dtype {requested!r} is none of auto, {', '.join(DTYPES)}")
    return dtype_of_name(requested)


def choose_text_dtype(dtype: torch.dtype, small: bool) -> torch.dtype:
    """Return the text encoder's dtype, given the experts' dtype.

    The large encoder is published in bfloat16, and its activations overflow float16.
    """
    import torch

    return dtype if small and dtype != torch.float16 else torch.bfloat16


def batch_guidance(cfg_batch: bool | None, tokens: int) -> bool:
    """Return whether both branches of guidance go through the model as one batch."""
    return tokens <= FEW_TOKENS if cfg_batch is None else cfg_batch


def dtype_of_name(name: str) -> torch.dtype:
    """Return torch's dtype of a name, such as `bfloat16`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of torch's dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def recorded(
    runtime: Runtime, device: torch.device, dtype: torch.dtype, kernel: str, layout: str
) -> dict[str, Any]:
    """Return what a recipe records of a runtime: all that changes a result, if only by rounding."""
    return {
        "device": device.type,
        "dtype": dtype_name(dtype),
        "t5_cpu": bool(runtime.t5_cpu),
        "lora": runtime.lora,
        "chunk_tokens": runtime.chunk_tokens or 0,
        "vae_tile": runtime.vae_tile or 0,
        "quantize": runtime.quantize,
        "quantize_layers": runtime.quantize_layers,
        "attention": kernel,
        "layout": layout,
    }
