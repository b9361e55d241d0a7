"""Run a job to its video, with its state on disk until the video exists."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.cli.keeping import (
    StateKeeper,
    continuing,
    free_name,
    refuse_another,
    sheet_of,
    state_of,
)
from wanflow.described import described
from wanflow.files import remove
from wanflow.outputs import leftovers
from wanflow.presets import EMBEDDED

if TYPE_CHECKING:
    from wanflow.api import Pipeline
    from wanflow.cli.previewing import Preview
    from wanflow.pipeline import Progress, Run
    from wanflow.presets import ModelSpec
    from wanflow.screen import Screen


def world_size() -> int:
    """Return how many ranks the environment describes; 1 where it describes none."""
    return described(os.environ).world_size


def run_and_save(
    pipe: Pipeline,
    run: Run,
    target: Path | None,
    args: argparse.Namespace,
    screen: Screen,
    go_on: Callable[[Run, Path], str] | None = None,
) -> None:
    """Denoise, decode and write on rank 0; the run's state stays on disk until the video exists.

    Args:
        pipe: the loaded model.
        run: begun, or saved earlier.
        target: the video to write; None names it after the run.
        args: of the command.
        screen: shows progress.
        go_on: returns the command that goes on with a run saved in a file; None: that of this run.
    """
    from wanflow.sanity import OutputError
    from wanflow.video import save_frames

    ctx = pipe.parts.ctx
    if ctx is not None:
        args.watchdog.progress = ctx.stats.progress
    pipe.check(run)
    if ctx is not None and ctx.info.rank > 0:
        for _ in pipe.frames(pipe.resume(run)):
            pass
        return
    outputs = claim_outputs(run, pipe.spec, target, args)
    target = outputs.video
    overwrite = args.overwrite and target.exists()  # it replaces what is there now
    screen.begin(run, pipe.spec, target)
    source = getattr(args, "resume", None) or getattr(args, "latent", None)
    keeper = StateKeeper(
        run,
        outputs.state,
        go_on
        or (
            lambda run, file: continuing(
                args, run, file, free_name(target, run, args.overwrite), pipe.parts.instead()
            )
        ),
        args.output,
        source,
    )
    args.watchdog.on_abort = partial(_abort, pipe, keeper, outputs, args)
    try:
        preview = _preview(pipe, target, args, screen)
        with screen.denoising(run) as on_step:
            run = pipe.resume(run, _all(keeper, preview, on_step))
        keeper.take(run)
        keeper.try_to_save()
        frames = pipe.frames(run, screen.decoding())
        frames = chain([next(frames)], frames)  # from now on the recipe stands
        run = pipe.engine.used(run)
        save_frames(target, frames, run.request.fps, run.recipe.to_json(), overwrite)
    except OutputError:
        if not run.finished:  # its state is broken
            args.watchdog.on_abort = args.claims.close
        raise
    args.watchdog.on_abort = args.claims.close
    keeper.remove(getattr(args, "resume", None))
    if preview is not None:
        preview.conclude()
    try:
        if outputs.sheet is not None:
            from wanflow.clipfiles import contact_sheet, read_frames

            contact_sheet(read_frames(target)[0], outputs.sheet, overwrite=outputs.replaces)
            args.output.document["contact_sheet"] = str(outputs.sheet)
            screen.say(f"frames {outputs.sheet}")
    finally:  # the video is there, whatever becomes of its sheet
        args.output.result(target, screen, recipe=run.recipe.to_json(), seed=run.request.seed)


def _all(*watching: Callable[[Progress], object] | None) -> Callable[[Progress], None]:
    """Return a callback that calls several, in order."""

    def on_step(progress: Progress) -> None:
        for one in filter(None, watching):
            one(progress)

    return on_step


def _preview(
    pipe: Pipeline, target: Path, args: argparse.Namespace, screen: Screen
) -> Preview | None:
    """Return what draws the preview that is asked for."""
    if getattr(args, "preview", None) is None:
        return None
    from wanflow.cli.previewing import Preview

    return Preview(pipe, target, args, screen)


def _abort(pipe: Pipeline, keeper: StateKeeper, outputs: Outputs, args: argparse.Namespace) -> bool:
    """Save the run and give its names back; return whether there is a state of it."""
    instead = pipe.parts.instead
    try:
        run = keeper.run
        if ": out of memory" in args.watchdog.cause:  # in another rank
            pipe.parts.ran_out("decode" if run.finished else "step", run.request)
        known = {key: value for key, value in instead().items() if key in run.recipe.runtime}
        keeper.run = replace(run, recipe=replace(run.recipe, runtime=run.recipe.runtime | known))
        return keeper.on_abort()
    finally:
        # Where the main thread is stuck, no `with` block ends: what it was writing is this run's.
        for path in (outputs.video, outputs.state):
            for part in leftovers(path):
                remove(part)
        args.claims.close()


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes; all are claimed.

    sheet: only where it is asked for. replaces: whether one is there that may be replaced.
    """

    video: Path
    state: Path
    sheet: Path | None
    replaces: bool


def claim_outputs(
    run: Run, spec: ModelSpec, target: Path | None, args: argparse.Namespace
) -> Outputs:
    """Check and claim every file that a run will write, before its first step.

    Args:
        run: knows the number of frames, and what an automatic name is made of.
        spec: its model.
        target: the video; None gives it an automatic name that is free.
        args: of the command; `claims` holds the names until the process ends.

    Raises:
        RequestError: for a file that cannot be written, or that another run is making.
    """
    from wanflow.media import check_target
    from wanflow.outputs import refuse_without_room

    single = run.request.frame_num == 1
    if target is None:
        target = args.claims.take_free(map(_derived, automatic_targets(run, spec)))
    elif single and args.save_file is None:
        target = target.with_suffix(".png")
    video, state, sheet = _derived(target)
    check_target_name(video, args.overwrite, run.request.frame_num)
    refuse_another(args, state, run)
    check_target(state, overwrite=True)
    if args.contact_sheet:
        check_target(sheet, args.overwrite)
    for path in (video, state, *([sheet] if args.contact_sheet else [])):
        args.claims.take(path)
    # A solver holds up to four tensors of the latent's size.
    refuse_without_room(state, 4 * run.state.x.nbytes, "the state of the run")
    replaces = args.overwrite and sheet.exists()  # what is there now, and nothing that comes
    return Outputs(video, state, sheet if args.contact_sheet else None, replaces)


def _derived(target: Path) -> tuple[Path, Path, Path]:
    """Return a video with its state and its contact sheet."""
    return target, state_of(target), sheet_of(target)


def check_target_name(path: Path, overwrite: bool, frames: int | None = None) -> None:
    """Raise RequestError for a video of so many frames that cannot be written there."""
    from wanflow.encoding import check_output

    check_output(path, overwrite, frames)


def automatic_targets(run: Run, spec: ModelSpec) -> Iterator[Path]:
    """Yield names made of the model, the video's size, the prompt, the seed and the time."""
    from wanflow.outputs import automatic_names

    name = spec.name if spec.name in EMBEDDED else spec.task
    asked, suffix = run.request, ".png" if run.request.frame_num == 1 else ".mp4"
    return automatic_names(name, asked.size, asked.prompt, asked.seed, datetime.now(), suffix)
