"""One save of a run while it goes on, and what is told of it afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint.staging import Way
from cpt.checkpoint.writer import Written
from cpt.errors import CptError
from cpt.storage.space import write_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A checkpoint that is complete and has its final name."""

    step: int
    """Optimizer steps done."""
    folder: Path
    """Folder of the checkpoint."""
    seconds: float
    """Time from the decision to save until the rename was known to all ranks."""
    blocked_seconds: float
    """Part of this time in which training stood still."""
    update_wait_seconds: float
    """Part of `blocked_seconds` that an update waited, inside a step, on the rank that waited
    longest: the others waited for that rank.
    """
    way: Way
    """How it was made."""
    num_bytes: int
    """Size of the ranks' files; of a checkpoint that was there before, that of its tensors."""
    linked_bytes: int
    """Part of `num_bytes` that was not written, because an earlier checkpoint has it."""

    @property
    def asynchronous(self) -> bool:
        """Whether it was written while training went on."""
        return self.way != "wait"


class SaveInProgress:
    """A save, and the outcome of what this rank does for it."""

    def __init__(
        self, step: int, state: dict[str, Any], final: Path, way: Way, *, keep: bool = False
    ) -> None:
        self.step = step
        self.keep = keep
        self.final = final
        self.temporary = final.with_name(f".tmp-{final.name}")
        self.state = json.loads(json.dumps(state))  # a copy, because the run changes its own
        self.way = way
        self.written: list[Written] | None = None
        self.num_bytes = 0
        self.linked_bytes = 0
        self.update_wait_seconds = 0.0
        self.is_publishing = False
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self.started = time.perf_counter()
        self.blocked_seconds = 0.0

    def attempt(self, action: Callable[[], None]) -> None:
        """Do a part of the save; an error is kept for the next agreement of the ranks."""
        try:
            action()
        except Exception as error:
            known = isinstance(error, CptError)
            self.error = error if known else write_error(error, self.temporary)

    def beside_training(self, action: Callable[[], None]) -> None:
        """Begin to do a part of the save in a thread of its own.

        If the system gives no thread, that is an error like one of the part itself.
        """
        thread = threading.Thread(target=self.attempt, args=(action,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.error = write_error(error, self.temporary)
            return
        self.thread = thread

    def check(self) -> None:
        """Raise what a part of the save has raised.

        Raises:
            StorageError: it failed.
        """
        if self.error is not None:
            raise self.error

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Count the time inside the block as time in which training stands still."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_seconds += time.perf_counter() - began
