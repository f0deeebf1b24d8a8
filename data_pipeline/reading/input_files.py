"""The input files of a mix: the hash of what each one holds, and whether it still holds that.

    files -> state of each -> hash, from notes or read -> InputFile
                                                             |
           a unit is read: is the file as it was hashed, before and after? --> refused if not

Decisions
    A build has the hashes of its input in its fingerprint, so it must read what was hashed. A file
    that was written to in between is refused: its rows would be those of no fingerprint.
    Hashes are noted with the state that a file had, one file of notes for each folder. Whoever
    needs much input hashed takes a lock first, so of many tasks over the same input one reads it
    all and the others find its notes.
    A lost or damaged note costs the reading of its files, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.console.progress import show_progress
from data_pipeline.engine.executor import Executor
from data_pipeline.errors import DataError
from data_pipeline.objects.object_paths import ObjectPath
from data_pipeline.store.file_lock import LockHeld, file_lock
from data_pipeline.store.file_states import (
    FileState,
    listed_state_of,
    settled_state_of,
    state_of,
)
from data_pipeline.store.files import cached_per_file, make_folder, write_json, xxh3_of
from data_pipeline.store.verification import is_note

SPREAD_BYTES = 256 * 2**20
"""Bytes to hash from which on it is worth starting processes, and keeping others from doing it."""
LOCK_SECONDS = 12 * 3600.0
"""How long one process waits for another one that hashes the same input."""
_BATCH_BYTES = 64 * 2**20
_BATCH_FILES = 1000
_SECONDS_BETWEEN_SAVES = 60.0
_NOTE_VALUES = 5
_LOCK_FILE = ".lock"

log = logging.getLogger(__name__)

file_hash = cached_per_file(max_files=2**16)(xxh3_of)
"""Return the xxh3_128 of a file; it is read once in a process, as long as it does not change."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file of a source, as it was when it was looked at."""

    path: Path
    state: FileState
    content_hash: str
    """Hex xxh3_128; empty if the file was not read."""

    @property
    def facts(self) -> tuple[str, int, str]:
        """Name, size in bytes, and hash, as a manifest lists them."""
        return self.path.name, self.state.size_bytes, self.content_hash


_HASHED_HERE: dict[Path, InputFile] = {}
"""What this process or its workers hashed, so that no command reads the input twice."""
Inputs = dict[str, tuple[InputFile, ...]]
"""Input files by source, in the order in which they are read."""


class HashNotes:
    """Hashes of files that were read before, kept in a folder of this user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, dict[str, Any]] = {}
        self._changed: set[Path] = set()

    def find(self, path: Path, state: FileState) -> str:
        """Return the hash that was noted for a file in this state; empty if there is none."""
        found = self._notes_on(path.parent).get(path.name)
        if not isinstance(found, list) or len(found) != _NOTE_VALUES:
            return ""
        *values, content_hash = found
        if tuple(values) != astuple(state) or not isinstance(content_hash, str):
            return ""
        return content_hash

    def add(self, file: InputFile) -> None:
        """Note the hash of a file; `save` writes it."""
        parent = file.path.parent
        self._notes_on(parent)[file.path.name] = [*astuple(file.state), file.content_hash]
        self._changed.add(parent)

    def save(self) -> None:
        """Write what was added beside what other processes wrote; a full disk is only told."""
        for parent in sorted(self._changed):
            notes = self._read(parent) | self._known[parent]
            try:
                make_folder(self.folder)
                content = {"folder": str(parent), "files": notes}
                write_json(self._path_of(parent), {**content, "checksum": _checksum(content)})
            except OSError as error:
                log.warning(
                    "%s: hashes of the input cannot be noted (%s), so they are read again next "
                    "time",
                    self.folder,
                    error.strerror,
                )
                break
        self._changed.clear()

    def reload(self) -> None:
        """Forget what was read of the notes, for others may have written them since."""
        self._known.clear()
        self._changed.clear()

    def _notes_on(self, parent: Path) -> dict[str, Any]:
        if parent not in self._known:
            self._known[parent] = self._read(parent)
        return self._known[parent]

    def _read(self, parent: Path) -> dict[str, Any]:
        try:
            # names of files may be no Unicode
            content = read_json(
                self._path_of(parent), LARGE_BYTES, lone_surrogates=True, follow_links=False
            )
            checksum = content.pop("checksum")
            files = content["files"]
            is_sound = checksum == _checksum(content) and isinstance(files, dict)
            if content["folder"] != str(parent) or not is_sound:
                return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return files

    def _path_of(self, parent: Path) -> Path:
        name = hashlib.sha256(str(parent).encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{name[:32]}.json"


def _checksum(content: dict[str, Any]) -> str:
    """Return the hex xxh3_128 of JSON values: a hash that lost a bit looks like any other."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def look_at_inputs(sources: Iterable[SourceConfig]) -> Inputs:
    """Return the input files of sources, none of which is read.

    Raises:
        DataError: a file cannot be looked at.
    """
    inputs = {}
    for source in sources:
        files = []
        for path in _files_that_decide(source):
            with _named(path, source.name):
                files.append(InputFile(path, listed_state_of(path), ""))
        inputs[source.name] = tuple(files)
    return inputs


