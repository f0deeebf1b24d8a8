"""Reading one item ahead on a thread of its own, while the training thread works.

Decisions
    - What was read ahead is handed out only for the very key that is asked for, and is dropped
      otherwise. So whoever foresees the next key may be wrong: a mix that changes between two steps
      costs one reading, never a wrong row.
    - Every reading has its own thread, which ends with it: there is nothing to stop and no queue.
      The thread is a daemon, so that a storage that hangs does not keep the process alive.
    - At most one reading is under way, and what it needs is not used by any other thread meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, cast

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

CLOSING_SECONDS = 10.0
"""Time that the end of a run gives a reading under way."""


class _Reading(Generic[Key, Item]):
    """One item on its way."""

    def __init__(self, read: Callable[[Key], Item], key: Key) -> None:
        self.key = key
        self._read = read
        self._item: Item | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._item = self._read(self.key)
        except BaseException as error:  # whatever it is, it belongs to the one who asks
            self._error = error

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for the end of the reading, whether it succeeds or not."""
        self._thread.join(timeout_seconds)

    def result(self) -> Item:
        """Wait for the item, and return it or raise what its reading has raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return cast(Item, self._item)


class ReadAhead(Generic[Key, Item]):
    """Items by key, of which one at a time is read before it is asked for."""

    def __init__(self, read: Callable[[Key], Item]) -> None:
        """Prepare to read.

        Args:
            read: Reads an item; it runs on another thread or on the caller's, never on both at
                once.
        """
        self._read = read
        self._reading: _Reading[Key, Item] | None = None

    def begin(self, key: Key) -> None:
        """Begin to read an item that will probably be asked for next."""
        self._drop()
        self._reading = _Reading(self._read, key)

    def take(self, key: Key) -> Item:
        """Return the item of a key: the one that was read ahead if it has this key.

        Raises:
            BaseException: what the reading of this item has raised, with its traceback.
        """
        reading = self._reading
        if reading is not None and reading.key == key:
            self._reading = None
            return reading.result()
        self._drop()
        return self._read(key)

    def close(self) -> None:
        """Give a reading under way a little time to end, and forget it."""
        self._drop(CLOSING_SECONDS)

    def _drop(self, timeout_seconds: float | None = None) -> None:
        if self._reading is not None:
            self._reading.wait(timeout_seconds)
            self._reading = None
