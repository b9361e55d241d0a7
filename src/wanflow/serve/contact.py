"""Keep a worker's contact with the store of jobs: signs of life, and calls that are made again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from wanflow.serve.jobs import BEAT_S, Store, StoreError, Worker

AGAIN_S = 1.0  # between two tries

logger = logging.getLogger("wanflow")
T = TypeVar("T")


class Contact:
    """A worker's contact with its store, which may be away for a while.

    me: what this worker says of itself. enrolled: whether the store knows it; a job of a worker
    that it does not know would be given to another. away: whether the store does not answer.
    """

    def __init__(self, store: Store, me: Worker) -> None:
        self.store, self.me = store, me
        self.away = self.enrolled = False
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="beats", daemon=True)

    def __enter__(self) -> Contact:
        self._beats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._beats.join()
        with suppress(StoreError):
            self.store.leave(self.me.id)

    def enrol(self, ready: bool) -> None:
        """Tell whether a job can start here."""
        self.me = replace(self.me, ready=ready)

        def tell() -> bool:
            self.store.enrol(self.me)
            return True

        self.enrolled = self.once(tell) is not None

    def once(self, call: Callable[[], T]) -> T | None:
        """Return what a call of the store returns; None where it is away."""
        try:
            found = call()
        except StoreError as error:
            if not self.away:
                logger.warning("the store of jobs does not answer (%s); trying again", error)
            self.away = True
            return None
        if self.away:
            logger.info("the store of jobs answers again")
        self.away = False
        return found

    def surely(self, call: Callable[[], T], in_haste: Callable[[], bool]) -> T | None:
        """Return what a call of the store returns, however long that is away.

        None: there is no time for a second try.
        """
        while (found := self.once(lambda: (call(),))) is None:
            if in_haste():
                return None
            time.sleep(AGAIN_S)
        return found[0]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(StoreError):
                if self.me.model:  # it says what it makes once its gang has started
                    self.store.enrol(self.me)
                for job in self.store.recover():  # the server that does this may be away
                    logger.warning("job %s: %s after its worker was gone", job.id, job.state)
