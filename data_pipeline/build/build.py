"""Data mix -> a directory that training reads.

    sources -> units -> parts (texts, hashes, tokens, signatures)
                          |        units, part: spread over processes or machines
                          +-> held out, trained on, or a copy
                                 |        document_fates: deduplication, near_duplicates,
                                 |        decontamination
                                 +-> packed rows -> manifest, written last
                                          assembly

Decisions
    Everything is written into a hidden sibling directory that is renamed at the end, so a directory
    under the final name is complete.
    Parts that a killed build has finished are used by the next one; a lock keeps two builds apart.
    Units, and with them the output, do not depend on the number of processes or machines.
    Shards may hold copies: a document that is in no row is never read. Which documents are trained
    on, and which are held out, is decided from content alone, before any row exists.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from data_pipeline.bounded.json_text import read_json
from data_pipeline.build.assembly import assemble_build
from data_pipeline.build.found_builds import other_build_error
from data_pipeline.build.origin import (
    Origin,
    compare,
    read_origin,
)
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.engine.choice import LOCAL, check_engine, open_executor
from data_pipeline.engine.local import LocalExecutor, available_cores
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.parts.cache_folder import notes_in
from data_pipeline.parts.part import VERSION, Part
from data_pipeline.parts.part_making import make_parts, source_parts
from data_pipeline.store.file_lock import LockHeld, file_lock
from data_pipeline.store.files import PARTIAL_SUFFIX, make_folder, sync_directory, write_json
from data_pipeline.store.manifest import (
    FILE_NAME,
    BuildManifest,
    read_manifest,
)
from data_pipeline.store.ownership import refuse_foreign
from data_pipeline.store.verification import check_files

log = logging.getLogger(__name__)

WORK = "unfinished build"
"""The name of a work directory in messages."""
_WORK_FILE = "work.json"


def build(
    mix: MixConfig,
    out_dir: Path | str,
    progress: bool = True,
    workers: int | None = 1,
    engine: str = LOCAL,
    cache_dir: Path | None = None,
) -> BuildManifest:
    """Build `mix` into `out_dir`, or return the manifest if it is built there already.

    Args:
        mix: The mix, from `load_mix`.
        out_dir: The directory to make, with its parents.
        progress: Show a progress bar on a terminal, or lines in a log.
        workers: Number of processes; the output is the same for every number. None is as many as
            the engine has cores.
        engine: Where tasks run, one of `engine.choice.ENGINES`.
        cache_dir: Folder of parts that builds share, from `cache_folder.open_cache`; None for none.

    Raises:
        DataError: the input cannot be used, `out_dir` holds another mix or something else, or
            another process is building there.
        ConfigError: what lies there is not this user's alone, or the engine cannot be used.
        StorageError: the input has more files than this process may have open.
    """
    check_engine(engine)  # before hours of hashing
    out_dir = Path(out_dir).absolute()
    origin = _hashed_origin(mix, cache_dir, workers)
    wanted = origin.fingerprint
    work_dir = _work_dir(out_dir)
    if _is_of_another_user(out_dir):
        # named as shared, or refused by who reads its manifest: nothing is written there
        return _read_existing(out_dir, mix, wanted)
    with _locked(out_dir):
        refuse_foreign(work_dir, WORK)
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            manifest = _read_existing(out_dir, mix, wanted)
            shutil.rmtree(work_dir, ignore_errors=True)
            return manifest
        if not _holds_work(work_dir, wanted):
            shutil.rmtree(work_dir, ignore_errors=True)
        parts = _prepare(work_dir, mix, origin, cache_dir)
        with open_executor(engine, workers, work_dir, cache_dir) as executor:
            make_parts(list(chain.from_iterable(parts)), progress, executor)
            for path in work_dir.rglob(f".*{PARTIAL_SUFFIX}"):
                path.unlink(missing_ok=True)  # a task of a killed build may just have ended
            manifest = assemble_build(work_dir, mix, origin, parts, executor)
        (work_dir / "build").rename(out_dir)
        sync_directory(out_dir.parent)
        shutil.rmtree(work_dir, ignore_errors=True)
    return manifest


def build_share(
    mix: MixConfig,
    out_dir: Path | str,
    index: int,
    count: int,
    workers: int | None = 1,
    cache_dir: Path | None = None,
) -> int:
    """Make every `count`-th part, beginning with part `index`, for a later `build` to finish.

    Of several processes that begin together one hashes the input, and the others wait for it.

    Returns:
        Number of parts that this share has.

    Raises:
        DataError: as `build`, and also if parts of another mix lie there.
    """
    assert 0 <= index < count
    out_dir = Path(out_dir).absolute()
    work_dir = _work_dir(out_dir)
    with _locked(out_dir, is_shared=True):
        refuse_foreign(work_dir, WORK)
        origin = _hashed_origin(mix, cache_dir or work_dir, workers)
        wanted = origin.fingerprint
        if (out_dir / FILE_NAME).exists():
            _read_existing(out_dir, mix, wanted)
            return 0
        if (work_dir / _WORK_FILE).exists() and not _holds_work(work_dir, wanted):
            raise DataError(
                f"{work_dir}: holds parts of another mix, of other input files or of another "
                "version. Delete it first."
            )
        parts = _prepare(work_dir, mix, origin, cache_dir)
        own_parts = list(chain.from_iterable(parts))[index::count]
        with open_executor(LOCAL, workers, work_dir) as executor:
            make_parts(own_parts, True, executor)
        return len(own_parts)


def _hashed_origin(mix: MixConfig, notes_dir: Path | None, workers: int | None) -> Origin:
    """Return the rules and input files of a mix; hashes are noted in a cache or work directory."""
    notes = notes_in(notes_dir) if notes_dir is not None else None
    with LocalExecutor(workers or available_cores()) as executor:
        return read_origin(mix, executor, notes)


def _work_dir(out_dir: Path) -> Path:
    """Return the hidden sibling of a build, in which it is made."""
    if not out_dir.name:
        raise ConfigError(f"'{out_dir}' is no directory for a build: it has no name. Choose --out.")
    return out_dir.with_name(f".{out_dir.name}.building")


def _is_of_another_user(out_dir: Path) -> bool:
    """Return whether another user has made a build, so that this one may only read it."""
    try:
        return out_dir.stat().st_uid != os.geteuid() and any(out_dir.iterdir())
    except OSError:
        return False


def _holds_work(work_dir: Path, wanted: str) -> bool:
    """Return whether a build of the same fingerprint and version of parts was begun here."""
    try:
        value = read_json(work_dir / _WORK_FILE)
    except (OSError, ValueError):
        return False
    if not isinstance(value, dict) or value.get("fingerprint") != wanted:
        return False
    return value.get("part_version", 1) == VERSION  # the first version noted none


def _prepare(
    work_dir: Path, mix: MixConfig, origin: Origin, cache_dir: Path | None
) -> list[list[Part]]:
    """Make the work directory, and return the parts of every source."""
    make_folder(work_dir)
    refuse_foreign(work_dir, WORK)
    work = {"fingerprint": origin.fingerprint, "part_version": VERSION}
    write_json(work_dir / _WORK_FILE, work)
    parts = []
    for source in mix.sources:
        inputs = origin.inputs[source.name]
        parts.append(source_parts(work_dir, mix, source, inputs, cache_dir))
    return parts


@contextlib.contextmanager
def _locked(out_dir: Path, *, is_shared: bool = False) -> Iterator[None]:
    """Hold the lock of `out_dir`; the kernel drops it when the process dies, however it dies."""
    try:
        make_folder(out_dir.parent)
        path = out_dir.with_name(f".{out_dir.name}.lock")
        # a file that stays would shut out the other users of a shared folder
        with file_lock(path, is_shared=is_shared, is_kept=False) as is_locked:
            if not is_locked:
                log.warning(
                    "%s: this file system has no locks (flock). Start one build of it at a time.",
                    out_dir,
                )
            yield
    except LockHeld as held:
        raise DataError(
            f"{out_dir}: another process is building it ({held}). Wait for that one."
        ) from None
    except PermissionError as error:
        raise DataError(
            f"{error.filename}: cannot be written ({error.strerror}). Choose another --out."
        ) from error


def _read_existing(out_dir: Path, mix: MixConfig, wanted: str) -> BuildManifest:
    """Return the manifest of a finished build, after checking all of its files.

    Raises:
        DataError: the directory holds something else, another build, or a damaged one.
    """
    if not (out_dir / FILE_NAME).exists():
        raise DataError(
            f"{out_dir}: exists and holds something else than a build. Choose another --out."
        )
    manifest = read_manifest(out_dir)
    if manifest.fingerprint != wanted:
        found = compare(manifest, mix, read_contents=True)
        raise other_build_error(out_dir, manifest, found.differences)
    check_files(out_dir, manifest, verify=True)
    return manifest
