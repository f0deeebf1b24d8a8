"""Read one hostile file and judge what came of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.errors import explain
from tests.support.fuzzing.mutations import changed_bytes, changed_tree, text_of

LONGEST_SECONDS = 10.0
"""CPU time that reading one small hostile file may take."""


class TooLong(BaseException):
    """A reader that went on for longer than it may; no `except Exception` of a reader stops it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file that others may have made, and what reads it."""

    name: str
    """Name of the kind."""
    make: Callable[[Path], Path]
    """Writes good files into an empty folder and returns the one to be changed."""
    read: Callable[[Path], object]
    """Reads the folder, as the product does."""
    is_lines: bool = False
    """Whether the file holds one JSON value a line."""
    is_tree: bool = True
    """Whether the file is JSON or YAML, whose values are changed as well as its bytes."""
    load: Callable[[bytes], Any] = json.loads
    """Returns the value that a file without lines holds."""
    sign: Callable[[Path, Any], str] | None = None
    """Returns the text of a changed value with a checksum that fits, given the folder."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A case whose reader did what it must not."""

    target: str
    """Name of the kind of file."""
    number: int
    """Number of the case; `hostile_content` makes the file again."""
    what: str
    """What happened, in a line."""


def attack(target: Target, folder: Path, numbers: range) -> list[Finding]:
    """Read hostile files one after another.

    Args:
        target: The kind of file.
        folder: An empty folder for this call.
        numbers: Numbers of the cases; the same number makes the same file.

    Returns:
        The cases that raised what no command explains, took too long, or touched other files.
    """
    inside = folder / "inside"
    victim = folder / "victim"
    inside.mkdir()
    victim.mkdir()
    (victim / "file").write_text("untouched")
    file = target.make(inside)
    good = file.read_bytes()
    kept = folder / "kept"
    shutil.copytree(inside, kept, symlinks=True)
    findings = []
    for number in numbers:
        file.write_bytes(hostile_content(target, inside, good, number))
        for what in _problems(target, inside):
            findings.append(Finding(target=target.name, number=number, what=what))
        if sorted(os.listdir(folder)) != ["inside", "kept", "victim"] or victim_changed(victim):
            findings.append(Finding(target=target.name, number=number, what="wrote elsewhere"))
            break
        shutil.rmtree(inside)
        shutil.copytree(kept, inside, symlinks=True)
    return findings


def victim_changed(victim: Path) -> bool:
    """Return whether the folder beside the attacked one is another than it was."""
    return os.listdir(victim) != ["file"] or (victim / "file").read_text() != "untouched"


def hostile_content(target: Target, folder: Path, good: bytes, number: int) -> bytes:
    """Return the content of a case."""
    random_source = random.Random(f"{target.name}/{number}")
    if not target.is_tree or random_source.random() < 0.3:
        return changed_bytes(random_source, good)
    if target.is_lines:
        lines = good.splitlines()
        for _ in range(random_source.randint(1, 3)):
            index = random_source.randrange(len(lines))
            try:
                tree = json.loads(lines[index])
            except (ValueError, RecursionError):
                continue  # changed already
            lines[index] = text_of(changed_tree(random_source, tree)).encode()
        return b"\n".join(lines) + b"\n"
    tree = changed_tree(random_source, target.load(good))
    if target.sign is not None and random_source.random() < 0.9:
        return target.sign(folder, tree).encode()
    return text_of(tree).encode()


def _problems(target: Target, folder: Path) -> list[str]:
    before = time.process_time()
    problems = []
    try:
        with _limit(2 * LONGEST_SECONDS):
            target.read(folder)
    except TooLong:
        problems.append("was not done in time")
    except BaseException as error:  # also SystemExit and what libraries derive from BaseException
        problems += _judge(error)
    seconds = time.process_time() - before
    if seconds > LONGEST_SECONDS:
        problems.append(f"took {seconds:.1f} s")
    return problems


def _judge(error: BaseException) -> list[str]:
    """Return why an exception is none that a person may see."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    words = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, MemoryError) or explain(error) is None:
        cause = error.__traceback__
        while cause is not None and cause.tb_next is not None:
            cause = cause.tb_next
        place = ""
        if cause is not None:
            code = cause.tb_frame.f_code
            place = f" at {Path(code.co_filename).name}:{cause.tb_lineno}"
        return [f"raised {words!r}{place}"]
    if not str(error).strip():
        return [f"raised {type(error).__name__} without a message"]
    return []


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in this thread after so much CPU time."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
