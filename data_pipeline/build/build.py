"""Data mix -> a directory that training reads.

    sources -> units -> parts: texts, hashes, tokens, signatures     (units, part; spread over processes or machines)
                          |
                          +-> held out, trained on, copy             (dedup, near, decontaminate)
                                 |
                                 +-> packed rows                     (pack, assembly)
                                        |
                                        +-> manifest, written last

Decisions
    Everything is written into a hidden sibling directory and renamed at the end, so a directory
    under the final name is complete.  Parts that a killed build has finished are used by the next
    one; a lock keeps two builds apart. Units, and with them the output, do not depend on the number
    of processes or machines. Shards may hold copies; a document in no row is never read.  What is
    trained on, and what is held out, is decided from content alone, before any row exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import tqdm

from data_pipeline.build import units
from data_pipeline.build.assembly import assemble_build
from data_pipeline.build.document import BYTES_PER_INVENTED_TOKEN
from data_pipeline.build.part import Part, make_part, read_account
from data_pipeline.build.workers import spread
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.store.files import (
    PARTIAL_SUFFIX,
    cached_per_file,
    sync_directory,
    write_json,
    xxh3_of,
)
from data_pipeline.store.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    Manifest,
    check_files,
    read_manifest,
)
from data_pipeline.text.tokenizer import RANKS_SHA256

DEFAULT_ROOT = Path("data")
"""Directory for builds and audit pages that are given no place of their own."""
_WORK_FILE = "work.json"


def build(mix: MixConfig, out_dir: Path | str, progress: bool = True, workers: int = 1) -> Manifest:
    """Build `mix` into `out_dir`, or return the manifest if it is built there already.

    Args:
        mix: from `load_mix`.
        out_dir: the directory to make; its parents are made, too.
        progress: show a progress bar on a terminal.
        workers: processes; the output is the same for every number.

    Raises:
        DataError: input that cannot be used, another mix in `out_dir`, or another build at work
            there.
    """
    out_dir = Path(out_dir).absolute()
    wanted = fingerprint(mix)
    work_dir = _work_dir(out_dir)
    with _locked(out_dir, fcntl.LOCK_EX):
        if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
            manifest = _existing(out_dir, wanted)
            shutil.rmtree(work_dir, ignore_errors=True)
            return manifest
        if not _holds_work(work_dir, wanted):
            shutil.rmtree(work_dir, ignore_errors=True)
        parts = _prepare(work_dir, mix, wanted)
        _make_parts([part for source in parts for part in source], progress, workers)
        for path in work_dir.rglob(f".*{PARTIAL_SUFFIX}"):
            path.unlink()
        manifest = assemble_build(work_dir, mix, wanted, parts, workers)
        (work_dir / "build").rename(out_dir)
        sync_directory(out_dir.parent)
        shutil.rmtree(work_dir, ignore_errors=True)
    return manifest


def build_share(
    mix: MixConfig, out_dir: Path | str, index: int, count: int, workers: int = 1
) -> int:
    """Make every `count`-th part, from part `index` on, for a later `build` of the same mix to
    finish.

    Returns:
        Parts made now or before.

    Raises:
        DataError: as `build`; also if the work on another mix lies there.
    """
    assert 0 <= index < count
    out_dir = Path(out_dir).absolute()
    wanted = fingerprint(mix)
    work_dir = _work_dir(out_dir)
    with _locked(out_dir, fcntl.LOCK_SH):
        if (out_dir / FILE_NAME).exists():
            _existing(out_dir, wanted)
            return 0
        if (
            work_dir.exists()
            and (work_dir / _WORK_FILE).exists()
            and not _holds_work(work_dir, wanted)
        ):
            raise DataError(
                f"{work_dir}: holds parts of another mix or of other input files. Delete it first."
            )
        parts = [part for source in _prepare(work_dir, mix, wanted) for part in source][
            index::count
        ]
        _make_parts(parts, True, workers)
        return len(parts)


def fingerprint(mix: MixConfig) -> str:
    """Hex sha256 of everything that decides the tokens and rows: not weights, seed, labels or guard
    domains.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "seq_len": mix.seq_len,
        "packing": mix.packing,
        "near_duplicates": mix.near_duplicates,
        "decontaminate_tokens": mix.decontaminate_tokens,
        "tokenizer": RANKS_SHA256,
        "unit_bytes": units.MIN_UNIT_BYTES,
        "sources": [_source_content(source) for source in mix.sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source_content(source: SourceConfig) -> dict[str, object]:
    keys = (
        *(
            "name",
            "format",
            "text_field",
            "template",
            "normalise",
            "held_out_share",
            "num_documents",
            "mean_tokens",
        ),
        *("dataset", "revision", "subset", "split", "build_sources", "kind"),
    )
    files = [[path.name, path.stat().st_size, _file_hash(path)] for path in source.files()]
    return {key: getattr(source, key) for key in keys} | {"files": files}


_file_hash = cached_per_file(max_files=2**16)(xxh3_of)


def resolve_build_dir(mix: MixConfig, build_dir: Path | None) -> Path:
    """Return `build_dir`, or the default directory of the mix if it is None.

    The default is `DEFAULT_ROOT/<name of the mix>-<first 10 digits of its fingerprint>`, so another
    mix or changed input never meets a stale build.
    """
    if build_dir is not None:
        return build_dir
    return DEFAULT_ROOT / f"{mix.name}-{fingerprint(mix)[:10]}"


def input_bytes(mix: MixConfig) -> int:
    """Bytes to read, or to invent, for a build."""
    return sum(
        (source.num_documents or 0) * (source.mean_tokens or 0) * BYTES_PER_INVENTED_TOKEN
        + sum(path.stat().st_size for path in source.files())
        for source in mix.sources
    )


def _work_dir(out_dir: Path) -> Path:
    return out_dir.with_name(f".{out_dir.name}.building")


def _holds_work(work_dir: Path, wanted: str) -> bool:
    """Whether a build of the same fingerprint was begun here."""
    try:
        value = json.loads((work_dir / _WORK_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("fingerprint") == wanted


def _prepare(work_dir: Path, mix: MixConfig, wanted: str) -> list[list[Part]]:
    """The parts of every source, and a place for them."""
    work_dir.mkdir(exist_ok=True)
    write_json(work_dir / _WORK_FILE, {"fingerprint": wanted})
    return [
        [
            Part(
                source=source,
                unit=unit,
                number=number,
                work_dir=work_dir,
                near_duplicates=mix.near_duplicates > 0 and source.format != "mock",
            )
            for number, unit in enumerate(units.split_into_units(source))
        ]
        for source in mix.sources
    ]


def _make_parts(parts: list[Part], progress: bool, workers: int) -> None:
    """Make the parts that are not there."""
    missing = [part for part in parts if read_account(part) is None]
    total, done = sum(p.unit.size_bytes for p in parts), sum(p.unit.size_bytes for p in missing)
    tokens = 0
    bar = tqdm.tqdm(
        total=total,
        initial=total - done,
        unit="B",
        unit_scale=True,
        desc="build",
        disable=None if progress else True,
    )
    with bar:
        for part, account in spread(make_part, missing, workers):
            tokens += account.num_tokens
            bar.set_postfix_str(f"{part.source.name}, {tokens / 1e6:,.1f} M tokens", refresh=False)
            bar.update(part.unit.size_bytes)


@contextlib.contextmanager
def _locked(out_dir: Path, kind: int) -> Iterator[None]:
    """Hold the lock of `out_dir`; the kernel drops it when the process dies, however it dies."""
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        path = out_dir.with_name(f".{out_dir.name}.lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{out_dir}: another process is building it. Wait for that one."
                ) from None
            yield
    except PermissionError as error:
        raise DataError(
            f"{error.filename}: cannot be written ({error.strerror}). Choose another --out."
        ) from error


def _existing(out_dir: Path, wanted: str) -> Manifest:
    if not (out_dir / FILE_NAME).exists():
        raise DataError(
            f"{out_dir}: exists and holds something else than a build. Choose another --out."
        )
    manifest = read_manifest(out_dir)
    if manifest.fingerprint != wanted:
        raise DataError(
            f"{out_dir}: holds a build of another mix or of other input files (fingerprint "
            f"{manifest.fingerprint[:10]}, this mix has {wanted[:10]}). Choose another --out, or delete it."
        )
    check_files(out_dir, manifest, verify=True)
    return manifest
