"""All runs below a folder, looked at again and again.

Decisions
    A run is known by its path below the folder.  Addresses are looked up among the runs that were
    found, and are never made into paths.
    A link that leads out of the folder is not followed.  A run directory whose files are such links
    is listed and not read; its checkpoints may lie elsewhere, since only their names are read.
    Whatever is wrong with one run is told in its row, and the others are shown as before.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from cpt.resilience.lock import LOCK
from cpt.telemetry.event_reader import CHUNK_BYTES
from cpt.telemetry.run_end import LAST_FAILURE, METRICS
from cpt.telemetry.run_overview import (
    CONFIG,
    RunFollower,
    RunOverview,
    broken_run,
    one_line,
    run_overview,
)

FILES_OF_A_RUN = (METRICS, CONFIG, LOCK, LAST_FAILURE)
EXAMPLES = "guard/generation"
"""Folder of the replies that a report shows."""
MARKS_OF_A_RUN = (*FILES_OF_A_RUN, "checkpoints")
"""A folder that holds one of these is a run directory."""
MAX_FOLDERS = 5000
"""Folders that are looked into at most."""
SEARCH_SECONDS = 15.0
"""How long the list of run directories stays good."""
READ_SECONDS = 1.0
"""How long one look reads on in long logs; the next look goes on from there."""
FIRST_LOOK_BYTES = 2**20
"""Of a log that is not read yet, the end that its state is told from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedRun:
    """One run of the board."""

    key: str
    """Path below the folder, with slashes."""
    run_dir: Path
    overview: RunOverview
    is_closed: bool = False
    """Whether nothing of it is read, because one of its files is a link out of the folder."""


class Board:
    """The runs below a folder."""

    def __init__(self, root: Path, *, depth: int) -> None:
        """Look at nothing yet.

        Args:
            root: The folder; it may be a run directory itself.
            depth: Levels of folders below it that may be run directories.
        """
        self.root = root
        self._depth = depth
        self._followers: dict[str, RunFollower] = {}
        self._searched = -SEARCH_SECONDS
        self._runs: dict[str, ListedRun] = {}
        self._log_problems: dict[str, str] = {}
        """By key: why a piece of the log could not be taken."""
        self._lock = threading.Lock()
        self.problem = ""
        """Why the folder cannot be searched; empty if it can."""

    def refresh(self) -> None:
        """Look at every run; calls from several threads wait for each other."""
        with self._lock:
            if time.monotonic() - self._searched >= SEARCH_SECONDS:
                self._search()
                self._searched = time.monotonic()
            runs = self._closed_runs()
            self._read_on(runs.keys())
            for key, follower in self._followers.items():
                if key in runs:
                    continue
                overview = _overview(follower)
                if key in self._log_problems:
                    overview = overview.with_problem(self._log_problems[key])
                runs[key] = ListedRun(key=key, run_dir=follower.run_dir, overview=overview)
            self._runs = runs

    def runs(self) -> list[ListedRun]:
        """Return the runs of the last look: those that run first, then by their last activity."""
        return sorted(self._runs.values(), key=_activity)

    def find(self, key: str) -> ListedRun | None:
        """Return the run of a key; None if the last look found none."""
        return self._runs.get(key)

    def _search(self) -> None:
        found = {}
        self.problem = ""
        try:
            for run_dir in find_runs(self.root, self._depth):
                place = run_dir.relative_to(self.root).as_posix()
                name = self.root.resolve().name if place == "." else place
                # a name may hold bytes that are no UTF-8, which no page can show
                found[os.fsencode(name).decode("utf-8", "replace")] = run_dir
        except OSError as error:
            self.problem = f"{self.root}: {error.strerror}"
        # a folder that cannot be read for a moment has not lost its runs
        kept = dict(self._followers) if self.problem else {}
        for key, run_dir in found.items():
            kept[key] = self._followers.get(key) or RunFollower(run_dir)
        self._followers = kept
        for key in self._log_problems.keys() - kept.keys():
            del self._log_problems[key]

    def _closed_runs(self) -> dict[str, ListedRun]:
        """Return the runs that must not be read."""
        whole = self.root.resolve()
        found = {}
        for key, follower in self._followers.items():
            link = link_out_of(follower.run_dir, whole)
            if link:
                overview = broken_run(follower.run_dir, f"{link} is a link out of the folder")
                found[key] = ListedRun(
                    key=key, run_dir=follower.run_dir, overview=overview, is_closed=True
                )
        return found

    def _read_on(self, closed: Set[str]) -> None:
        """Read what was added to all logs, a piece of each in turn, for a bounded time.

        Logs that were read to their end come first: they have little to read, and are always read.
        """
        end = time.monotonic() + READ_SECONDS
        behind = deque(sorted(self._followers.items(), key=lambda item: not item[1].is_caught_up))
        for item in list(behind):
            if item[0] in closed:
                behind.remove(item)
        while behind and (behind[0][1].is_caught_up or time.monotonic() < end):
            key, follower = behind.popleft()
            try:
                is_done = follower.read_on(CHUNK_BYTES)
            except Exception as error:  # one broken log must not hide the others
                self._log_problems[key] = f"a piece of its log is not understood: {_text(error)}"
                continue
            if not is_done:
                behind.append((key, follower))


