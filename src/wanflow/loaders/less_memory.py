"""Decide how a run goes on where memory ran out: in smaller chunks of tokens, in smaller tiles.

One process tries again by itself, and only what changes nothing but rounding. Ranks do not: the one
that ran out has left a pass in which the others wait for it, and no rank can call them out of a
collective. They end together, and their last words name what takes less.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Protocol

from wanflow.out_of_memory import cause, is_out_of_memory, listed
from wanflow.presets import Expert, ModelSpec
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    import torch

    from wanflow.parallel.groups import ParallelContext

Stage = Literal["picture", "prompts", "expert", "step", "decode"]
NAMES: dict[Stage, str] = {
    "picture": "encoding the pictures",
    "prompts": "encoding the prompts",
    "expert": "reading an expert",
    "step": "a denoising step",
    "decode": "decoding",
}
# The second part helps little more; a command that goes on with a run may still ask for it.
CHUNKS, FEWER_TOKENS = (8192, 2048), (512, 128, 32)
TILES, SMALLER_TILES = (512, 256), (128, 64)

logger = logging.getLogger("wanflow")


class Parts(Protocol):
    """What holds a model in memory: `LoadedParts`."""

    spec: ModelSpec
    runtime: Runtime
    device: torch.device
    ctx: ParallelContext | None
    keep: bool
    go_on_with: dict[str, Any]

    def holds(self, which: Expert) -> bool:
        """Return whether an expert is in memory."""


def next_try(error: BaseException, parts: Parts, stage: Stage, size: int) -> dict[str, int]:
    """Return settings that take less memory, to try again with; {} where the error is to be raised.

    An error that is raised for want of memory gets a note that names what takes less, and
    `parts.go_on_with` what another process takes to go on with the run.

    Args:
        error: that ended the work.
        parts: the model.
        stage: what the work was.
        size: tokens of a step; the longest side of a frame of a decode.
    """
    if not is_out_of_memory(error):
        return {}
    smaller = _smaller(parts, stage, size, CHUNKS if stage == "step" else TILES)
    if smaller and parts.ctx is None:
        ((name, value),) = smaller.items()
        pieces = "chunks of %d tokens" if name == "chunk_tokens" else "tiles of %d pixels"
        logger.warning(
            "out of memory in %s (%s): going on in %s (--%s %d), which changes the result by"
            " rounding",
            *(NAMES[stage], cause(error), pieces % value, name, value),
        )
        return smaller
    give_way(parts, stage, size)
    others = [_flag(name, value) for name, value in parts.go_on_with.items()]
    error.add_note(f"in {NAMES[stage]}: {listed([*others, *_later(parts, stage, others)])}")
    return {}


def makes_room(error: BaseException, parts: Parts) -> bool:
    """Return whether to encode pictures again, once the experts have been freed; say so."""
    held = any(parts.holds(expert) for expert in parts.spec.expert_names)
    if not held or parts.ctx is not None or not is_out_of_memory(error):
        return False
    logger.warning(
        "out of memory in %s (%s): going on without the experts, which are read again",
        *(NAMES["picture"], cause(error)),
    )
    return True


def give_way(parts: Parts, stage: Stage, size: int) -> None:
    """Set what another process takes to go on with a run, after memory ran out here or elsewhere.

    Each time it is one step further, so that no plan that failed is made again.
    """
    runtime, layers = parts.runtime, parts.spec.dit.num_layers
    ways: list[dict[str, Any]] = []
    if stage == "prompts" and not runtime.t5_cpu and parts.device.type != "cpu":
        ways.append({"t5_cpu": True})
    if stage == "step":
        ways.append(_smaller(parts, stage, size, CHUNKS))
    if stage in ("step", "expert", "picture") and parts.keep:
        ways.append({"offload_model": True})
    if stage in ("step", "expert"):
        resident = layers if runtime.resident_blocks is None else runtime.resident_blocks
        if resident and not runtime.dit_fsdp:
            ways.append({"resident_blocks": resident // 2})
    if stage == "step":
        ways.append(_smaller(parts, stage, size, FEWER_TOKENS))
    if stage == "decode":
        # Tiles are for one process, and a strip of several ranks may be smaller than the first.
        tiles = TILES + SMALLER_TILES if parts.ctx is None else TILES[-1:] + SMALLER_TILES
        ways.append(_smaller(parts, stage, size, tiles))
    parts.go_on_with = next((way for way in ways if way), {})


def _smaller(parts: Parts, stage: Stage, size: int, tries: tuple[int, ...]) -> dict[str, int]:
    """Return the first of some chunks, or tiles, that is smaller than the present one."""
    if stage not in ("step", "decode"):
        return {}
    name = "chunk_tokens" if stage == "step" else "vae_tile"
    now = getattr(parts.runtime, name) or size
    return next(({name: one} for one in tries if one < min(now, size)), {})


def _later(parts: Parts, stage: Stage, named: list[str]) -> list[str]:
    """Return what else takes less, for a run that is begun again."""
    ways = []
    if stage in ("step", "expert") and not parts.runtime.dit_fsdp:
        ways.append("--resident_blocks")
    if parts.keep:
        ways.append("--offload_model True")
    if stage in ("step", "expert") and not parts.runtime.quantize:
        ways.append("--quantize fp8")
    return [way for way in ways if not any(flag.startswith(way) for flag in named)]


def _flag(name: str, value: object) -> str:
    return f"--{name}" if name == "t5_cpu" else f"--{name} {value}"
