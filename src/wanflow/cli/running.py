"""Run a job to its video, with its state on disk until the video exists."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from wanflow.config import RequestError

if TYPE_CHECKING:
    from wanflow.api import Pipeline
    from wanflow.pipeline import Progress, Run
    from wanflow.screen import Screen

STATE_SUFFIX = ".latent.safetensors"
SAVE_SECONDS = 5.0  # between two saved states: a crash costs at most this much work and one step


def world_size() -> int:
    """Return how many ranks the environment describes; 1 where it describes none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class StateKeeper:
    """Saves a run every few seconds, and when it is aborted."""

    def __init__(self, run: Run, file: Path, target: Path, screen: Screen) -> None:
        self.run, self.file, self.target, self.screen = run, file, target, screen
        self.saved = time.monotonic()

    def __call__(self, progress: Progress) -> bool:
        """Take the state after a step."""
        self.run = progress.run
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.run.save(self.file)
            self.saved = time.monotonic()
        return True

    def on_abort(self) -> None:
        """Save the run, and print how to continue it."""
        step = self.run.state.index
        if step == 0:
            return
        self.run.save(self.file)
        file, target = (shlex.quote(str(path)) for path in (self.file, self.target))
        self.screen.say(
            f"stopped at step {step} of {self.run.request.sample_steps}; go on with: wanflow"
            f" generate --resume {file} --save_file {target}"
        )


def run_and_save(
    pipe: Pipeline, run: Run, target: Path, args: argparse.Namespace, screen: Screen
) -> None:
    """Denoise, decode and write on rank 0; the run's state stays on disk until the video exists."""
    from wanflow.api import save_frames
    from wanflow.sanity import OutputError

    ctx = pipe.parts.ctx
    if ctx is not None:
        args.watchdog.progress = lambda: ctx.stats.entered
    pipe.check(run)
    if ctx is not None and ctx.info.rank > 0:
        for _ in pipe.frames(pipe.resume(run)):
            pass
        return
    if run.request.frame_num == 1 and args.save_file is None:
        target = target.with_suffix(".png")
    check_target_name(target, args.overwrite)
    screen.begin(run, pipe.spec, target)
    state_file = target.with_name(target.stem + STATE_SUFFIX)
    keeper = StateKeeper(run, state_file, target, screen)
    args.watchdog.on_abort = keeper.on_abort
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with screen.denoising(run) as on_step:
            run = pipe.resume(run, lambda progress: keeper(progress) and on_step(progress))
        run.save(state_file)
        frames = pipe.frames(run, screen.decoding())
        save_frames(target, frames, run.request.fps, run.recipe.to_json(), args.overwrite)
    except (OSError, OutputError, RequestError):
        args.watchdog.on_abort = None
        if run.finished and state_file.exists():
            screen.say(
                f"the finished latent is stored in {state_file}; finish it with: wanflow decode"
                f" {shlex.quote(str(state_file))}"
            )
        raise
    args.watchdog.on_abort = None
    for file in {state_file, getattr(args, "resume", None) or state_file}:
        file.unlink(missing_ok=True)
    screen.say(f"saved {target}")
    if args.contact_sheet:
        from wanflow.clipfiles import contact_sheet, read_frames

        sheet = target.with_name(target.stem + "_sheet.png")
        contact_sheet(read_frames(target)[0], sheet)
        screen.say(f"frames {sheet}")


def check_target_name(path: Path, overwrite: bool) -> None:
    """Raise RequestError for a video that cannot be written there."""
    from wanflow.media import check_target

    if path.suffix.lower() not in (".mp4", ".png"):
        raise RequestError(f"{path}: the name must end in .mp4, or .png for one frame")
    check_target(path, overwrite)


def default_target(run: Run) -> Path:
    """Return a name made of the model, the size, the prompt and the time."""
    from wanflow.media import safe_name

    name = "nano" if run.recipe.model.name == "nano" else "t2v-A14B"
    return Path(safe_name(name, run.request.size, run.request.prompt, datetime.now()))