def _files_that_decide(source: SourceConfig) -> list[Path]:
    """Return the files of a source; of an earlier build those that decide what it holds.

    Whoever reads a build may leave a note in it of what he verified.
    """
    files = source.files()
    if source.format != "build":
        return files
    (folder,) = source.patterns()
    return [path for path in files if not is_note(path.relative_to(folder).as_posix())]


def read_inputs(
    sources: Sequence[SourceConfig],
    executor: Executor | None = None,
    notes: HashNotes | None = None,
) -> Inputs:
    """Return the input files of sources with their hashes.

    Args:
        sources: The sources of a mix.
        executor: Runs the hashing of much input; None hashes in this process.
        notes: What was hashed before, and takes what is hashed now; None reads all files.

    Raises:
        DataError: a file cannot be read, or changed while it was hashed.
    """
    inputs = look_at_inputs(sources)
    known = _known_files(inputs, notes)
    unknown_bytes = _total_bytes(_unknown(inputs, known))
    if notes is not None and unknown_bytes >= SPREAD_BYTES:
        with _alone(notes):
            notes.reload()
            known = _known_files(inputs, notes)
            _hash_missing(inputs, known, executor, notes)
    else:
        _hash_missing(inputs, known, executor, notes)
    hashed = {}
    for name, files in inputs.items():
        hashed[name] = tuple(known[file.path] for file in files)
    return hashed


def check_unchanged(files: Sequence[InputFile], source_name: str) -> None:
    """Refuse files that are not as they were when they were hashed.

    A file that only got another link, mode or name is read again, and is fine if it holds the same.

    Raises:
        DataError: a file is another one, or cannot be looked at.
    """
    for file in files:
        with _named(file.path, source_name):
            state = state_of(file.path)
            if state == file.state:
                continue
            may_be_equal = bool(file.content_hash) and state.has_size_and_mtime_of(file.state)
            # nothing but its content gives an object another state
            may_be_equal = may_be_equal and not isinstance(file.path, ObjectPath)
            if may_be_equal and file_hash(file.path) == file.content_hash:
                continue
        raise changed_error(file.path, source_name, file.state, state)


def changed_error(path: Path, source_name: str, before: FileState, now: FileState) -> DataError:
    """Return the error that says that somebody wrote to a file during a build."""
    what = "its content or its time of change is another"
    if before.size_bytes != now.size_bytes:
        what = f"{before.size_bytes:,} bytes became {now.size_bytes:,}"
    return DataError(
        f"{path}: changed while the build was at work ({what}). It is a file of source "
        f"'{source_name}'. The rows would be those of no one state of the input. Stop what writes "
        "there, or build from a copy, and build again."
    )


