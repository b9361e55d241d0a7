"""Pass orders from rank 0 to ranks that wait, through the store: a collective keeps GPUs busy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

LOOK_S = 0.05  # between two looks: a call that waits would hold back the heartbeat


class Orders:
    """The orders of a run, in their sequence; every rank has all of them."""

    def __init__(self, store: Store) -> None:
        self._store, self._count = store, 0

    def give(self, text: str) -> None:
        """Give the next order, on rank 0."""
        self._store.set(self._next(), text)

    def take(self) -> str:
        """Wait for the next order, on every other rank."""
        key = self._next()
        while not self._store.check([key]):
            time.sleep(LOOK_S)
        return str(self._store.get(key).decode())

    def _next(self) -> str:
        self._count += 1
        return f"order/{self._count}"
