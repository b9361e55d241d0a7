"""What the user sees while a run goes on: bars with an ETA on a terminal, a line every two seconds
elsewhere.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console

if TYPE_CHECKING:
    from wanflow.pipeline import OnPart, OnStep, Progress, Run
    from wanflow.presets import ModelSpec

EVERY = 2.0  # seconds between two lines


class Screen:
    """Where everything for people goes: standard error. One that does not speak shows nothing."""

    def __init__(self, speaks: bool = True) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not speaks)
        self._reading = ""
        self._began = self._told = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def begin(self, run: Run, spec: ModelSpec, target: Path) -> None:
        from wanflow.sampling.schedule import snr
        from wanflow.sampling.timeline import handover, timeline

        request, made = run.request, run.made_by
        timed = timeline(request, spec)
        after = handover(timed, 0)
        switch = f", switch at SNR {snr(after.sigma):.4f}" if after else ""
        counts = Counter(step.expert for step in timed)
        split = ", ".join(f"{counts[name]} {name}-noise" for name in spec.expert_names)
        self.say(
            f"{made['model']['name']} on {made['runtime']['device']} in {made['runtime']['dtype']},"
            f" seed {request.seed}"
        )
        what = (
            f"{request.size[0]}*{request.size[1]}, {request.frame_num} frames at"
            f" {request.fps:g} fps"
        )
        steps = f"{len(timed)} {request.sample_solver} steps: {split}{switch}"
        self.say(f"{what}; {steps} -> {target}")

    def loading(self, what: str, done: int, total: int) -> None:
        """Told while weights are read; speaks every two seconds."""
        now = time.monotonic()
        if what != self._reading:
            self._reading, self._began, self._told = what, now, now
        elif now - self._told > EVERY:
            rate = done / (now - self._began)
            self.say(
                f"reading {what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.1f} GB/s,"
                f" {(total - done) / rate:.0f} s left"
            )
            self._told = now

    def denoising(self, run: Run) -> Denoising:
        return Denoising(self, run)

    def decoding(self) -> OnPart:
        """What is told how far a decode is; speaks every two seconds."""
        began = told = time.monotonic()

        def on_part(done: int, parts: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told > EVERY:
                told = now
                self.say(
                    f"decoding: {100 * done // parts} %,"
                    f" {(now - began) / done * (parts - done):.0f} s left"
                )

        return on_part


class Denoising:
    """The bar over the steps: step, expert, ETA."""

    def __init__(self, screen: Screen, run: Run) -> None:
        self.screen, self.steps, self.first = screen, run.request.sample_steps, run.state.index
        self.live = screen.console.is_terminal
        self.began = self.told = time.monotonic()
        what, eta = bars.TextColumn("{task.description}"), bars.TextColumn("ETA")
        columns = (
            what,
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            eta,
            bars.TimeRemainingColumn(),
        )
        self.bar = bars.Progress(*columns, console=screen.console, disable=not self.live)
        self.task = self.bar.add_task("denoising", total=self.steps, completed=self.first)

    def __enter__(self) -> OnStep:
        self.bar.start()
        return self.on_step

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_step(self, told: Progress) -> None:
        self.bar.update(
            self.task,
            completed=told.step,
            description=f"{told.expert}-noise expert, sigma {told.sigma:.3f}",
        )
        now = time.monotonic()
        if not self.live and (now - self.told > EVERY or told.step == self.steps):
            left = (now - self.began) / (told.step - self.first) * (self.steps - told.step)
            self.screen.say(
                f"step {told.step}/{self.steps}  {told.expert}-noise expert  sigma {told.sigma:.3f}"
                f"  ETA {left:.0f} s"
            )
            self.told = now
