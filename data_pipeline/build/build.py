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
import glob
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from data_pipeline.bounded.json_text import read_json
from data_pipeline.build import units
from data_pipeline.build.assembly import assemble_build
from data_pipeline.build.document import BYTES_PER_INVENTED_TOKEN
from data_pipeline.build.input_files import InputFile
from data_pipeline.build.origin import (
    Origin,
    absent_sources,
    compare,
    fingerprint,
    read_origin,
)
from data_pipeline.build.part import Part, make_part, read_account
from data_pipeline.build.stored_rows import hub_files
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.source_config import FILE_FORMATS, SourceConfig
from data_pipeline.console.progress import show_progress
from data_pipeline.engine.choice import LOCAL, open_executor
from data_pipeline.engine.executor import Executor
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.store.descriptors import reserve_descriptors
from data_pipeline.store.file_lock import LockHeld, file_lock
from data_pipeline.store.file_states import state_of
from data_pipeline.store.files import PARTIAL_SUFFIX, make_folder, sync_directory, write_json
from data_pipeline.store.manifest import (
    FILE_NAME,
    BuildManifest,
    check_files,
    read_manifest,
)
from data_pipeline.store.ownership import refuse_foreign

log = logging.getLogger(__name__)

DEFAULT_ROOT = Path("data")
"""Directory for builds and audit pages that are given no place of their own."""
WORK = "unfinished build"
"""The name of a work directory in messages."""
_WORK_FILE = "work.json"


def build(
    mix: MixConfig,
    out_dir: Path | str,
    progress: bool = True,
    workers: int | None = 1,
    engine: str = LOCAL,
) -> BuildManifest:
    """Build `mix` into `out_dir`, or return the manifest if it is built there already.

    Args:
        mix: The mix, from `load_mix`.
        out_dir: The directory to make, with its parents.
        progress: Show a progress bar on a terminal, or lines in a log.
        workers: Number of processes; the output is the same for every number. None is as many as
            the engine has cores.
        engine: Where tasks run, one of `engine.choice.ENGINES`.

    Raises:
        DataError: the input cannot be used, `out_dir` holds another mix or something else, or
            another process is building there.
        ConfigError: what lies there is not this user's alone, or the engine cannot be used.
        StorageError: the input has more files than this process may have open.
    """
    out_dir = Path(out_dir).absolute()
    origin = read_origin(mix)
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
        parts = _prepare(work_dir, mix, origin)
        num_parts = sum(map(len, parts))
        # the last stage maps the shard of every part, and its signatures
        reserve_descriptors(2 * num_parts, f"{out_dir}: {num_parts:,} parts")
        with open_executor(engine, workers, work_dir) as executor:
            _make_parts(list(chain.from_iterable(parts)), progress, executor)
            for path in work_dir.rglob(f".*{PARTIAL_SUFFIX}"):
                path.unlink()
            manifest = assemble_build(work_dir, mix, origin, parts, executor)
        (work_dir / "build").rename(out_dir)
        sync_directory(out_dir.parent)
        shutil.rmtree(work_dir, ignore_errors=True)
    return manifest


def build_share(
    mix: MixConfig, out_dir: Path | str, index: int, count: int, workers: int | None = 1
) -> int:
    """Make every `count`-th part, beginning with part `index`, for a later `build` to finish.

    Returns:
        Number of parts that this share has.

    Raises:
        DataError: as `build`, and also if parts of another mix lie there.
    """
    assert 0 <= index < count
    out_dir = Path(out_dir).absolute()
    origin = read_origin(mix)
    wanted = origin.fingerprint
    work_dir = _work_dir(out_dir)
    with _locked(out_dir, is_shared=True):
        refuse_foreign(work_dir, WORK)
        if (out_dir / FILE_NAME).exists():
            _read_existing(out_dir, mix, wanted)
            return 0
        if (work_dir / _WORK_FILE).exists() and not _holds_work(work_dir, wanted):
            raise DataError(
                f"{work_dir}: holds parts of another mix or of other input files. Delete it first."
            )
        parts = _prepare(work_dir, mix, origin)
        own_parts = list(chain.from_iterable(parts))[index::count]
        with open_executor(LOCAL, workers, work_dir) as executor:
            _make_parts(own_parts, True, executor)
        return len(own_parts)


def resolve_build_dir(mix: MixConfig, build_dir: Path | None) -> Path:
    """Return `build_dir`, or the default directory of the mix if it is None.

    The default is `DEFAULT_ROOT/<name of the mix>-<first 10 digits of its fingerprint>`, so another
    mix or changed input never meets a stale build.
    """
    if build_dir is not None:
        return build_dir
    return DEFAULT_ROOT / f"{mix.name}-{fingerprint(mix)[:10]}"


