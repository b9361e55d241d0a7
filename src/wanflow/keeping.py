"""Keep a run's state on the disk as it goes, so that a crash costs seconds of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import RLock, Thread
from typing import TYPE_CHECKING

from wanflow.config import RequestError

if TYPE_CHECKING:
    from wanflow.pipeline import Progress, Run

STATE_SUFFIX = ".latent.safetensors"
SAVE_SECONDS = 5.0  # between two saved states: a crash costs at most this much work and one step


class Keeper:
    """Saves a run every few seconds; goes on where the disk is full.

    A thread writes the newest state while the next steps compute.

    run: its state is kept on the CPU. stored: the step of the state that is on the disk; None
    before the first.

    Args:
        run: the run.
        file: where to save it.
        alert: says what a person must know.
        stored: the step that is on the disk already.
        every: seconds between two saved states.
    """

    def __init__(
        self,
        run: Run,
        file: Path,
        alert: Callable[[str], object],
        stored: int | None = None,
        every: float | None = None,
    ) -> None:
        self.take(run)
        self._every = SAVE_SECONDS if every is None else every
        self.place, self.alert, self.stored = file, alert, stored
        self._recipe = run.recipe  # what the file says of how the run is computed
        self._saved, self._warned = time.monotonic(), False
        self._disk = RLock()  # held while a state is written; a signal's handler may save, too
        self._thread = Thread()

    def __call__(self, progress: Progress) -> bool:
        """Take the state after a step."""
        self.take(progress.run)
        if time.monotonic() - self._saved > self._every and not self._thread.is_alive():
            self._thread = Thread(target=self.try_to_save, name="wanflow-state")
            self._thread.start()
        return True

    def take(self, run: Run) -> None:
        """Take a state, off the GPU: a thread that saves it cannot wait for what that computes."""
        tensors = {name: value.cpu() for name, value in run.state.tensors().items()}
        self.run = replace(run, state=type(run.state).from_tensors(run.state.index, tensors))

    def save(self) -> None:
        """Write the newest state unless it is on the disk, once no thread is writing.

        Raises:
            OSError: where the disk refuses.
        """
        with self._disk:
            run = self.run
            if self.stored != run.state.index or self._recipe != run.recipe:
                self.write(run)
                self.stored, self._recipe = run.state.index, run.recipe

    def write(self, run: Run) -> None:
        """Write a state to its place."""
        run.save(self.place)

    def try_to_save(self) -> None:
        """Write the state; where the disk refuses, say so once and leave it for the next time."""
        with self._disk:
            try:
                self.save()
            except OSError as error:
                if not self._warned:
                    self.alert(f"the state of the run is not saved for now: {error}")
                self._warned = True
            self._saved = time.monotonic()

    def wait(self) -> None:
        """Wait for a thread that still writes."""
        if self._thread.is_alive():
            self._thread.join()


def is_of(run: Run, file: Path) -> bool:
    """Return whether a file is a saved state of this very run."""
    from wanflow.pipeline import Run

    try:
        return Run.header(file)[2] == run.id
    except RequestError:
        return False
