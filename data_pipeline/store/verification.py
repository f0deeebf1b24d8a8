"""Is a build what its manifest says? It is hashed once; then a note says so.

    names, sizes and times of all files -> those that the note does not know -> their hashes,
        tokens and rows -> a new note

Decisions
    The note, `verified.json` in the build, holds for each file the facts that change when it is
    written to: size, time of modification, time of change, inode. `build` leaves it, and so does
    whoever hashes a build. A copy of a build has other inodes, so its files are hashed again.
    The note is not signed. Who can write it can write the manifest, too, and
    `data_pipeline.store.ownership` refuses a build that others can write to. What it is against is
    damage: a file that is cut off, overwritten or exchanged.
    A file with several names changes its time of change when a name is made or removed, so this
    time is compared only while it has one name.
    Damage that leaves no trace in these facts, such as that of a bad disk, is found by a full
    verification: remove the note.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import read_json
from data_pipeline.console.progress import show_progress
from data_pipeline.errors import DataError
from data_pipeline.escaping import escaped_line
from data_pipeline.store.files import PARTIAL_SUFFIX, sha256_of, write_json
from data_pipeline.store.manifest import FILE_NAME, BuildManifest
from data_pipeline.store.open_files import OpenFiles
from data_pipeline.store.row_files import RowFiles, check_rows
from data_pipeline.store.shards import SUFFIX, Shard, Shards

log = logging.getLogger(__name__)

NOTE_FILE = "verified.json"
HELD_OUT = "held_out"
_MAX_NOTE_BYTES = 256 * 2**20

Facts = tuple[int, int, int, int]
"""Size, time of modification, time of change (0 if the file has several names), inode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The files of a build as they are, without their content."""

    facts: Mapping[str, Facts]
    """Facts of each file that the manifest lists, by name."""
    unverified: Sequence[str]
    """Files whose content nobody has compared with the manifest, in order of their names."""


def inspect(directory: Path, manifest: BuildManifest) -> Inspection:
    """Compare names and sizes with the manifest, and the facts of each file with the note.

    Raises:
        DataError: A file is missing, extra, a link, or of another size; the message names each.
    """
    found = _files_in(directory)
    problems = []
    facts = {}
    for name in sorted(manifest.files.keys() - found.keys()):
        problems.append(f"{escaped_line(directory / name)}: missing")
    for name in sorted(found.keys() - manifest.files.keys() - {FILE_NAME}):
        problems.append(f"{escaped_line(directory / name)}: not in the manifest")
    for name in sorted(found.keys() & manifest.files.keys()):
        status = found[name]
        expected = manifest.files[name].bytes
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{escaped_line(directory / name)}: not a plain file")
        elif status.st_size != expected:
            problems.append(
                f"{escaped_line(directory / name)}: {status.st_size} bytes, "
                f"manifest says {expected}"
            )
        facts[name] = facts_of(status)
    refuse_damage(problems)
    noted = _read_note(directory, manifest)
    unverified = []
    for name, now in facts.items():
        if not _is_same(noted.get(name), now):
            unverified.append(name)
    return Inspection(facts=facts, unverified=unverified)


def refuse_damage(problems: Sequence[str]) -> None:
    """Raise the error of damaged files, if there are any.

    Raises:
        DataError: naming them all.
    """
    if problems:
        raise DataError(
            "\n".join([*problems, "The build is damaged: delete it and build it again."])
        )


def facts_of(status: os.stat_result) -> Facts:
    """Return what is noted of a file."""
    changed = status.st_ctime_ns if status.st_nlink == 1 else 0
    return status.st_size, status.st_mtime_ns, changed, status.st_ino


def _is_same(noted: Facts | None, now: Facts) -> bool:
    if noted is None:
        return False
    if noted[2] and now[2] and noted[2] != now[2]:
        return False
    return noted[:2] == now[:2] and noted[3] == now[3]


def _files_in(directory: Path) -> dict[str, os.stat_result]:
    """Return the status of everything in a build but its folders, the note and its making."""
    found = {}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(directory / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                elif not is_note(name):
                    found[name] = entry.stat(follow_symlinks=False)
    return found


def is_note(name: str) -> bool:
    """Return whether a name in a build is that of the note, or of one that is being written."""
    is_partial = name.startswith(f".{NOTE_FILE}.") and name.endswith(PARTIAL_SUFFIX)
    return name == NOTE_FILE or is_partial


def _read_note(directory: Path, manifest: BuildManifest) -> dict[str, Facts]:
    """Return the facts of the files that were verified; nothing if there is no sound note."""
    path = directory / NOTE_FILE
    try:
        content = read_json(path, _MAX_NOTE_BYTES, lone_surrogates=True)
        if content["manifest"] != manifest.hash:
            return {}
        noted = {}
        for name, facts in content["files"].items():
            size, modified, changed, inode = map(int, facts)
            noted[name] = (size, modified, changed, inode)
    except FileNotFoundError:
        return {}
    except (
        OSError,
        MalformedInput,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        log.info("%s is not used: %s", path, escaped_line(error, 200))
        return {}
    return noted


def leave_note(directory: Path, manifest: BuildManifest, facts: Mapping[str, Facts]) -> None:
    """Note that files were found to be what the manifest says.

    A build that cannot be written to, or that is another user's, stays without: it is verified at
    every start.

    Args:
        directory: The build.
        manifest: Its manifest.
        facts: The facts of the verified files, as they were before they were read.
    """
    with contextlib.suppress(OSError):
        if directory.stat().st_uid != os.geteuid():
            return
        note = {"manifest": manifest.hash, "files": facts}
        write_json(directory / NOTE_FILE, note)


def check_files(directory: Path, manifest: BuildManifest, *, verify: bool) -> Inspection:
    """Compare the files of a build with its manifest.

    Args:
        directory: The build.
        manifest: What it should hold.
        verify: Whether to hash the files that the note does not know, and to leave a note.

    Returns:
        The files as they are now, and which of them nobody has verified.

    Raises:
        DataError: A file is missing, extra, a link, of another size or of other content; the
            message names every such file.
    """
    inspection = inspect(directory, manifest)
    if not verify or not inspection.unverified:
        return inspection
    refuse_damage(damaged_files(directory, manifest, inspection.unverified))
    for source, split in unverified_rows(manifest, inspection.unverified):
        check_stored_rows(directory, manifest, source, split)
    leave_note(directory, manifest, inspection.facts)
    return Inspection(facts=inspection.facts, unverified=())


def damaged_files(directory: Path, manifest: BuildManifest, names: Iterable[str]) -> list[str]:
    """Return a problem for each of the files that is not what the manifest says.

    Every token of a shard is looked at, too.
    """
    names = sorted(names)
    problems = []
    total = sum(manifest.files[name].bytes for name in names)
    what = f"hashes of {directory.name}"
    with show_progress(total, what, "B", unit_scale=True, leave=False) as bar:
        for name in names:
            path = directory / name
            problem = ""
            try:
                if sha256_of(path) != manifest.files[name].sha256:
                    problem = "content differs from the manifest (sha256)"
                elif path.suffix == SUFFIX:
                    Shard(path)
            except DataError as error:
                problems.append(str(error))
            if problem:
                problems.append(f"{escaped_line(path)}: {problem}")
            bar.update(manifest.files[name].bytes)
    return problems


def unverified_rows(manifest: BuildManifest, unverified: Iterable[str]) -> list[tuple[str, str]]:
    """Return (source, split) of the rows that depend on files nobody has verified."""
    touched = {PurePosixPath(name).parts[0] for name in unverified}
    found = []
    for source in manifest.sources:
        if source.name in touched:
            found += [(source.name, split) for split in (*source.train_folders, HELD_OUT)]
    return found


def check_stored_rows(directory: Path, manifest: BuildManifest, source: str, split: str) -> None:
    """Check that the rows of a split fit its documents; see `check_rows`.

    Raises:
        DataError: they do not.
    """
    seq_len = manifest.seq_len
    for entry in manifest.sources:
        if entry.name == source and split in entry.train_folders:
            seq_len = manifest.row_lengths[entry.train_folders.index(split)]
    files = OpenFiles()
    shards = Shards(directory / source, manifest.shard_names(source), verify=False, files=files)
    check_rows(RowFiles(directory / source / split, files), shards, seq_len)
