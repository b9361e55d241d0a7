"""The one home of tables and progress: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import atexit
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from wanflow.units import duration, file_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from wanflow.pipeline import OnPart, OnStep, Progress, Run
    from wanflow.presets import ModelSpec

EVERY = 2.0  # seconds between two lines of progress where there is no terminal
MANY = 100  # of a long task: a line for each percent of the time it has taken
DRAW = 0.1  # seconds between two updates of a bar


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return an aligned table as plain lines, the head first.

    Args:
        head: the names of the columns.
        rows: a cell for each column.
        align: a letter for each column, `l` or `r`.
    """
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    sides = [{"l": "<", "r": ">"}[letter] for letter in align]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]


def console(**known: Any) -> Console:
    """Return a console of rich that falls silent where its reader goes away, as `head` does."""
    import rich.console

    class Lasting(rich.console.Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the process, and its run
            self.quiet = True
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    return Lasting(**known)


def show_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print (style, text) on standard output, coloured on a terminal; also works without rich."""
    try:
        out = console(highlight=False, soft_wrap=True)
    except ImportError:
        print(*(text for _, text in lines), sep="\n")
        return
    for style, text in lines:
        out.print(text, style=style or None, markup=False)


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
    """Print a table on standard output: drawn on a terminal, as `table_lines` elsewhere."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    out = console(highlight=False)
    if not out.is_terminal:
        print(*table_lines(head, rows, align), sep="\n")
        return
    table = Table(box=SIMPLE)
    for name, letter in zip(head, align, strict=True):
        table.add_column(name, justify="right" if letter == "r" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


@dataclass
class _Task:
    """A task whose progress is shown."""

    what: str
    unit: str
    first: int  # what was done when it began
    began: float
    shown: float
    bar: TaskID | None = None

    def text(self, done: int, total: int, note: str) -> str:
        passed, moved = time.monotonic() - self.began, done - self.first
        if self.unit == "bytes":
            amount = f"{file_size(done)} of {file_size(total)}"
            rate = f"{file_size(moved / passed)}/s" if passed > 0 and moved > 0 else ""
        else:
            amount, rate = f"{self.unit} {done}/{total}".strip(), ""
        left = f"ETA {duration(passed / moved * (total - done))}" if moved > 0 else ""
        return ", ".join(part for part in (amount, note, rate, left) if part)


class Screen:
    """Messages and progress for people, on standard error.

    On a terminal all tasks under way share one display, which ends with the `with` block.

    Args:
        quiet: show nothing, as ranks other than 0 do.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._tasks: dict[str, _Task] = {}
        self._bars: Bars | None = None
        self._staged = time.monotonic()
        self._lock = RLock()  # weights are also read in a thread

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the display; the next call of `progress` begins another."""
        if self._bars is not None:
            self._bars.stop()
            atexit.unregister(self._bars.stop)
        self._tasks, self._bars = {}, None

    def say(self, text: str) -> None:
        """Print a message."""
        self.console.print(text, markup=False)

    def stage(self, text: str) -> None:
        """Show what is being done now, where no ETA is known."""
        if self.console.is_terminal:
            self.progress(text, 0, 0)
            for what in [what for what in self._tasks if what != text]:
                self._end(what)
        elif time.monotonic() - self._staged > EVERY:
            self.say(text)
            self._staged = time.monotonic()

    def progress(
        self,
        what: str,
        done: int,
        total: int,
        unit: str = "",
        note: str = "",
        last_line: bool = False,
    ) -> None:
        """Show how far a task is; its first call begins it, and `done == total` ends it.

        Args:
            what: the task, in words.
            done: bytes, steps or parts that are finished.
            total: all of them; 0 is unknown.
            unit: "bytes", or the word before the number (`step 3/40`).
            note: what else to show.
            last_line: print a line at the end of a short task too.
        """
        with self._lock:
            self._progress(what, done, total, unit, note, last_line)

    def _progress(
        self, what: str, done: int, total: int, unit: str, note: str, last_line: bool
    ) -> None:
        task, now, ends = self._tasks.get(what), time.monotonic(), 0 < total <= done
        if task is None:
            task = self._tasks[what] = _Task(what, unit, done, now, now)
            if self.console.is_terminal and not self.console.quiet:
                task.bar = self._display().add_task(what, total=total or None, text="")
        if task.bar is not None and self._bars is not None:
            if now - task.shown > DRAW or ends:
                text = task.text(done, total, note) if total else note
                self._bars.update(task.bar, completed=done, total=total or None, text=text)
                task.shown = now
        elif now - task.shown > max(EVERY, (now - task.began) / MANY) or (
            ends and (last_line or task.shown > task.began)
        ):
            self.say(f"{what}: {task.text(done, total, note)}" if total else what)
            task.shown = now
        if ends:
            self._end(what)

    def count_bytes(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that shows how many bytes of a task are done."""
        return lambda done, total: self.progress(what, done, total, "bytes")

    def _end(self, what: str) -> None:
        task = self._tasks.pop(what)
        if not self._tasks:
            self.close()  # the finished bar stays on the screen
        elif task.bar is not None and self._bars is not None:
            self._bars.remove_task(task.bar)

    def _display(self) -> Bars:
        from rich import progress as rich

        if self._bars is None:
            what = rich.TextColumn("{task.description}", markup=False)
            text = rich.TextColumn("{task.fields[text]}", markup=False)
            columns = (what, rich.BarColumn(bar_width=20), text, rich.TimeElapsedColumn())
            self._bars = rich.Progress(*columns, console=self.console)
            self._bars.start()
            atexit.register(self._bars.stop)  # gives the cursor back, however the process ends
        return self._bars

    # the stages of a generation

    def begin(self, run: Run, spec: ModelSpec, target: Path) -> None:
        from wanflow.sampling.schedule import snr
        from wanflow.sampling.timeline import handover, timeline

        request, recipe = run.request, run.recipe
        timed = timeline(request, spec)
        after = handover(timed, 0)
        switch = f", switch at SNR {snr(after.sigma):.4f}" if after else ""
        counts = Counter(step.expert for step in timed)
        split = ", ".join(f"{counts[name]} {name}-noise" for name in spec.expert_names)
        self.say(
            f"{recipe.model.name} on {recipe.runtime['device']} in {recipe.runtime['dtype']},"
            f" seed {request.seed}"
        )
        what = (
            f"{request.size[0]}*{request.size[1]}, {request.frame_num} frames at"
            f" {request.fps:g} fps"
        )
        steps = f"{len(timed)} {request.sample_solver} steps: {split}{switch}"
        self.say(f"{what}; {steps} -> {target}")

    def loading(self, what: str, done: int, total: int) -> None:
        """Show how far the weights of a part are read; bytes."""
        self.progress(f"reading {what}", done, total, "bytes")

    @contextmanager
    def denoising(self, run: Run) -> Iterator[OnStep]:
        """Show the steps of a run while the block lasts."""
        what, total = "denoising", run.request.sample_steps
        self.progress(what, run.state.index, total, "step")

        def on_step(progress: Progress) -> None:
            note = f"{progress.expert}-noise expert, sigma {progress.sigma:.3f}"
            self.progress(what, progress.step, total, "step", note, last_line=True)

        with self:
            yield on_step

    def decoding(self) -> OnPart:
        """Return the callback that shows how far the VAE is."""
        self.progress("decoding", 0, 0, "part")
        return lambda done, total: self.progress("decoding", done, total, "part")
