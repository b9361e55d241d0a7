"""Keep the saved states of runs apart, and say how to go on with one."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli.flags import again_flags, generate_flags
from wanflow.cli.parser import Parser
from wanflow.config import RequestError
from wanflow.described import described
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.settings import settings_of
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from wanflow.pipeline import Run

# What a saved run has decided, or what belongs to the command that began it.
BEGUN = ("preset", "sample_guide_scale", "recipe", "config", "resume", "save_file", "task")


def is_of(run: Run, file: Path) -> bool:
    """Return whether a file is a saved state of this very run."""
    from wanflow.pipeline import Run

    try:
        return Run.header(file)[2] == run.id
    except RequestError:
        return False


def refuse_another(args: argparse.Namespace, file: Path, run: Run | None) -> None:
    """Raise RequestError where a run would save its state over that of another.

    Args:
        args: of the command.
        file: where it would save.
        run: that was saved earlier; None: it begins.
    """
    from wanflow.pipeline import Run

    if not os.path.lexists(file) or (run is not None and is_of(run, file)):
        return
    shown, ways = printable(file), "delete it, or name another --save_file"
    try:
        other = Run.load(file)
    except RequestError:
        raise RequestError(
            f"{shown} exists and is no saved run; this run would save its state there: {ways}"
        ) from None
    request = other.request
    raise RequestError(
        f"{shown} holds another run: step {other.state.index} of {request.sample_steps}, seed"
        f" {request.seed}, {printable(request.prompt, 60)!r}; go on with it"
        f" ({continuing(argparse.Namespace(), other, file)}), {ways}"
    )


def continuing(args: argparse.Namespace, run: Run, file: Path, target: Path | None = None) -> str:
    """Return the command that goes on with a saved run.

    Args:
        args: of the command that made it; what they say of placement and outputs is kept.
        run: the saved run.
        file: where it is.
        target: the video to write; None leaves the name to the command.
    """
    parser = Parser(prog="wanflow")
    if run.finished:
        words = ["decode", _path(file)]
        again_flags(parser)
    else:
        words = ["generate", "--resume", _path(file)]
        generate_flags(parser)
    if target is not None:
        words += ["--save_file", _path(target)]
    decided = {one.flags[0] for one in settings_of(Request).values() if one.flags}
    decided |= {one.flags[0] for one in settings_of(Runtime).values() if one.fixed}
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if (
            value != action.default
            and action.dest not in decided | set(BEGUN)
            and not action.dest.startswith(("use_prompt", "prompt_"))
        ):
            words += [action.option_strings[0], *(() if action.nargs == 0 else _texts(value))]
    return shlex.join([*_launcher(args), *words])


def _path(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)  # no flag


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):  # of --parallel
        return ["x".join(f"{name}{count}" for name, count in value.items()) or "auto"]
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _launcher(args: argparse.Namespace) -> list[str]:
    """Return what starts the command: torchrun where torchrun has started this one."""
    if getattr(args, "gpus", None) is not None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["wanflow"]
    ranks = described(os.environ)
    each = ranks.local_world_size or ranks.world_size
    nodes = [f"--nnodes={ranks.world_size // each}"] if ranks.world_size > each else []
    return ["torchrun", *nodes, f"--nproc_per_node={each}", "-m", "wanflow"]
