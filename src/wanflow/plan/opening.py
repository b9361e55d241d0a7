"""From a model's name to a pipeline that fits the machine: `wanflow.load`."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from wanflow.assemble import Report, assemble, resolve
from wanflow.config import Request, RequestError, Runtime
from wanflow.pipeline import Pipeline
from wanflow.plan.starting import guard, planned
from wanflow.weights.layouts import PARTS

logger = logging.getLogger("wanflow")


def load(
    model: str | Path | None = "nano", report: Report | None = None, plan_for: Request | None = None, force: bool = False, **options: Any
) -> Pipeline:
    """A pipeline for a model, run in the way that is best for it on this machine.

    Args:
        model: `"nano"`, or a folder in any layout, or a repository's name if Hugging Face's cache has it.
        report: called while weights are read, with (what, bytes done, bytes in all).
        plan_for: the largest request that will be made; None: the model's default size and length.
        force: load although the machine is too small for that.
        options: high, low, t5, vae, tokenizer: files in place of the model's own; and the fields of `wanflow.Runtime` (device, dtype,
            resident_blocks, quantize, ...); what is left out is settled for the machine.

    Raises:
        RequestError: when weights are missing or damaged, or the machine is too small or lacks what was asked for.
    """
    given = {part: options.pop(part) for part in PARTS if options.get(part) is not None}
    unknown = sorted(set(options) - {f.name for f in fields(Runtime)})
    if unknown:
        known = ", ".join([*(f.name for f in fields(Runtime)), *PARTS])
        raise RequestError(f"load does not know {', '.join(unknown)}; it knows {known}")
    checkpoint = resolve(model, given)
    for note in checkpoint.notes:
        logger.warning(note)
    runtime = Runtime(**options)
    plan = planned(checkpoint, runtime, plan_for) if force else guard(checkpoint, runtime, plan_for)
    return assemble(checkpoint, plan.runtime, report)
