"""The build is verified once, by all ranks together, before any of them reads it.

    ranks that read the same files (one group)
      -> the first of them looks at all names, sizes and times, and at the note of the build
      -> what nobody has verified is divided among them by size, hashed, and its rows are checked
      -> all agree; the first of them leaves a note, so that the next start reads nothing

Decisions
    A build on shared storage makes one group of all ranks; nodes that read copies of their own make
    one group each. Which files a rank reads is told by the manifest file: path, inode, size and
    times. No two copies have the same, since nobody can set the time of change.
    Only the first rank of a group looks at the names: a look at 40,000 files is 40,000 requests to
    the server of a parallel file system, for each rank that takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from cpt.parallel.agreement import gather_json, together
from cpt.parallel.division import divide_among_all
from data_pipeline.store.manifest import FILE_NAME, BuildManifest, read_manifest
from data_pipeline.store.verification import (
    HELD_OUT,
    Inspection,
    check_stored_rows,
    damaged_files,
    inspect,
    leave_note,
    refuse_damage,
    unverified_rows,
)

log = logging.getLogger("cpt.job.data")

_MOST_TOLD = 20
"""Damaged files that each rank tells of."""

Runs = list[tuple[int, int]]
"""Stretches [first, stop) of the sorted names of a manifest."""


def verify_together(group: dist.ProcessGroup, directory: Path) -> None:
    """Verify the build that this rank reads; all ranks call it together.

    Args:
        group: The control group.
        directory: The build, or this node's copy of it.

    Raises:
        DataError: on all ranks: a build is missing, incomplete or damaged.
        ConfigError: on all ranks: a build is not this user's alone.
    """
    rank = dist.get_rank(group)
    identities = gather_json(together(group, lambda: _identity(directory)), group)
    ranks = []
    for other, identity in enumerate(identities):
        if identity == identities[rank]:
            ranks.append(other)
    first = ranks[0]
    mine = _Share(directory, ranks.index(rank), len(ranks))
    found = gather_json(together(group, mine.look), group)
    if not any(found):
        log.info("%s: verified before, nothing is read", directory)
        return
    problems = []
    for of_rank in gather_json(together(group, lambda: mine.damage(found[first])), group):
        problems += of_rank
    refuse_damage(problems)
    together(group, lambda: mine.verify_rows(found[first]))
    together(group, mine.leave_note)
    num_files = sum(stop - start for start, stop in found[first])
    log.info("%s: %d files verified by %d ranks", directory, num_files, len(ranks))


def _identity(directory: Path) -> list[str | int]:
    """Return what tells the files that a rank reads from those of other ranks."""
    path = directory / FILE_NAME
    try:
        status = path.stat()
    except FileNotFoundError:
        return [str(directory)]  # `look` says it better
    return [
        str(path.resolve()),
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    ]


class _Share:
    """The part of one rank in the verification of a build."""

    def __init__(self, directory: Path, number: int, count: int) -> None:
        """Take a place among the ranks that read the same files.

        Args:
            directory: The build.
            number: Number of this rank among them; the first one looks and leaves the note.
            count: How many they are.
        """
        self._directory = directory
        self._number = number
        self._count = count
        self._manifest: BuildManifest | None = None
        self._inspection: Inspection | None = None

    def look(self) -> Runs | None:
        """Return on the first rank which files nobody has verified, on all others None."""
        if self._number:
            return None
        self._manifest = read_manifest(self._directory)
        self._inspection = inspect(self._directory, self._manifest)
        return _runs(sorted(self._manifest.files), self._inspection.unverified)

    def damage(self, runs: Runs) -> list[str]:
        """Hash this rank's share of the files; return what is wrong with those that are damaged."""
        if not runs:
            return []
        manifest = self._known_manifest()
        sizes = {name: manifest.files[name].bytes for name in _names(manifest, runs)}
        share = divide_among_all(sizes, self._count)[self._number]
        problems = damaged_files(self._directory, manifest, share)
        if len(problems) > _MOST_TOLD:
            more = len(problems) - _MOST_TOLD
            problems[_MOST_TOLD:] = [f"{self._directory}: and {more} more"]
        return problems

    def verify_rows(self, runs: Runs) -> None:
        """Check this rank's share of the splits whose rows may be others.

        Raises:
            DataError: the rows of a split do not fit its documents.
        """
        if not runs:
            return
        manifest = self._known_manifest()
        entries = {source.name: source for source in manifest.sources}
        sizes = {}
        for name, split in unverified_rows(manifest, _names(manifest, runs)):
            sizes[(name, split)] = 0 if split == HELD_OUT else entries[name].documents
        for name, split in divide_among_all(sizes, self._count)[self._number]:
            check_stored_rows(self._directory, manifest, name, split)

    def leave_note(self) -> None:
        """Note on the first rank that all files are verified."""
        if self._inspection is not None and self._inspection.unverified:
            leave_note(self._directory, self._known_manifest(), self._inspection.facts)

    def _known_manifest(self) -> BuildManifest:
        if self._manifest is None:
            self._manifest = read_manifest(self._directory, is_known=True)
        return self._manifest


def _runs(names: Sequence[str], chosen: Sequence[str]) -> Runs:
    """Return where the chosen ones lie among sorted names."""
    wanted = set(chosen)
    runs: Runs = []
    for number, name in enumerate(names):
        if name not in wanted:
            continue
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _names(manifest: BuildManifest, runs: Runs) -> list[str]:
    """Return the names of files in stretches of the sorted names."""
    names = sorted(manifest.files)
    found = []
    for start, stop in runs:
        found += names[start:stop]
    return found
