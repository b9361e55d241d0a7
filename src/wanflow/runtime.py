"""Describe how to run: `Runtime`, and what a recipe records of it; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from wanflow.config import RequestError
from wanflow.recipe import Recipe, damaged
from wanflow.settings import adopt, check, setting, settings_of

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")  # what the experts compute in

Quantization = Literal["fp8", "int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("fp8", "int8", "nf4")


@dataclass(frozen=True)
class Runtime:
    """How to run. None leaves a choice to the plan.

    Only `noise_device` and `quantize` change what is made beyond rounding. The product of
    `cfg_parallel` (2 or 1), `ring_size` and `ulysses_size` is the number of processes.
    """

    device: str = setting(
        "auto", group="memory", metavar="DEVICE", recorded=True, help="auto, cpu, cuda, cuda:1, mps"
    )
    dtype: str = setting(
        "auto",
        group="memory",
        metavar="DTYPE",
        recorded=True,
        fixed=True,
        help="auto, bfloat16, float16, float32",
    )
    t5_cpu: bool | None = setting(
        None, group="memory", switch=True, recorded=True, help="run the text encoder on the CPU"
    )
    keep_experts: bool | None = setting(
        None,
        group="memory",
        flag="offload_model",
        negated=True,
        metavar="BOOL",
        help="keep only the active expert resident (keep_experts in Python: the opposite)",
    )
    cfg_batch: bool | None = setting(
        None,
        group="memory",
        metavar="BOOL",
        help="both guidance branches in one batch (default: for small videos)",
    )
    noise_device: Literal["cpu", "cuda"] = setting(
        "cpu", group="sampling", fixed=True, help="cuda draws the noise as the official code does"
    )
    lora: Literal["live", "fused"] = setting(
        "live",
        group="LoRA",
        flag="lora_mode",
        unset=None,
        recorded=True,
        fixed=True,
        help="live: strength adjustable at run time; fused: merged at load, free per step",
    )
    prefetch: bool | None = setting(
        None,
        group="memory",
        metavar="BOOL",
        help="read the next expert into RAM while the current one denoises",
    )
    resident_blocks: int | None = setting(
        None,
        group="memory",
        range=(0, 1000),
        metavar="N",
        help="blocks of an expert that stay on the device; the others are streamed",
    )
    stream_from: Literal["ram", "disk"] | None = setting(
        None, group="memory", help="stream blocks from pinned RAM, or from their files"
    )
    chunk_tokens: int | None = setting(
        None,
        group="memory",
        range=(0, 2**31),
        metavar="N",
        recorded=True,
        help="MLP and projections run in chunks of this many tokens; 0: one chunk",
    )
    vae_tile: int | None = setting(
        None,
        group="memory",
        range=(0, 2**31),
        metavar="PIXELS",
        recorded=True,
        help="decode in tiles of this side; 0: full frames",
    )
    quantize: Quantization | Literal[""] = setting(
        "",
        group="memory",
        unset=None,
        recorded=True,
        fixed=True,
        help="quantise the blocks' Linear weights at load (default: as stored)",
    )
    quantize_layers: Literal["ffn", "all"] = setting(
        "ffn",
        group="memory",
        recorded=True,
        fixed=True,
        help="the feed-forward only, or attention too",
    )
    attention: str = setting(
        "auto",
        group="memory",
        metavar="KERNEL",
        recorded=True,
        help="auto, or a kernel that `wanflow doctor` lists",
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", group="memory", recorded=True, help="torch.compile per block; auto: where it pays"
    )
    text_cache: str | None = setting(
        None,
        group="memory",
        metavar="DIR",
        help="folder that caches encoded prompts (default: the user's cache); none: no cache",
    )
    machine_cache: str | None = setting(
        None,
        group="memory",
        metavar="DIR",
        help="folder of what was measured on this machine (default: the user's cache); none: none",
    )
    calibration: str | None = setting(
        None, group="memory", metavar="FILE", help="plan by what `wanflow bench` measured"
    )
    cfg_parallel: bool | None = setting(
        None, group="parallel", metavar="BOOL", help="half of the processes per guidance branch"
    )
    ring_size: int | None = setting(
        None,
        group="parallel",
        range=(1, 1024),
        metavar="N",
        help="processes that pass keys and values round (ring attention)",
    )
    ulysses_size: int | None = setting(
        None,
        group="parallel",
        range=(1, 1024),
        unset=1,
        metavar="N",
        help="processes that share the attention heads (Ulysses); 1 leaves it to the plan",
    )
    dit_fsdp: bool | None = setting(
        None, group="parallel", switch=True, help="shard the experts' weights over the processes"
    )

    def __post_init__(self) -> None:
        adopt(Runtime, self)
        check(Runtime, self)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of torch's dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def recorded(
    runtime: Runtime, device: torch.device, dtype: torch.dtype, kernel: str, layout: str
) -> dict[str, Any]:
    """Return what a recipe records of a runtime: all that changes a result, if only by rounding."""
    chosen = {"device": device.type, "dtype": dtype_name(dtype), "attention": kernel}
    names = {one.name: one.kind() for one in settings_of(Runtime).values() if one.recorded}
    return {
        name: chosen.get(name, getattr(runtime, name) or empty) for name, empty in names.items()
    } | {"layout": layout}


def runtime_of(recipe: Recipe, source: object = "a file") -> Runtime:
    """Return the runtime that a recipe records; what it does not record stays open.

    Args:
        recipe: of any version of wanflow.
        source: names its file in messages.

    Raises:
        RequestError: for a setting of another type, or out of range.
    """
    record = recipe.runtime
    values: dict[str, Any] = {
        one.name: (record[one.name] or None) if one.optional else record[one.name]
        for one in settings_of(Runtime).values()
        if one.recorded and one.name in record
    }
    values |= {"noise_device": recipe.noise_device, "cfg_batch": recipe.cfg_batch}
    try:
        return Runtime(**values)
    except RequestError as error:
        raise damaged(source, error) from None
