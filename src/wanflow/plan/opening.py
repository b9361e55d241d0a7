"""From a model's name to a pipeline that fits the machine: `wanflow.load`."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from wanflow.assemble import Report, assemble, resolve
from wanflow.checkpoint.layouts import PARTS
from wanflow.config import RequestError
from wanflow.parallel import ranks as mesh
from wanflow.pipeline import Pipeline
from wanflow.plan.starting import make_plan, plan_or_raise
from wanflow.request import Request
from wanflow.runtime import Runtime, choose_device

logger = logging.getLogger("wanflow")


def load(
    model: str | Path | None = "nano",
    report: Report | None = None,
    plan_for: Request | None = None,
    force: bool = False,
    **options: Any,
) -> Pipeline:
    """A pipeline for a model, run in the way that is best for it on this machine.

    In a script that torchrun starts several times, the processes share the work. Each must make the
    same calls with the same arguments; the first one's seed, callback and video count.

    Args:
        model: `"nano"`, or a folder in any layout, or a repository's name if Hugging Face's cache
            has it.
        report: called while weights are read, with (what, bytes done, bytes in all).
        plan_for: the largest request that will be made; None: the model's default size and length.
        force: load although the machine is too small for that.
        options: high, low, t5, vae, tokenizer: files in place of the model's own; and the fields of
            `wanflow.Runtime` (device, dtype, resident_blocks, quantize, ...); what is left out is
            settled for the machine.

    Raises:
        RequestError: when weights are missing or damaged, or the machine is too small or lacks what
            was asked for.
    """
    given = {part: options.pop(part) for part in PARTS if options.get(part) is not None}
    unknown = sorted(set(options) - {f.name for f in fields(Runtime)})
    if unknown:
        known = ", ".join([*(f.name for f in fields(Runtime)), *PARTS])
        raise RequestError(f"load does not know {', '.join(unknown)}; it knows {known}")
    runtime, ranks = Runtime(**options), None
    if mesh.rank_and_world_size()[1] > 1:
        ranks = mesh.join_group(choose_device(runtime.device))
        runtime = replace(runtime, device=str(ranks.device))
    checkpoint = resolve(model, given)
    if ranks is None or ranks.rank == 0:
        for note in checkpoint.notes:
            logger.warning(note)
    decide = make_plan if force else plan_or_raise
    if ranks is None:
        return assemble(checkpoint, decide(checkpoint, runtime, plan_for).runtime, report)
    settled = mesh.broadcast_from_rank0(
        ranks, lambda: decide(checkpoint, runtime, plan_for, ranks.size, mesh.per_machine()).runtime
    )
    return assemble(checkpoint, settled, report if ranks.rank == 0 else None, ranks)
