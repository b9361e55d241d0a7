"""Open a model by its name and fit it to this machine: `wanflow.load`."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wanflow.assemble import TINY, assemble, is_tiny, weights_in_float32
from wanflow.checkpoint.checkpoint import Checkpoint, open_checkpoint
from wanflow.checkpoint.parts import PARTS, Part
from wanflow.choices import all_resident, choose_device, with_defaults
from wanflow.config import RequestError
from wanflow.front import Display, Pipeline, RequestWarning, refuse_unknown, with_pictures
from wanflow.geometry import geometry_of, parse_size
from wanflow.loaders.parts import Report
from wanflow.presets import EMBEDDED
from wanflow.request import CompleteRequest, Request
from wanflow.runtime import Runtime
from wanflow.untrusted import shown, user_path
from wanflow.wording import in_fields, without_flags

if TYPE_CHECKING:
    from typing import Unpack

    from wanflow.options import LoadOptions
    from wanflow.parallel.ranks import DistInfo

logger = logging.getLogger("wanflow")


def resolve(
    model: str | os.PathLike[str] | None, given: Mapping[Part, str | Path] | None = None
) -> Checkpoint:
    """Return the opened files of a model.

    Args:
        model: `"nano"` or `"nano-i2v"`, the embedded miniatures; a name like
            `"Wan-AI/Wan2.2-T2V-A14B"` for its copy in Hugging Face's cache; otherwise a folder in
            any layout. None: only `given`.
        given: files that replace single parts (high, low, dit, t5, vae, tokenizer).

    Raises:
        RequestError: when something is missing, damaged or of another model.
    """
    parts = {part: user_path(path) for part, path in (given or {}).items()}
    if str(model) in EMBEDDED:
        return open_checkpoint(EMBEDDED[str(model)], parts)
    if model is None:
        if not parts:
            raise RequestError(
                "no model is named: give its folder, nano, or its files (high, low, t5, vae,"
                " tokenizer; dit in place of high and low for TI2V-5B)"
            )
        return open_checkpoint(next(iter(parts.values())).parent, parts)
    folder = user_path(model)
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        from wanflow.download.fetch import cached

        found = cached(str(model))
        if found is None:
            raise RequestError(
                f"{model} is neither a folder here nor whole in Hugging Face's cache; get it with"
                f" `hf download {model}`, or the official weights into a folder with `wanflow"
                " download`"
            )
        folder = found
    return open_checkpoint(folder, parts)


def settle(
    checkpoint: Checkpoint,
    runtime: Runtime,
    request: Request | None = None,
    force: bool = False,
    info: DistInfo | None = None,
    report: Callable[[str], object] = str,
    decoding: bool = False,
) -> tuple[Runtime, tuple[str, ...]]:
    """Return the runtime with nothing left open, and reasons that are worth reading.

    Args:
        checkpoint: the model's files.
        runtime: the settings so far.
        request: the largest that will be made; None: the model's default size and length.
        force: return it even if this machine is too small.
        info: one of several ranks, for all of which this decides; None: the process is alone.
        report: called with what is planned next.
        decoding: a finished latent can be decoded where a denoising step would not run.

    Raises:
        RequestError: when the machine is too small, or for settings that exclude each other.
    """
    runtime = replace(runtime, device=str(choose_device(runtime.device)))
    layout = runtime.cfg_parallel, (runtime.ring_size or 1) > 1, (runtime.ulysses_size or 1) > 1
    if info is None and not any(layout) and is_tiny(checkpoint, runtime, request):
        alone = with_defaults(runtime, cfg_parallel=False, ring_size=1, ulysses_size=1)
        on_gpu = runtime.device.startswith("cuda")
        return all_resident(alone, checkpoint.spec.dit.num_layers, on_gpu), ()
    # The plan and its tables are for models that may not fit.
    from wanflow.plan.start import make_plan

    processes, per_machine = 1, None
    if info is not None:
        from wanflow.parallel.ranks import local_world_size

        processes, per_machine = info.world_size, local_world_size()
    how = processes, per_machine, force, report, decoding
    plan = make_plan(checkpoint, runtime, request, *how, least_free=info.gpu_free if info else 0)
    return plan.runtime, plan.reasons if plan.need or processes > 1 else ()


def admission(
    checkpoint: Checkpoint, runtime: Runtime, planned: Request | None = None
) -> Callable[[CompleteRequest], None]:
    """Return what refuses a request that a loaded model cannot run here.

    Args:
        checkpoint: the model's files.
        runtime: how it was loaded.
        planned: the largest request that a model which is not tiny was loaded for.
    """
    tiny, spec = weights_in_float32(checkpoint) <= TINY, checkpoint.spec
    size = parse_size((planned and planned.size) or spec.size, geometry_of(spec))
    frames = (planned and planned.frame_num) or spec.frame_num

    def admit(request: CompleteRequest) -> None:
        known = not tiny and request.frame_num <= frames and prod(request.size) <= prod(size)
        if known or is_tiny(checkpoint, runtime, request):
            return
        from wanflow.plan.start import make_plan

        try:
            make_plan(checkpoint, runtime, request, loaded=not tiny)
        except RequestError as error:
            if tiny:
                raise
            width, height = request.size
            raise RequestError(
                f"{error.args[0]}; load the model for it: plan_for=wanflow.Request(prompt,"
                f" size=({width}, {height}), frame_num={request.frame_num})"
            ) from None

    return admit


def load(
    model: str | os.PathLike[str] | None = "nano",
    report: Report | None = None,
    plan_for: Request | None = None,
    force: bool = False,
    progress: bool = True,
    **options: Unpack[LoadOptions],
) -> Pipeline:
    """Return a pipeline for a model, with the settings that fit this machine.

    The processes of torchrun share the work. Each must make the same calls with the same arguments;
    the seed, the callback and the video are those of rank 0.

    Args:
        model: `"nano"` or `"nano-i2v"`, or a folder in any layout, or a repository's name if
            Hugging Face's cache has it.
        report: called while weights are read, with (what, bytes done, bytes in all), in place of a
            bar.
        plan_for: the largest request that will be made; None: the model's default size and length.
        force: load although the machine is too small for that.
        progress: show bars on a terminal or in a notebook, while weights are read and while videos
            are made.
        options: high, low, dit, t5, vae, tokenizer: files in place of the model's own; and the
            fields of `wanflow.Runtime` (device, dtype, resident_blocks, quantize, ...); what is
            left out is settled for the machine.

    Raises:
        RequestError: when weights are missing or damaged, or the machine is too small or lacks what
            was asked for.
    """
    settings: dict[str, Any] = {**options}
    refuse_unknown("load", settings, [*(f.name for f in fields(Runtime)), *PARTS])
    given = {part: settings.pop(part) for part in PARTS if settings.get(part) is not None}
    _check_types(model, report, plan_for, given)
    from wanflow.parallel import ranks

    one_thread_after_fork()
    with without_flags():
        runtime, info = Runtime(**settings), None
        if ranks.rank_and_world_size()[1] > 1:
            info = ranks.join_group(choose_device(runtime.device, alone=False))
            runtime = replace(runtime, device=str(info.device))
        checkpoint = resolve(model, given)
        plan_for = None if plan_for is None else with_pictures(plan_for)
        if info is None or info.rank == 0:
            for note in checkpoint.notes:
                warnings.warn(in_fields(note), RequestWarning, stacklevel=2)
        display = Display(progress and (info is None or info.rank == 0))
        report = report or display.report
        if info is None:
            settled, _ = settle(checkpoint, runtime, plan_for, force)
            admit = None if force else admission(checkpoint, settled, plan_for)
            return assemble(checkpoint, settled, report, admit=admit, display=display)
        settled, _ = ranks.broadcast_from_rank0(
            info, lambda: settle(checkpoint, runtime, plan_for, force, info)
        )
        report = report if info.rank == 0 else None
        return assemble(checkpoint, settled, report, info, display=display)


def _check_types(model: object, report: object, plan_for: object, given: dict[Any, Any]) -> None:
    """Raise RequestError for arguments of `load` that are of another kind."""
    for name, value in {"model": model, **given}.items():
        if value is not None and not isinstance(value, str | os.PathLike):
            raise RequestError(f"{name} must be the name of a file or folder (got {shown(value)})")
    if report is not None and not callable(report):
        raise RequestError(f"report must be a function (got {shown(report)})")
    if plan_for is not None and not isinstance(plan_for, Request):
        raise RequestError(f"plan_for must be a wanflow.Request (got {shown(plan_for)})")


@cache
def one_thread_after_fork() -> None:
    """Keep a forked child from waiting for the threads of its parent, which it does not have."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
