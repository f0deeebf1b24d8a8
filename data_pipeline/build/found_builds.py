"""Builds that are there already: where they are, and which of them is that of a mix.

Decisions
    Looking for a build never makes one.
    A build is that of a mix if their fingerprints are equal, whatever it is called. Names and sizes
    of files are compared first, so where no build has them nothing is read. Builds of the same
    fingerprint and the same text are one build twice, of which the first is taken. If their texts
    differ, versions of this package made them that read some file differently, and somebody has to
    name the one that is meant.
    Where none of a source's files is here, its rules decide alone, and so where the file of its
    hook is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipeline.build.origin import absent_sources, compare, fingerprint
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.engine.local import LocalExecutor, available_cores
from data_pipeline.errors import ConfigError, CptError, DataError, StorageError
from data_pipeline.reading.document import BYTES_PER_INVENTED_TOKEN
from data_pipeline.reading.input_files import HashNotes
from data_pipeline.store.manifest import FILE_NAME, BuildManifest, read_manifest

DEFAULT_ROOT = Path("data")
"""Directory for builds and audit pages that are given no place of their own."""


class NotBuilt(ConfigError):
    """A mix of which no build was found."""


class Identity(NamedTuple):
    """What two builds have in common if it does not matter which of them is taken."""

    fingerprint: str
    text: str
    """Hex sha256 of the hashes of rows and held-out documents."""


def resolve_build_dir(
    mix: MixConfig,
    build_dir: Path | None,
    notes: HashNotes | None = None,
    workers: int | None = 1,
) -> Path:
    """Return `build_dir`, or the default directory of the mix if it is None.

    Args:
        mix: The mix.
        build_dir: The directory that somebody named.
        notes: Hashes of input files that were read before.
        workers: Processes that hash the others; None for as many as there are cores.

    The default is `DEFAULT_ROOT/<name of the mix>-<first 10 digits of its fingerprint>`, so another
    mix or changed input never meets a stale build.
    """
    if build_dir is not None:
        return build_dir
    return DEFAULT_ROOT / f"{mix.name}-{_fingerprint(mix, notes, workers)[:10]}"


def found_or_default(mix: MixConfig) -> Path:
    """Return the build of a mix in `DEFAULT_ROOT`, or the default directory where there is none.

    All files of the mix are read for it.

    Raises:
        ConfigError: several builds of it have other texts.
        DataError: one of them cannot be read.
    """
    wanted = _fingerprint(mix, None, 1)
    passed_over = (DataError, ConfigError)
    found = dict(_builds_that_fit(mix, _manifests(mix), passed_over, wanted))
    return _first_of_one_text(mix, found) or DEFAULT_ROOT / f"{mix.name}-{wanted[:10]}"


def find_build(
    mix: MixConfig,
    build_dir: Path | None = None,
    notes: HashNotes | None = None,
    workers: int | None = 1,
) -> Path:
    """Return the directory of the build of a mix, which is not made here.

    The arguments are those of `resolve_build_dir`; without `build_dir` it is looked for in
    `DEFAULT_ROOT`.

    Raises:
        NotBuilt: there is none.
        ConfigError: several may be it: the files of the mix are not here, or their texts differ.
        DataError: `build_dir` holds the build of another mix or of other files, or a file cannot be
            read.
    """
    if build_dir is not None:
        _check_named_build(build_dir, mix, notes, workers)
        return build_dir
    found = builds_by_names(mix)
    if not found:
        raise NotBuilt(f"{mix.name}: {DEFAULT_ROOT}/ holds no build of this mix.")
    if absent_sources(mix):
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"{', '.join(map(str, found))}: each may be the build of mix '{mix.name}', whose "
                "files are not here. Name the one that is meant."
            )
        return next(iter(found))
    wanted = _fingerprint(mix, notes, workers)
    equal = {path: build for path, build in found.items() if build.fingerprint == wanted}
    first = _first_of_one_text(mix, equal)
    if first is not None:
        return first
    raise NotBuilt(
        f"{mix.name}: {', '.join(map(str, found))} was built from files of the same names and "
        "sizes, but of other content."
    )


def _first_of_one_text(mix: MixConfig, found: Mapping[Path, Identity]) -> Path | None:
    """Return the first of the builds of one fingerprint, or None if there is none.

    Raises:
        ConfigError: their texts differ.
    """
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"{', '.join(map(str, found))}: each is a build of mix '{mix.name}' from the files "
            "that are here, and their texts differ: versions of this package made them that read "
            "some of the files differently. Name the one that is meant (data.build_dir of a run, "
            "--out of plan, --old_out and --new_out of diff), or delete the others."
        )
    return next(iter(found), None)


def _check_named_build(
    build_dir: Path, mix: MixConfig, notes: HashNotes | None, workers: int | None
) -> None:
    """Refuse a directory that does not hold the build of a mix."""
    if not (build_dir / FILE_NAME).is_file():
        raise NotBuilt(f"{mix.name}: {build_dir} holds no build.")
    manifest = read_manifest(build_dir)
    if absent_sources(mix):
        found = compare(manifest, mix, read_contents=False)
        if found.differences:
            raise other_build_error(build_dir, manifest, found.differences)
        return
    if manifest.fingerprint != _fingerprint(mix, notes, workers):
        found = compare(manifest, mix, read_contents=True)
        raise other_build_error(build_dir, manifest, found.differences)


def other_build_error(
    build_dir: Path, manifest: BuildManifest, differences: tuple[str, ...]
) -> DataError:
    """Return the error that says that a directory holds the build of another mix."""
    lines = [
        f"{build_dir}: holds a build of another mix or of other input files (fingerprint "
        f"{manifest.fingerprint[:10]}):",
        *differences,
    ]
    return DataError("\n  ".join(lines) + "\nChoose another --out, or delete it.")


def _fingerprint(mix: MixConfig, notes: HashNotes | None, workers: int | None) -> str:
    with LocalExecutor(workers or available_cores()) as executor:
        return fingerprint(mix, executor, notes)


def builds_by_names(mix: MixConfig) -> dict[Path, Identity]:
    """Return the builds in `DEFAULT_ROOT` that may be of a mix, and the identity of each.

    Rules, and names and sizes of the files that are here, are those of the mix. Builds that have
    its name come first.
    """
    # damaged, of another version, or another user's
    return dict(_builds_that_fit(mix, _manifests(mix), (DataError, ConfigError)))


def _manifests(mix: MixConfig) -> list[Path]:
    """Return the manifests in `DEFAULT_ROOT`, those that have the name of a mix first."""

    def rank(path: Path) -> tuple[bool, Path]:
        return not _has_name_of(mix, path), path

    return sorted(DEFAULT_ROOT.glob(f"*/{FILE_NAME}"), key=rank)


def _has_name_of(mix: MixConfig, manifest_path: Path) -> bool:
    folder = manifest_path.parent.name
    return folder == mix.name or folder.startswith(f"{mix.name}-")


def matching_builds(mix: MixConfig) -> list[Path]:
    """Return the builds of a mix in `DEFAULT_ROOT`, without reading its files.

    Rules, and names and sizes of the files that are here, are those of the mix. There is one folder
    for each fingerprint and text, the one that has the name of the mix if there is such a one.

    Raises:
        ConfigError: others may write to a folder that has the name of the mix.
    """
    found: dict[Identity, Path] = {}
    for path in _manifests(mix):
        # what others may write to is not read, so only its name can tell whose build it is
        passed_over = (DataError,) if _has_name_of(mix, path) else (DataError, ConfigError)
        for folder, of_build in _builds_that_fit(mix, [path], passed_over):
            found.setdefault(of_build, folder)
    return list(found.values())


def only_build(mix: MixConfig, mix_file: Path) -> Path | None:
    """Return the build of a mix that `matching_builds` finds; None if there is none.

    Args:
        mix: The mix.
        mix_file: What a message calls it.

    Raises:
        ConfigError: there are several; or as `matching_builds`.
    """
    found = matching_builds(mix)
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ConfigError(f"{mix_file} has several builds, name one as data.build_dir: {names}.")
    return next(iter(found), None)


def _builds_that_fit(
    mix: MixConfig,
    paths: Iterable[Path],
    passed_over: tuple[type[CptError], ...],
    wanted: str | None = None,
) -> Iterator[tuple[Path, Identity]]:
    """Yield folder and identity of the builds whose rules, names and sizes are those of a mix.

    Args:
        mix: The mix.
        paths: Manifests to look at.
        passed_over: Errors of reading a manifest for which a build is none.
        wanted: Fingerprint of the mix, which decides alone if it is known.
    """
    for path in paths:
        try:
            manifest = read_manifest(path.parent)
        except passed_over:
            continue
        if wanted is None:
            if not _may_fit(manifest, mix):
                continue
            is_equal = not compare(manifest, mix, read_contents=False).differences
        else:
            is_equal = manifest.fingerprint == wanted
        if is_equal:
            yield path.parent, _identity(manifest)


def _identity(manifest: BuildManifest) -> Identity:
    held_out = [source.held_out_hash for source in manifest.sources]
    text = json.dumps([manifest.row_hashes(), held_out], sort_keys=True)
    return Identity(manifest.fingerprint, hashlib.sha256(text.encode()).hexdigest())


def _may_fit(manifest: BuildManifest, mix: MixConfig) -> bool:
    """Return whether a build has the row length and the sources of a mix.

    No file of the mix is looked at for it, so the builds of other mixes cost nothing but that.
    """
    rules = manifest.rules
    if not rules:
        return True
    names = [source["name"] for source in rules["sources"]]
    return rules["seq_len"] == mix.seq_len and names == [source.name for source in mix.sources]


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
    except (ConfigError, StorageError) as error:
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
