"""Tasks that tests give to engines; workers import them from here."""

from __future__ import annotations

import os
import time
from pathlib import Path

from data_pipeline.errors import DataError


def square(number: int) -> int:
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise DataError("file-3.jsonl: cannot be used.")
    return number


def note_and_wait(path: Path) -> None:
    """Note that the task has begun, and take a while."""
    path.touch()
    time.sleep(0.2)


def die_once(path: Path) -> str:
    """End the worker the first time, and return on the second."""
    if not path.exists():
        path.touch()
        os._exit(1)
    return path.name
