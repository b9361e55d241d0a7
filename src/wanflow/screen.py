"""The one home of tables and progress: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from wanflow.config import UNSHOWN
from wanflow.units import duration, file_size, measured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.text import Text

    from wanflow.pipeline import OnPart, OnStep, Progress, Run
    from wanflow.presets import ModelSpec

logger = logging.getLogger("wanflow")

EVERY = 2.0  # seconds between two lines of progress where there is no terminal
MANY = 100  # of a long task: a line for each percent of the time it has taken
DRAW = 0.1  # seconds between two updates of a bar
CLOCK = 80  # columns from which the time that has passed is shown
EVENT = 0.5  # seconds between two JSON lines of a task


def harmless(text: str) -> str:
    """Return a text as one line without characters that a terminal obeys or cannot show."""
    return UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text)


def _bar_width(columns: int) -> int:
    """Return how long bars are: a narrow terminal has numbers in their place."""
    return 20 if columns >= 100 else 10 if columns >= 60 else 0


def print_event(event: str, **facts: Any) -> None:
    """Print one JSON line on standard error."""
    print(json.dumps({"event": event, **facts}), file=sys.stderr, flush=True)


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return an aligned table as plain lines, the head first.

    Args:
        head: the names of the columns.
        rows: a cell for each column.
        align: a letter for each column, `l` or `r`.
    """
    rows = [[harmless(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    sides = [{"l": "<", "r": ">"}[letter] for letter in align]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def console(**known: Any) -> Console:
    """Return a console of rich that falls silent where its reader goes away, as `head` does."""
    import rich.console

    class Lasting(rich.console.Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the process, and its run
            self.quiet = True
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    return Lasting(highlight=False, emoji=False, **known)


def show_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print (style, text) on standard output, coloured on a terminal; also works without rich.

    Each is one line, whatever its text holds; a terminal gets it broken between words.
    """
    try:
        out = console()
    except ImportError:
        print(*(harmless(text) for _, text in lines), sep="\n")
        return
    for style, text in lines:
        for line in _folded(harmless(text), out.width if out.is_terminal else None):
            out.print(line, style=style or None, markup=False, soft_wrap=True)


def print_line(text: str) -> None:
    """Print a line on standard error, whatever bars are drawn there."""
    if sys.stderr is None:  # closed; `print` would take standard output
        return
    width = None
    if sys.stderr.isatty():
        with suppress(OSError):  # of a terminal that has no size
            width = os.get_terminal_size(sys.stderr.fileno()).columns or None
    print(*_folded(harmless(text), width), sep="\n", file=sys.stderr, flush=True)


def _folded(text: str, width: int | None) -> list[str]:
    """Return a text as lines, broken between words.

    A command stays whole, so that it can be copied.

    Args:
        text: one line.
        width: of the terminal; None is none, and breaks nothing.
    """
    if width is None or len(text) <= width or re.search(r"wanflow [a-z]", text):
        return [text]
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def show_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], align: str, out: Console | None = None
) -> None:
    """Print a table on standard output: drawn on a terminal, as `table_lines` elsewhere.

    On a terminal that is too narrow for its longest words, each row becomes a paragraph: no word is
    broken that fits in a line.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    out = out or console()
    if not out.is_terminal:
        print(*table_lines(head, rows, align), sep="\n")
        return
    columns = list(zip(head, *rows, strict=True))
    words = [
        [len(harmless(word)) for cell in column for word in cell.split()] for column in columns
    ]
    if sum(max(lengths, default=0) + 2 for lengths in words) + 2 > out.width:
        for line in _paragraphs(head, rows, align, out.width):
            out.print(line, soft_wrap=True)
        return
    table = Table(box=SIMPLE)
    for name, letter, lengths in zip(head, align, words, strict=True):
        side: Any = "right" if letter == "r" else "left"
        table.add_column(name, justify=side, min_width=max(lengths, default=0))
    for row in rows:
        table.add_row(*(Text(harmless(cell)) for cell in row))
    out.print(table)


def _paragraphs(
    head: Sequence[str], rows: Sequence[Sequence[str]], align: str, width: int
) -> Iterator[Text]:
    """Yield each row as lines: the first cells, then the others below them, numbers with names."""
    from rich.text import Text

    for row in rows:
        title, *cells = (harmless(cell) for cell in row)
        named = [
            f"{cell} {name}" if letter == "r" and cell.replace(",", "").isdigit() else cell
            for name, letter, cell in zip(head[1:], align[1:], cells, strict=True)
            if cell
        ]
        yield Text(title, "bold")
        # A short cell stays in one piece; \0 stands for its spaces.
        whole = [cell.replace(" ", "\0") if len(cell) < width // 2 else cell for cell in named]
        for cell in (whole[0], ", ".join(whole[1:])) if whole else ():
            lines = textwrap.wrap(cell, width - 2, break_long_words=False, break_on_hyphens=False)
            yield from (Text("  " + line.replace("\0", " ")) for line in lines)


@dataclass
class _Task:
    """A task whose progress is shown."""

    what: str
    unit: str
    first: int  # what was done when it began
    began: float
    shown: float
    bar: TaskID | None = None

    def text(self, done: int, total: int, note: str, width: int | None = None) -> str:
        """Return how far it is, in at most `width` columns where that is possible."""
        passed, moved = time.monotonic() - self.began, done - self.first
        if self.unit == "bytes":
            amount = f"{file_size(done)} of {file_size(total)}"
            rate = f"{file_size(moved / passed)}/s" if passed > 0 and moved > 0 else ""
        else:
            amount, rate = f"{self.unit} {done}/{total}".strip(), ""
        left = f"ETA {duration(passed / moved * (total - done))}" if moved > 0 else ""
        if done >= total:
            left = f"took {measured(round(passed, 2))}"
        share = f"{100 * done // total} %"
        for parts in (
            (amount, note, rate, left),
            (amount, note, left),
            (amount, left),
            (share, left),
            (share,),
        ):
            text = ", ".join(filter(None, parts))
            if width is None or len(text) <= width:
                break
        return text

    def facts(self, done: int, total: int, note: str) -> dict[str, Any]:
        """Return how far it is, for programs."""
        passed, moved = time.monotonic() - self.began, done - self.first
        eta = round(passed / moved * (total - done), 3) if moved > 0 else None
        facts = {"task": self.what, "done": done, "total": total, "unit": self.unit, "note": note}
        return {**facts, "seconds": round(passed, 3), "eta": eta}


class Screen:
    """Messages and progress, on standard error.

    On a terminal all tasks under way share one display, which ends with the `with` block.

    Args:
        quiet: show nothing, as ranks other than 0 do.
        events: print JSON lines in place of messages and bars.

    stages: the seconds of each task that has ended, by its name.
    among: how far a list of videos is, by the share of the one that is made; None: there is one.
    """

    def __init__(self, quiet: bool = False, events: bool = False) -> None:
        self.console = console(stderr=True, soft_wrap=True, quiet=quiet)
        self.events = events
        self.stages: dict[str, float] = {}
        self.among: Callable[[float], str] | None = None
        self._step_times: list[float] = []
        self._tasks: dict[str, _Task] = {}
        self._bars: Bars | None = None
        self._staged = time.monotonic()
        self._shown = 0.0  # when a line of progress was printed, of any task
        self._lock = RLock()  # weights are also read in a thread

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the display; the next call of `progress` begins another."""
        if self._bars is not None:
            for bar in [bar.id for bar in self._bars.tasks if bar.total is None]:
                self._bars.remove_task(bar)  # a stage leaves nothing behind
            self._bars.stop()
            atexit.unregister(self._bars.stop)
        self._tasks, self._bars = {}, None

    @property
    def live(self) -> bool:
        """Whether bars are drawn, which takes a terminal that can move its cursor."""
        return self.console.is_terminal and not (self.events or self.console.is_dumb_terminal)

    @property
    def seconds_per_step(self) -> float | None:
        """The median time of a denoising step, which leaves out the loading of an expert."""
        return sorted(self._step_times)[len(self._step_times) // 2] if self._step_times else None

    def say(self, *lines: str) -> None:
        """Print messages, each as one line, whatever its text holds."""
        for line in lines:
            if not self.events:
                width = self.console.width if self.console.is_terminal else None
                for part in _folded(harmless(line), width):
                    self.console.print(part, markup=False)
            elif not self.console.quiet:
                print_event("message", text=line)

    def obey(self, code: str) -> None:
        """Send a terminal what it obeys, such as a picture, above the bars."""
        from rich.segment import ControlType, Segment, Segments

        control = Segment(code, None, [(ControlType.CARRIAGE_RETURN,)])
        self.console.print(Segments([control]), end="")

    def stage(self, text: str) -> None:
        """Show what is being done now, where no ETA is known."""
        if self.live:
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
            self._progress(harmless(what), done, total, unit, harmless(note), last_line)

    def _progress(
        self, what: str, done: int, total: int, unit: str, note: str, last_line: bool
    ) -> None:
        task, now, ends = self._tasks.get(what), time.monotonic(), 0 < total <= done
        if task is None:
            task = self._tasks[what] = _Task(what, unit, done, now, now)
            if self.live and not self.console.quiet:
                text = task.text(done, total, "", self._room()) if total else ""
                task.bar = self._display().add_task(what, total=total or None, text=text)
        since = now - task.shown
        if task.bar is not None and self._bars is not None:
            if since > DRAW or ends:
                text = task.text(done, total, note, self._room()) if total else note
                self._bars.update(task.bar, completed=done, total=total or None, text=text)
                task.shown = now
        elif self.events:
            if (since > EVENT or ends or since == 0) and not self.console.quiet:
                print_event("progress", **task.facts(done, total, note))
                task.shown = now
        elif (
            min(since, now - self._shown) > max(EVERY, (now - task.began) / MANY)
            or (ends and last_line)
            or (ends and task.shown > task.began and now - self._shown > EVERY)
        ):
            self.say(f"{what}: {task.text(done, total, note)}" if total else what)
            task.shown = self._shown = now
        if ends:
            self._end(what)

    def count_bytes(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that shows how many bytes of a task are done."""
        return lambda done, total: self.progress(what, done, total, "bytes")

    def _end(self, what: str) -> None:
        task = self._tasks.pop(what)
        passed = time.monotonic() - task.began
        self.stages[what] = self.stages.get(what, 0.0) + passed
        logger.debug("%s took %s", what, measured(passed))
        if not self._tasks:
            self.close()  # the finished bar stays on the screen
        elif task.bar is not None and self._bars is not None:
            self._bars.remove_task(task.bar)

    def _room(self) -> int:
        """Return the columns that a task's text has beside its name and its bar."""
        names = max(len(what) for what in self._tasks)
        width, bar = self.console.width, _bar_width(self.console.width)
        return width - names - 1 - (bar + 1 if bar else 0) - (8 if width >= CLOCK else 0)

    def _display(self) -> Bars:
        from rich import progress as rich

        if self._bars is None:
            what = rich.TextColumn("{task.description}", markup=False)
            text = rich.TextColumn("{task.fields[text]}", markup=False)
            width, bar = self.console.width, _bar_width(self.console.width)
            columns = [what, rich.BarColumn(bar_width=bar), text] if bar else [what, text]
            clock = [rich.TimeElapsedColumn()] if width >= CLOCK else []
            self._bars = rich.Progress(*columns, *clock, console=self.console)
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
        split = f": {split}{switch}" if len(spec.expert_names) > 1 else ""
        self.say(
            f"{recipe.model.name} on {recipe.runtime['device']} in {recipe.runtime['dtype']},"
            f" seed {request.seed}"
        )
        what = (
            f"{request.size[0]}*{request.size[1]}, {request.frame_num} frames at"
            f" {request.fps:g} fps"
        )
        for name, picture in (("first", request.image), ("last", request.last_image)):
            if picture is not None:
                file = Path(picture.file).name or "a picture"
                what += f", {name} frame {file} ({picture.width}*{picture.height})"
        self.say(f"{what}; {len(timed)} {request.sample_solver} steps{split} -> {target}")

    def forget(self) -> None:
        """Forget the times of a run that has ended: another one begins."""
        self.stages.clear()
        self._step_times.clear()

    def loading(self, what: str, done: int, total: int) -> None:
        """Show how far the weights of a part are read; bytes."""
        self.progress(f"reading {what}", done, total, "bytes")

    @contextmanager
    def denoising(self, run: Run) -> Iterator[OnStep]:
        """Show the steps of a run while the block lasts."""
        from wanflow.presets import title

        what, total = "denoising", run.request.sample_steps
        self.progress(what, run.state.index, total, "step")
        times = [time.monotonic()]

        def on_step(progress: Progress) -> None:
            times.append(time.monotonic())
            self._step_times.append(times[-1] - times.pop(0))
            note = f"{title(progress.expert)}, sigma {progress.sigma:.3f}"
            if self.among is not None:
                all_ = self.among(progress.step / total)
                note = all_ if self.live else f"{note}, {all_}"  # a line has little room
            self.progress(what, progress.step, total, "step", note, last_line=True)

        with self:
            yield on_step

    def decoding(self) -> OnPart:
        """Return the callback that shows how far the VAE is."""
        self.decoded(0, 0)
        return self.decoded

    def decoded(self, done: int, total: int) -> None:
        """Show how many parts of the latent are decoded."""
        self.progress("decoding", done, total, "part")
