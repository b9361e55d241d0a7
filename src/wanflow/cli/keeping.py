"""Keep the saved states of runs apart, and say how to go on with one."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wanflow.cli.flags import again_flags, generate_flags
from wanflow.cli.parser import Parser
from wanflow.config import RequestError
from wanflow.described import described
from wanflow.keeping import STATE_SUFFIX, Keeper, is_of
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.settings import settings_of
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from wanflow.cli.output import Output
    from wanflow.pipeline import Run

# What a saved run has decided, or what belongs to the command that began it.
BEGUN = ("preset", "sample_guide_scale", "recipe", "config", "resume", "save_file", "task")


class StateKeeper(Keeper):
    """Keeps the run of a command, and says how to go on with it.

    file: that holds the state.

    Args:
        run: the run, whose state is kept on the CPU from then on.
        file: where to save it; if another run saves there meanwhile, a name beside it.
        go_on: returns the command that goes on with a run that is saved in a file.
        output: of the command.
        source: the file that the run was read from.
    """

    def __init__(
        self,
        run: Run,
        file: Path,
        go_on: Callable[[Run, Path], str],
        output: Output,
        source: Path | None = None,
    ) -> None:
        super().__init__(run, file, output.alert, None if source is None else run.state.index)
        self._go_on, self._output = go_on, output
        self.file = source or file

    def write(self, run: Run) -> None:
        """Write a state to its place, or beside what another run has put there."""
        if os.path.lexists(self.place) and not is_of(run, self.place):
            stem = self.place.name.removesuffix(STATE_SUFFIX)
            beside = self.place.with_name(f"{stem}-{run.id}{STATE_SUFFIX}")
            self.alert(f"{self.place} is another run's now; this one is saved in {beside}")
            self.place = beside
        super().write(run)
        self.file = self.place

    def on_abort(self) -> bool:
        """Save the run and print how to go on with it; return whether there is a state."""
        step, steps = self.run.state.index, self.run.request.sample_steps
        if step == 0:
            return False
        self.save()
        command = self._go_on(self.run, self.file)
        self._output.document |= {"state": str(self.file), "step": step, "resume": command}
        self._output.spent()
        self._output.alert(
            f"the finished latent is stored in {self.file}; finish it with: {command}"
            if self.run.finished
            else f"stopped at step {step} of {steps}; go on with: {command}"
        )
        return True

    def remove(self, *others: Path | None) -> None:
        """Delete the state, and others of this run; nothing of another run's."""
        self.wait()
        for file in {self.place, *filter(None, others)}:
            if is_of(self.run, file):
                file.unlink()


def free_name(target: Path, run: Run, overwrite: bool) -> Path:
    """Return a name for a run's video: the given one, or one beside it if that is taken by now."""

    def free(name: Path) -> bool:
        state = state_of(name)
        ours = not os.path.lexists(state) or is_of(run, state)
        return ours and ((overwrite and name == target) or not os.path.lexists(name))

    names = (target.with_name(f"{target.stem}-{number}{target.suffix}") for number in count(2))
    return next(name for name in chain([target], names) if free(name))


def state_of(target: Path) -> Path:
    """Return where the state of a video's run is kept."""
    return target.with_name(target.stem + STATE_SUFFIX)


def sheet_of(target: Path) -> Path:
    """Return where the contact sheet of a video is."""
    return target.with_name(target.stem + "_sheet.png")


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


def continuing(
    args: argparse.Namespace,
    run: Run,
    file: Path,
    target: Path | None = None,
    instead: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Return the command that goes on with a saved run.

    Args:
        args: of the command that made it; what they say of placement and outputs is kept.
        run: the saved run.
        file: where it is.
        target: the video to write; None leaves the name to the command.
        instead: values in place of those of flags, since memory ran out with those. Several ranks
            decode in strips: tiles are for one process.
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
    begun = getattr(args, "resume", ...) is None and not args.trust_paths
    if run.request.lora and begun:
        words.append("--trust_paths")  # flags of the command that began it named these files
    decided = {one.flags[0] for one in settings_of(Request).values() if one.flags}
    decided |= {one.flags[0] for one in settings_of(Runtime).values() if one.fixed}
    start = launcher(args)
    if "vae_tile" in instead:
        parallel = (one for one in settings_of(Runtime).values() if one.group == "parallel")
        decided |= {"gpus", "parallel", *(one.flags[0] for one in parallel)}
        start = ["wanflow"]
    for action in parser._actions:
        value = instead.get(action.dest, getattr(args, action.dest, action.default))
        if (
            value != action.default
            and action.dest not in decided | set(BEGUN)
            and not action.dest.startswith(("use_prompt", "prompt_"))
        ):
            words += [action.option_strings[0], *(() if action.nargs == 0 else _texts(value))]
    return shlex.join([*start, *words])


def _path(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)  # no flag


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):  # of --parallel
        return ["x".join(f"{name}{count}" for name, count in value.items()) or "auto"]
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def launcher(args: argparse.Namespace) -> list[str]:
    """Return what starts the command: torchrun where torchrun has started this one."""
    if getattr(args, "gpus", None) is not None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["wanflow"]
    ranks = described(os.environ)
    each = ranks.local_world_size or ranks.world_size
    nodes = [f"--nnodes={ranks.world_size // each}"] if ranks.world_size > each else []
    return ["torchrun", *nodes, f"--nproc_per_node={each}", "-m", "wanflow"]


def again(args: argparse.Namespace) -> str:
    """Return the command line that goes on: the same one."""
    return shlex.join([*launcher(args), *args.argv])