def matching_builds(mix: MixConfig) -> list[Path]:
    """Return the default directories that hold a build of the mix, without reading its files.

    Rules, and names and sizes of the files that are here, are those of the mix.
    """
    found = []
    for path in sorted(DEFAULT_ROOT.glob(f"{glob.escape(mix.name)}-*/{FILE_NAME}")):
        try:
            manifest = read_manifest(path.parent)
        except DataError:
            continue
        if not compare(manifest, mix, read_contents=False).differences:
            found.append(path.parent)
    return found


def load_built_mix(mix_file: Path, build_dir: Path | None) -> MixConfig:
    """Read a data-mix YAML; where the mix is built, the files that it names need not be here.

    Args:
        mix_file: The YAML file.
        build_dir: Directory of the build; None looks for it among the default ones.

    Raises:
        ConfigError: the mix is wrong, or neither its files nor its build are here.
    """
    try:
        return load_mix(mix_file)
    except ConfigError as error:
        try:
            mix = load_mix(mix_file, need_files=False)
        except ConfigError:
            raise error from None
        if build_dir is None:
            is_built = bool(matching_builds(mix))
        else:
            is_built = (build_dir / FILE_NAME).is_file()
        if not is_built:
            raise
        return mix


def can_be_read(mix: MixConfig, max_bytes: int) -> bool:
    """Return whether all input is here, and not more than `max_bytes` of it."""
    return not absent_sources(mix) and input_bytes(mix) <= max_bytes


def input_bytes(mix: MixConfig) -> int:
    """Return the number of bytes that a build reads, or invents."""
    total = 0
    for source in mix.sources:
        num_tokens = (source.num_documents or 0) * (source.mean_tokens or 0)
        total += num_tokens * BYTES_PER_INVENTED_TOKEN
        total += sum(path.stat().st_size for path in source.files())
    return total


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
    """Return whether a build of the same fingerprint was begun here."""
    try:
        value = read_json(work_dir / _WORK_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("fingerprint") == wanted


def _prepare(work_dir: Path, mix: MixConfig, origin: Origin) -> list[list[Part]]:
    """Make the work directory, and return the parts of every source."""
    make_folder(work_dir)
    refuse_foreign(work_dir, WORK)
    write_json(work_dir / _WORK_FILE, {"fingerprint": origin.fingerprint})
    parts = []
    for source in mix.sources:
        parts.append(_source_parts(work_dir, mix, source, origin.inputs[source.name]))
    return parts


def _source_parts(
    work_dir: Path, mix: MixConfig, source: SourceConfig, inputs: Sequence[InputFile]
) -> list[Part]:
    parts = []
    files_of = _files_by_unit(source, inputs)
    for number, unit in enumerate(units.split_into_units(source)):
        parts.append(
            Part(
                source=source,
                unit=unit,
                number=number,
                work_dir=work_dir,
                near_duplicates=mix.near_duplicates > 0 and source.format != "mock",
                seq_len=mix.longest_conversation(source),
                inputs=files_of(unit),
            )
        )
    return parts


def _files_by_unit(
    source: SourceConfig, inputs: Sequence[InputFile]
) -> Callable[[units.Unit], tuple[InputFile, ...]]:
    """Return a function that gives the input files that a unit is read from."""
    if source.format in FILE_FORMATS:
        by_path = {file.path: file for file in inputs}
        return lambda unit: tuple(by_path[path] for path in unit.paths)
    all_files = tuple(inputs)
    if source.format == "huggingface" and not all_files:
        paths = hub_files(source)
        all_files = tuple(InputFile(path, state_of(path), "") for path in paths)
    return lambda unit: all_files


def _make_parts(parts: list[Part], progress: bool, executor: Executor) -> None:
    """Make those of the parts that are not there yet."""
    missing = []
    for part in parts:
        if read_account(part) is None:
            missing.append(part)
    total_bytes = sum(part.unit.size_bytes for part in parts)
    missing_bytes = sum(part.unit.size_bytes for part in missing)
    num_tokens = 0
    bar = show_progress(
        total_bytes,
        "build",
        "B",
        initial=total_bytes - missing_bytes,
        unit_scale=True,
        hidden=not progress,
    )
    with bar:
        for part, account in executor.run(make_part, missing):
            num_tokens += account.num_tokens
            state = f"{part.source.name}, {num_tokens / 1e6:,.1f} M tokens"
            bar.set_postfix_str(state, refresh=False)
            bar.update(part.unit.size_bytes)


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
        raise DataError(
            "\n  ".join(
                [
                    f"{out_dir}: holds a build of another mix or of other input files (fingerprint "
                    f"{manifest.fingerprint[:10]}, this mix has {wanted[:10]}):",
                    *found.differences,
                ]
            )
            + "\nChoose another --out, or delete it."
        )
    check_files(out_dir, manifest, verify=True)
    return manifest
