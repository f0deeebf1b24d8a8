"""Data mix -> a directory that training reads.

    input files -> texts -> tokens -> one shard per source          (sources, tokenizer, shards)
                     |                        |
                     +-> content hashes -> held out, trained on, copy   (dedup)
                                              |
                                              +-> packed rows, for training and held out   (pack)
                                                      |
                                                      +-> manifest, written last

Decisions
    Everything is written into a hidden sibling directory and renamed at the end, so a directory under the final name
    is complete.  What a killed build leaves behind is removed by the next one; a lock keeps two builds apart.
    Shards hold each text of a source once.  Which of them are trained on, and which are held out, is decided from the
    content hashes alone, before any row exists; a document in no row is never read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tqdm
import xxhash

from data_pipeline.clean import Tally
from data_pipeline.dedup import Assignment, Indices, as_array, assign, content_hash
from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, sha256_of, sync_directory, xxh3_of
from data_pipeline.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    FileEntry,
    Manifest,
    SourceEntry,
    check_files,
    read_manifest,
)
from data_pipeline.pack import ARRAY_NAMES, PackedRows, pack
from data_pipeline.schema import MixConfig, SourceConfig
from data_pipeline.shards import Shard, writing
from data_pipeline.sources import MOCK_BYTES_PER_TOKEN, invent_documents, read_texts
from data_pipeline.tokenizer import NAME, RANKS_SHA256, Tokens, encode

SHARD_NAME = "documents.tokens"
SPLITS = ("train", "held_out")


def build(mix: MixConfig, out_dir: Path | str, progress: bool = True) -> Manifest:
    """Build `mix` into `out_dir`, or return the manifest if it is built there already.

    Args:
        mix: from `load_mix`.
        out_dir: the directory to make; its parents are made, too.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: input that cannot be used, another mix in `out_dir`, or another build at work there.
    """
    out_dir = Path(out_dir).absolute()
    wanted = fingerprint(mix)
    with _locked(out_dir):
        if out_dir.is_file() or out_dir.is_dir() and any(out_dir.iterdir()):
            return _existing(out_dir, wanted)
        temporary = out_dir.with_name(f".{out_dir.name}.building")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            manifest = _build_into(temporary, mix, wanted, progress)
            temporary.rename(out_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_directory(out_dir.parent)
    return manifest


def fingerprint(mix: MixConfig) -> str:
    """Hex sha256 of everything that decides the tokens and rows: not weights, seed, labels or guard domains."""
    sources = [
        {
            "name": source.name,
            "format": source.format,
            "text_field": source.text_field,
            "held_out_share": source.held_out_share,
            "num_documents": source.num_documents,
            "mean_tokens": source.mean_tokens,
            "files": [[path.name, path.stat().st_size, xxh3_of(path)] for path in source.files()],
        }
        for source in mix.sources
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "seq_len": mix.seq_len,
        "tokenizer": RANKS_SHA256,
        "sources": sources,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def default_build_dir(mix: MixConfig, root: Path | str) -> Path:
    """`root/<name of the mix>-<fingerprint, 10 digits>`: another mix or input never reuses a stale build."""
    return Path(root) / f"{mix.name}-{fingerprint(mix)[:10]}"


def input_bytes(mix: MixConfig) -> int:
    """Bytes to read, or to invent, for a build."""
    return sum(
        (source.num_documents or 0) * (source.mean_tokens or 0) * MOCK_BYTES_PER_TOKEN
        + sum(path.stat().st_size for path in source.files())
        for source in mix.sources
    )


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """Hold the lock of `out_dir`; the kernel drops it when the process dies, however it dies."""
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        path = out_dir.with_name(f".{out_dir.name}.lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out_dir}: another process is building it. Wait for that one.") from None
            yield
    except PermissionError as error:
        raise DataError(f"{error.filename}: cannot be written ({error.strerror}). Choose another --out.") from error


def _existing(out_dir: Path, wanted: str) -> Manifest:
    if not (out_dir / FILE_NAME).exists():
        raise DataError(f"{out_dir}: exists and holds something else than a build. Choose another --out.")
    manifest = read_manifest(out_dir)
    if manifest.fingerprint != wanted:
        raise DataError(
            f"{out_dir}: holds a build of another mix or of other input files (fingerprint "
            f"{manifest.fingerprint[:10]}, this mix has {wanted[:10]}). Choose another --out, or delete it."
        )
    check_files(out_dir, manifest, verify=True)
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A source after tokenising."""

    hashes: Sequence[int]
    tally: Tally
    num_duplicates: int


