"""The folder of a cache: where it is, whose it is, what is in it, and taking things out of it.

    CACHE/parts/KE/KEY/   a part; see part_cache
    CACHE/hashes/*.json   hashes of input files; see input_files

Decisions
    A cache lies beside the builds, so that files can be linked between them.
    Only its owner can look into it, whatever the umask.
    A part that a build shares takes no space of its own, so removing it would free nothing: it is
    never pruned, and neither is what an unfinished build has taken. A build that finds an entry
    gone makes the part again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.parts.part_cache import ENTRY_FILE, PARTS_FOLDER, PRIVATE_FOLDER, WHAT
from data_pipeline.reading.input_files import HashNotes
from data_pipeline.store.files import PARTIAL_SUFFIX, make_folder
from data_pipeline.store.ownership import foreign_problems, refuse_foreign
from data_pipeline.tables import table

CACHE_VARIABLE = "CPT_PART_CACHE"
"""Environment variable: the folder of the cache, instead of the one beside the builds."""
CACHE_NAME = "part-cache"
DAY_SECONDS = 86_400.0
_HASHES_FOLDER = "hashes"
_AGES = (("a day", 1.0), ("a week", 7.0), ("30 days", 30.0))
"""Ages that a list tells apart, in days."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """One part in a cache."""

    path: Path
    bytes: int
    """Size of its files."""
    own_bytes: int
    """Size of those that no build shares: what its removal frees."""
    used_at: float
    """Time of its last use, in seconds since 1970."""


def default_cache(
    builds: Path, given: Path | None = None, variables: Mapping[str, str] = os.environ
) -> Path:
    """Return the folder of the cache for builds in the folder `builds`.

    Args:
        builds: Folder that holds builds.
        given: The one that a command line names.
        variables: The environment.
    """
    if given is not None:
        return given
    if variables.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(variables[CACHE_VARIABLE]))
    return builds / CACHE_NAME


def open_cache(builds: Path, given: Path | None = None) -> Path | None:
    """Return the folder of the cache, made if it is not there.

    Returns:
        None if the folder beside the builds is not this user's, or cannot be made: nobody asked
        for it, so a build goes on without.

    Raises:
        ConfigError: the folder that was asked for is not this user's alone.
        OSError: it cannot be made.
    """
    folder = default_cache(builds, given).absolute()
    was_asked_for = folder != (builds / CACHE_NAME).absolute()
    try:
        if was_asked_for:
            refuse_foreign(folder, WHAT)
        else:
            problems = foreign_problems(folder, WHAT)
            if problems:
                log.warning("no parts are shared with other builds: %s", problems[0])
                return None
        make_folder(folder, PRIVATE_FOLDER)
    except OSError as error:
        if was_asked_for:
            raise
        log.warning("%s: no parts are shared with other builds (%s)", folder, error.strerror)
        return None
    return folder


def notes_in(folder: Path) -> HashNotes:
    """Return the hashes of input files that a cache or work directory keeps."""
    return HashNotes(folder / _HASHES_FOLDER)


def notes_for_reading(builds: Path, given: Path | None = None) -> HashNotes | None:
    """Return the notes of a cache that is there and is this user's alone; None if it is not."""
    folder = default_cache(builds, given)
    try:
        if not folder.is_dir() or foreign_problems(folder, WHAT):
            return None
    except OSError:
        return None
    return notes_in(folder)


def list_entries(folder: Path) -> list[CacheEntry]:
    """Return the parts of a cache, the one that was not used for longest first.

    Raises:
        ConfigError: the cache is not this user's alone, or is not there.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no part cache is there. Name its folder with --cache DIR, or set "
            f"{CACHE_VARIABLE}."
        )
    refuse_foreign(folder, WHAT)
    entries = []
    for path in _entry_paths(folder):
        # another process has just removed it, or it is no entry
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            entries.append(_entry_of(path))
    entries.sort(key=lambda entry: (entry.used_at, entry.path))
    return entries


def prune(folder: Path, max_age_days: float | None, max_bytes: int | None) -> list[CacheEntry]:
    """Remove parts that no build shares, the ones that were not used for longest first.

    Args:
        folder: The cache.
        max_age_days: Remove those that were not used for longer; None for no limit on age.
        max_bytes: Then remove more, until what no build shares takes no more than this; None for
            no limit on size.

    Returns:
        What was removed.

    Raises:
        ConfigError: see `list_entries`.
        OSError: an entry cannot be removed.
    """
    entries = list_entries(folder)
    own_bytes = sum(entry.own_bytes for entry in entries)
    now = time.time()
    removed = []
    for entry in entries:
        if not entry.own_bytes:
            continue
        age_days = (now - entry.used_at) / DAY_SECONDS
        is_old = max_age_days is not None and age_days > max_age_days
        is_too_much = max_bytes is not None and own_bytes > max_bytes
        if is_old or is_too_much:
            _remove(entry.path)
            own_bytes -= entry.own_bytes
            removed.append(entry)
    _remove_leftovers(folder, now)
    return removed


def describe_cache(entries: Sequence[CacheEntry]) -> str:
    """Return a table of the parts of a cache by the time since their last use."""
    now = time.time()
    rows = []
    left = list(entries)
    for name, days in _AGES:
        recent = [entry for entry in left if now - entry.used_at <= days * DAY_SECONDS]
        left = [entry for entry in left if now - entry.used_at > days * DAY_SECONDS]
        rows.append(_row(f"within {name}", recent))
    rows.append(_row("longer ago", left))
    rows.append(_row("all", entries))
    return table(("last used", "parts", "size", "shared by no build"), rows)


def _row(name: str, entries: Sequence[CacheEntry]) -> tuple[str, ...]:
    size = sum(entry.bytes for entry in entries)
    own = sum(entry.own_bytes for entry in entries)
    return name, f"{len(entries):,}", f"{size / 1e9:,.2f} GB", f"{own / 1e9:,.2f} GB"


def _entry_paths(folder: Path) -> Iterator[Path]:
    for group in sorted((folder / PARTS_FOLDER).glob("??")):
        for path in sorted(group.iterdir()):
            if not path.name.startswith("."):
                yield path


def _entry_of(path: Path) -> CacheEntry:
    size = 0
    own = 0
    is_shared = False
    used_at = 0.0
    for file in path.iterdir():
        status = file.lstat()
        size += status.st_size
        own += status.st_size
        if file.name == ENTRY_FILE:
            used_at = status.st_mtime
        else:
            is_shared |= status.st_nlink > 1
    return CacheEntry(path=path, bytes=size, own_bytes=0 if is_shared else own, used_at=used_at)


def _remove(path: Path) -> None:
    """Remove an entry; its own file goes first, so nobody takes half of it."""
    (path / ENTRY_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _remove_leftovers(folder: Path, now: float) -> None:
    """Remove entries that a killed build had begun, and folders that became empty."""
    for group in (folder / PARTS_FOLDER).glob("??"):
        for path in group.glob(f".*{PARTIAL_SUFFIX}"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > DAY_SECONDS:
                    shutil.rmtree(path)
        with contextlib.suppress(OSError):
            group.rmdir()
