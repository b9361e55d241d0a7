"""Run a job to its video, with its state on disk until the video exists."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.config import RequestError
from wanflow.described import described

if TYPE_CHECKING:
    from wanflow.api import Pipeline
    from wanflow.cli.output import Output
    from wanflow.pipeline import Progress, Run
    from wanflow.screen import Screen

STATE_SUFFIX = ".latent.safetensors"
SAVE_SECONDS = 5.0  # between two saved states: a crash costs at most this much work and one step


def world_size() -> int:
    """Return how many ranks the environment describes; 1 where it describes none."""
    return described(os.environ).world_size


class StateKeeper:
    """Saves a run every few seconds, and when it is aborted; goes on where the disk is full.

    stored: the step of the state that is on the disk; None before the first.
    """

    def __init__(self, run: Run, file: Path, target: Path, screen: Screen, output: Output) -> None:
        self.run, self.file, self.target = run, file, target
        self.screen, self.output = screen, output
        self.saved, self.warned = time.monotonic(), False
        self.stored: int | None = None

    def __call__(self, progress: Progress) -> bool:
        """Take the state after a step."""
        self.run = progress.run
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.try_to_save()
        return True

    def save(self) -> None:
        """Write the state; raises OSError where the disk refuses."""
        self.run.save(self.file)
        self.stored = self.run.state.index

    def try_to_save(self) -> None:
        """Write the state; where the disk refuses, say so once and leave it for the next time."""
        try:
            self.save()
        except OSError as error:
            if not self.warned:
                self.screen.say(f"the state of the run is not saved for now: {error}")
            self.warned = True
        self.saved = time.monotonic()

    def on_abort(self) -> None:
        """Save the run, and print how to continue it."""
        step = self.run.state.index
        if step == 0:
            return
        self.save()
        file, target = (shlex.quote(str(path)) for path in (self.file, self.target))
        command = f"wanflow generate --resume {file} --save_file {target}"
        self.output.document |= {"state": str(self.file), "step": step, "resume": command}
        self.screen.say(self.output.so_far(self.screen))
        self.output.alert(
            f"stopped at step {step} of {self.run.request.sample_steps}; go on with: {command}"
        )


def run_and_save(
    pipe: Pipeline, run: Run, target: Path | None, args: argparse.Namespace, screen: Screen
) -> None:
    """Denoise, decode and write on rank 0; the run's state stays on disk until the video exists.

    Args:
        pipe: the loaded model.
        run: begun, or saved earlier.
        target: the video to write; None names it after the run.
        args: of the command.
        screen: shows progress.
    """
    from wanflow.sanity import OutputError
    from wanflow.video import save_frames

    ctx = pipe.parts.ctx
    if ctx is not None:
        args.watchdog.progress = lambda: ctx.stats.entered
    pipe.check(run)
    if ctx is not None and ctx.info.rank > 0:
        for _ in pipe.frames(pipe.resume(run)):
            pass
        return
    outputs = claim_outputs(run, target, args)
    target, state_file = outputs.video, outputs.state
    overwrite = args.overwrite and target.exists()  # it replaces what is there now
    screen.begin(run, pipe.spec, target)
    keeper = StateKeeper(run, state_file, target, screen, args.output)

    def abort() -> None:
        try:
            keeper.on_abort()
        finally:
            args.claims.close()  # one rank of several ends without leaving any `with` block

    args.watchdog.on_abort = abort
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with screen.denoising(run) as on_step:
            run = pipe.resume(run, lambda progress: keeper(progress) and on_step(progress))
        keeper.run = run
        keeper.try_to_save()
        frames = pipe.frames(run, screen.decoding())
        save_frames(target, frames, run.request.fps, run.recipe.to_json(), overwrite)
    except (OSError, OutputError, RequestError):
        args.watchdog.on_abort = args.claims.close
        if run.finished and keeper.stored != run.state.index:
            keeper.try_to_save()  # the unfinished video is gone, so there may be room
        if run.finished and keeper.stored == run.state.index:
            command = f"wanflow decode {shlex.quote(str(state_file))}"
            args.output.document |= {"state": str(state_file), "resume": command}
            args.output.alert(
                f"the finished latent is stored in {state_file}; finish it with: {command}"
            )
        raise
    args.watchdog.on_abort = args.claims.close
    for file in {state_file, getattr(args, "resume", None) or state_file}:
        file.unlink(missing_ok=True)
    if outputs.sheet is not None:
        from wanflow.clipfiles import contact_sheet, read_frames

        contact_sheet(read_frames(target)[0], outputs.sheet, overwrite=args.overwrite)
        args.output.document["contact_sheet"] = str(outputs.sheet)
        screen.say(f"frames {outputs.sheet}")
    args.output.result(target, screen, recipe=run.recipe.to_json(), seed=run.request.seed)


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes; all are claimed. sheet: only where it is asked for."""

    video: Path
    state: Path
    sheet: Path | None


def claim_outputs(run: Run, target: Path | None, args: argparse.Namespace) -> Outputs:
    """Check and claim every file that a run will write, before its first step.

    Args:
        run: knows the number of frames, and what an automatic name is made of.
        target: the video; None gives it an automatic name that is free.
        args: of the command; `claims` holds the names until the process ends.

    Raises:
        RequestError: for a file that cannot be written, or that another run is making.
    """
    from wanflow.media import check_target
    from wanflow.outputs import refuse_without_room

    single = run.request.frame_num == 1
    if target is None:
        target = args.claims.take_free(map(_derived, automatic_targets(run)))
    elif single and args.save_file is None:
        target = target.with_suffix(".png")
    video, state, sheet = _derived(target)
    check_target_name(video, args.overwrite, run.request.frame_num)
    check_target(state, overwrite=True)
    if args.contact_sheet:
        check_target(sheet, args.overwrite)
    for path in (video, state, *([sheet] if args.contact_sheet else [])):
        args.claims.take(path)
    # A solver holds up to four tensors of the latent's size.
    refuse_without_room(state, 4 * run.state.x.nbytes, "the state of the run")
    return Outputs(video, state, sheet if args.contact_sheet else None)


def _derived(target: Path) -> tuple[Path, Path, Path]:
    """Return a video with its state and its contact sheet."""
    state = target.with_name(target.stem + STATE_SUFFIX)
    return target, state, target.with_name(target.stem + "_sheet.png")


def check_target_name(path: Path, overwrite: bool, frames: int | None = None) -> None:
    """Raise RequestError for a video of so many frames that cannot be written there."""
    from wanflow.encoding import check_output

    check_output(path, overwrite, frames)


def automatic_targets(run: Run) -> Iterator[Path]:
    """Yield names made of the model, the size, the prompt, the seed and the time."""
    from wanflow.outputs import automatic_names

    name = "nano" if run.recipe.model.name == "nano" else "t2v-A14B"
    asked, suffix = run.request, ".png" if run.request.frame_num == 1 else ".mp4"
    return automatic_names(name, asked.size, asked.prompt, asked.seed, datetime.now(), suffix)