def _build_into(directory: Path, mix: MixConfig, wanted: str, progress: bool) -> Manifest:
    stored = [_store(directory, mix, source, progress) for source in mix.sources]
    assignments = assign([as_array(s.hashes) for s in stored], [s.held_out_share for s in mix.sources])
    _check_assignments(mix, assignments)
    entries = tuple(
        _pack_source(directory, mix, source, s, assignment)
        for source, s, assignment in zip(mix.sources, stored, assignments, strict=True)
    )
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=wanted,
        tokenizer=NAME,
        tokenizer_sha256=RANKS_SHA256,
        seq_len=mix.seq_len,
        sources=entries,
        guard_domains=mix.guard_domains(),
        files={
            path.relative_to(directory).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
            for path in paths
        },
    )
    for folder in {path.parent for path in paths}:
        sync_directory(folder)
    manifest.write(directory)
    sync_directory(directory)
    return manifest


def _check_assignments(mix: MixConfig, assignments: Sequence[Assignment]) -> None:
    """Every source can be trained on, every guard domain measured."""
    for source, assignment in zip(mix.sources, assignments, strict=True):
        if source.held_out_share < 1 and not len(assignment.train):
            raise DataError(
                f"source '{source.name}': no document is left to train on ({assignment.num_duplicates} are copies of "
                f"other sources' documents, {assignment.num_held_out_copies} are held out by other sources)."
            )
    held = {source.name: len(a.held_out) for source, a in zip(mix.sources, assignments, strict=True)}
    for domain in mix.guard_domains():
        if not sum(held[name] for name in domain.sources):
            raise DataError(
                f"guard domain '{domain.name}': no document is held out. Its sources ({', '.join(domain.sources)}) "
                "need at least two different documents each."
            )


def _store(directory: Path, mix: MixConfig, source: SourceConfig, progress: bool) -> _Stored:
    """Tokenise a source into its shard, each text once."""
    tally = Tally()
    seen: dict[int, None] = {}
    num_read = 0
    (directory / source.name).mkdir()
    bar = tqdm.tqdm(desc=source.name, unit=" documents", disable=None if progress else True)
    with bar, writing(directory / source.name / SHARD_NAME) as shard:
        for key, tokens, num_bytes in _encoded(source, tally, seen):
            num_read += 1
            bar.update()
            if key not in seen:
                seen[key] = None
                shard.add(tokens, num_bytes)
        _check_rejects(source, tally, mix.max_reject_share)
        if not num_read:
            raise DataError(f"source '{source.name}': its files hold no documents.")
    return _Stored(hashes=list(seen), tally=tally, num_duplicates=num_read - len(seen))


def _encoded(source: SourceConfig, tally: Tally, seen: dict[int, None]) -> Iterator[tuple[int, Tokens, int]]:
    """(content hash, tokens, UTF-8 bytes) of each document; the tokens of one already seen are left empty."""
    if source.format == "mock":
        for tokens in invent_documents(source, xxhash.xxh3_64_intdigest(source.name.encode())):
            tally.accepted += 1
            yield content_hash(tokens.tobytes()), tokens, len(tokens) * MOCK_BYTES_PER_TOKEN
        return
    for text in read_texts(source, tally):
        content = text.encode("utf-8")
        key = content_hash(content)
        yield key, np.zeros(0, np.uint32) if key in seen else encode(text), len(content)


def _check_rejects(source: SourceConfig, tally: Tally, limit: float) -> None:
    if tally.reject_share > limit:
        rejected = tally.rejects.total()
        raise DataError(
            f"source '{source.name}': {rejected} of {rejected + tally.accepted} documents cannot be used, more than "
            f"max_reject_share {limit:g}: {tally.describe_rejects()}. Repair the files, or raise max_reject_share."
        )


def _pack_source(
    directory: Path, mix: MixConfig, source: SourceConfig, stored: _Stored, assignment: Assignment
) -> SourceEntry:
    """Pack one source's training and held-out documents and describe it."""
    shard = Shard(directory / source.name / SHARD_NAME, verify=False)
    document_tokens = shard.document_tokens
    train, held_out = (
        _pack_split(directory / source.name, split, documents, document_tokens, mix.seq_len)
        for split, documents in zip(SPLITS, (assignment.train, assignment.held_out), strict=True)
    )
    return SourceEntry(
        name=source.name,
        language=source.language,
        domain=source.domain,
        documents=len(assignment.train),
        tokens=int(document_tokens[assignment.train].sum()),
        predicted_tokens=int(train.piece_pairs.sum()),
        bytes=int(shard.document_bytes[assignment.train].sum()),
        rows=train.num_rows,
        held_out_documents=len(assignment.held_out),
        held_out_rows=held_out.num_rows,
        duplicates=stored.num_duplicates + assignment.num_duplicates,
        held_out_copies=assignment.num_held_out_copies,
        rejects=dict(sorted(stored.tally.rejects.items())),
        notes=dict(sorted(stored.tally.notes.items())),
    )


def _pack_split(directory: Path, split: str, documents: Indices, document_tokens: Indices, seq_len: int) -> PackedRows:
    rows = pack(documents, document_tokens[documents], seq_len)
    (directory / split).mkdir()
    for name in ARRAY_NAMES:
        with atomic_write(directory / split / f"{name}.npy") as file:
            np.save(file, getattr(rows, name).astype("<i8"), allow_pickle=False)
    return rows