def find_runs(root: Path, depth: int) -> Iterator[Path]:
    """Yield the run directories at most `depth` levels below a folder, in order of their names.

    The folders in a run directory are not looked into.

    Raises:
        OSError: the folder itself cannot be read.
    """
    whole = root.resolve()
    level = [root]
    num_looked = 0
    seen: set[Path] = set()
    for depth_below in range(depth + 1):
        below: list[Path] = []
        for folder in level:
            num_looked += 1
            if num_looked > MAX_FOLDERS:
                return
            try:
                place = folder.resolve()
            except OSError:
                continue
            if place in seen:  # a link to a run that is listed
                continue
            seen.add(place)
            if is_run(folder):
                yield folder
            elif depth_below < depth:
                below += _folders_in(folder, whole, is_root=folder == root)
        level = below


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory, or one that must not be looked into."""
    try:
        return any((folder / mark).exists() for mark in MARKS_OF_A_RUN)
    except OSError:
        return True


def link_out_of(run_dir: Path, root: Path) -> str:
    """Return the name of a file that is read and lies outside; empty if there is none.

    Args:
        run_dir: A run directory.
        root: The folder of all runs, without links.
    """
    names = [*FILES_OF_A_RUN, "guard", EXAMPLES]
    with contextlib.suppress(OSError):  # most runs have none
        for name in sorted(os.listdir(run_dir / EXAMPLES)):
            names.append(f"{EXAMPLES}/{name}")
    for name in names:
        path = run_dir / name
        try:
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                return name
        except (OSError, RuntimeError):  # no rights, or a link to itself: reading says so
            continue
    return ""


def _folders_in(folder: Path, root: Path, *, is_root: bool) -> list[Path]:
    """Return the folders in a folder that do not lead out of the root."""
    found = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        if is_root:
            raise
        return []
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        try:
            if path.is_dir() and path.resolve().is_relative_to(root):
                found.append((path.is_symlink(), path))
        except OSError:  # no rights, or a server that does not answer: the others are there
            continue
    return [path for _, path in sorted(found)]


def _overview(follower: RunFollower) -> RunOverview:
    """Return the state of a run, whatever is wrong with its files."""
    try:
        if follower.is_caught_up:
            return follower.overview()
        early = run_overview(follower.run_dir, tail_bytes=FIRST_LOOK_BYTES)
        return early.with_problem(f"{100 * follower.share_read:.0f} % of its log is read so far")
    except Exception as error:  # one broken run must not hide the others
        return broken_run(follower.run_dir, _text(error))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _activity(run: ListedRun) -> tuple[bool, float, str]:
    seen = run.overview
    newest = seen.last_sign if seen.last_sign == seen.last_sign else 0.0
    return seen.state != "running", -newest, run.key