def _known_files(inputs: Inputs, notes: HashNotes | None) -> dict[Path, InputFile]:
    """Return the files whose hashes are noted, or were made by this process."""
    known = {}
    for files in inputs.values():
        for file in files:
            found = _HASHED_HERE.get(file.path)
            if found is not None and found.state == file.state:
                known[file.path] = found
                continue
            content_hash = notes.find(file.path, file.state) if notes is not None else ""
            if content_hash:
                known[file.path] = InputFile(file.path, file.state, content_hash)
    return known


def _unknown(inputs: Inputs, known: dict[Path, InputFile]) -> dict[str, list[InputFile]]:
    """Return the files that must be read, each once, by the first source that names it."""
    seen = set(known)
    unknown: dict[str, list[InputFile]] = {}
    for name, files in inputs.items():
        for file in files:
            if file.path not in seen:
                seen.add(file.path)
                unknown.setdefault(name, []).append(file)
    return unknown


def _total_bytes(files_by_source: dict[str, list[InputFile]]) -> int:
    total = 0
    for files in files_by_source.values():
        total += sum(file.state.size_bytes for file in files)
    return total


def _hash_missing(
    inputs: Inputs,
    known: dict[Path, InputFile],
    executor: Executor | None,
    notes: HashNotes | None,
) -> None:
    """Hash the files that are not known yet, and add them to `known` and to the notes."""
    unknown = _unknown(inputs, known)
    total_bytes = _total_bytes(unknown)
    batches = list(_batches(unknown))
    saved_at = time.monotonic()
    with show_progress(
        total_bytes, "hashes of the input", "B", unit_scale=True, leave=False
    ) as bar:
        for files in _hashed_batches(batches, total_bytes, executor):
            for file in files:
                known[file.path] = file
                _HASHED_HERE[file.path] = file
                if notes is not None:
                    notes.add(file)
                bar.update(file.state.size_bytes)
            if notes is not None and time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES:
                notes.save()
                saved_at = time.monotonic()
    if notes is not None:
        notes.save()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Files of one source that are hashed by one task."""

    source_name: str
    paths: tuple[Path, ...]


def _batches(unknown: dict[str, list[InputFile]]) -> Iterator[_Batch]:
    for name, files in unknown.items():
        paths: list[Path] = []
        num_bytes = 0
        for file in files:
            paths.append(file.path)
            num_bytes += file.state.size_bytes
            if num_bytes >= _BATCH_BYTES or len(paths) >= _BATCH_FILES:
                yield _Batch(name, tuple(paths))
                paths = []
                num_bytes = 0
        if paths:
            yield _Batch(name, tuple(paths))


def _hashed_batches(
    batches: Sequence[_Batch], total_bytes: int, executor: Executor | None
) -> Iterator[list[InputFile]]:
    if executor is None or total_bytes < SPREAD_BYTES:
        yield from map(_hash_batch, batches)
        return
    for _, files in executor.run(_hash_batch, batches):
        yield files


def _hash_batch(batch: _Batch) -> list[InputFile]:
    files = []
    for path in batch.paths:
        with _named(path, batch.source_name):
            state = settled_state_of(path)
            content_hash = file_hash(path)
            now = state_of(path)
        if now != state:
            raise changed_error(path, batch.source_name, state, now)
        files.append(InputFile(path, state, content_hash))
    return files


@contextlib.contextmanager
def _alone(notes: HashNotes) -> Iterator[None]:
    """Keep other processes from hashing the same input, as far as the file system has locks."""
    path = notes.folder / _LOCK_FILE
    try:
        make_folder(notes.folder)
        with file_lock(path, limit_seconds=LOCK_SECONDS):
            yield
    except LockHeld as held:
        raise DataError(
            f"{notes.folder}: another process has hashed the input for hours ({held}). Wait for "
            "it, or end it."
        ) from None


@contextlib.contextmanager
def _named(path: Path, source_name: str) -> Iterator[None]:
    """Turn an error of the system into one that names the file and its source."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}. It is a file of source "
            f"'{source_name}'."
        ) from error
