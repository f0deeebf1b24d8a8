"""Parts -> a finished build: what becomes of each document, packed rows, manifest.

Decisions
    This stage sees all documents and runs once, in one process; only the search for held-out text
    is spread. It needs some tens of bytes of memory a document, never their text or tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.build.decontamination import HeldOutRuns, contaminated, count_runs
from data_pipeline.build.deduplication import HASH_DTYPE, Fate, Indices, SourceFates, decide_fates
from data_pipeline.build.guard_sets import (
    check_dropped,
    check_guard_sets,
    copied,
    held_out_hash,
    runs_found,
)
from data_pipeline.build.near_duplicates import mark_near_duplicates
from data_pipeline.build.part import Account, Part, read_account, read_hashes, read_signatures
from data_pipeline.build.self_replay import base_model_of
from data_pipeline.build.workers import spread
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write, cached_per_file, sha256_of, sync_directory
from data_pipeline.store.manifest import FILE_NAME, FORMAT_VERSION, FileEntry, Manifest, SourceEntry
from data_pipeline.store.packing import ARRAY_NAMES, PackedRows, pack
from data_pipeline.store.shards import Shard, Shards
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.harmony import body
from data_pipeline.text.tokenizer import NAME, RANKS_SHA256, Tokens

SPLITS = ("train", "held_out")
_RUNS_FILE = "held_out_runs.npy"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A source after tokenising."""

    source: SourceConfig
    parts: Sequence[Part]
    """Those with documents."""
    accounts: Sequence[Account]
    """Of those parts."""
    tally: Tally
    num_duplicates: int
    """Copies left out of the shards."""


def assemble_build(
    work_dir: Path, mix: MixConfig, wanted: str, parts: Sequence[Sequence[Part]], workers: int
) -> Manifest:
    """Turn the parts in `work_dir` into a whole build in its folder `build`.

    Raises:
        DataError: too many rejects, a source without documents, or a guard domain without any.
    """
    stored = [_gather(source, listed) for source, listed in zip(mix.sources, parts, strict=True)]
    for source in stored:
        _check_rejects(source, mix.max_reject_share)
    assignments, held_out = _decide_fates(mix, stored, work_dir, workers)
    check_dropped(mix, assignments)
    _check_assignments(mix, assignments)
    directory = work_dir / "build"
    (directory / FILE_NAME).unlink(missing_ok=True)  # of a build killed just before the end
    entries = tuple(
        _pack_source(directory, mix, *one)
        for one in zip(stored, assignments, held_out, strict=True)
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=wanted,
        tokenizer=NAME,
        tokenizer_sha256=RANKS_SHA256,
        seq_len=mix.seq_len,
        sources=entries,
        guard_domains=mix.guard_domains(),
        files=_file_entries(directory, stored),
    )
    check_guard_sets(manifest, mix)
    for folder in {path.parent for path in directory.rglob("*")}:
        sync_directory(folder)
    manifest.write(directory)
    sync_directory(directory)
    return manifest


def _gather(source: SourceConfig, parts: Sequence[Part]) -> Stored:
    """Add up the accounts of a source."""
    tally, lines, paths = Tally(), 0, None
    accounts = []
    for part in parts:
        account = read_account(part)
        assert account is not None, f"{part.account_path}: parts are made before the end"
        lines = lines if part.unit.paths == paths else 0
        tally.add(account.tally, lines)
        lines, paths = lines + account.tally.lines, part.unit.paths
        accounts.append(account)
    full = [
        (part, account)
        for part, account in zip(parts, accounts, strict=True)
        if account.num_documents
    ]
    return Stored(
        source=source,
        parts=[part for part, _ in full],
        accounts=[account for _, account in full],
        tally=tally,
        num_duplicates=sum(account.num_duplicates for account in accounts),
    )


def _check_rejects(stored: Stored, limit: float) -> None:
    tally, name = stored.tally, stored.source.name
    if tally.reject_share > limit:
        rejected = tally.rejects.total()
        raise DataError(
            f"source '{name}': {rejected} of {rejected + tally.accepted} documents cannot be used, more than "
            f"max_reject_share {limit:g}: {tally.describe_rejects()}. Repair the files, or raise max_reject_share."
        )
    if not stored.parts:
        raise DataError(f"source '{name}': its files hold no documents.")


@dataclasses.dataclass(kw_only=True, slots=True)
class _HeldOut:
    """What is known about the held-out documents of one source."""

    hash: str
    found: npt.NDArray[np.bool_]
    """Of which training text had a copy or a long run."""


def _decide_fates(
    mix: MixConfig, stored: Sequence[Stored], work_dir: Path, workers: int
) -> tuple[list[SourceFates], list[_HeldOut]]:
    """What becomes of every document."""
    hashes = [np.concatenate([np.zeros(0, HASH_DTYPE), *map(read_hashes, s.parts)]) for s in stored]
    assignments = decide_fates(hashes, [source.held_out_share for source in mix.sources])
    held_out = [
        _HeldOut(hash=held_out_hash(values, assignment), found=found)
        for values, assignment, found in zip(
            hashes, assignments, copied(hashes, assignments), strict=True
        )
    ]
    del hashes
    if mix.near_duplicates > 0:
        real = [n for n, s in enumerate(stored) if s.source.format != "mock"]
        fates = np.concatenate([np.zeros(0, np.uint8), *(assignments[n].fates for n in real)])
        mark_near_duplicates(
            fates,
            [read_signatures(part) for n in real for part in stored[n].parts],
            mix.near_duplicates,
        )
        ends = np.cumsum([len(assignments[n].fates) for n in real])[:-1]
        for number, values in zip(real, np.split(fates, ends) if real else [], strict=True):
            assignments[number] = SourceFates(fates=values)
    if mix.decontaminate_tokens:
        _decontaminate(mix, stored, assignments, held_out, work_dir, workers)
    return assignments, held_out


def _decontaminate(
    mix: MixConfig,
    stored: Sequence[Stored],
    assignments: Sequence[SourceFates],
    held_out: Sequence[_HeldOut],
    work_dir: Path,
    workers: int,
) -> None:
    """Turn TRAIN into CONTAMINATED where a document shares a run with a held-out one, and note
    which ones those are.
    """
    held = [
        _held_out_texts(source, assignment)
        for source, assignment in zip(stored, assignments, strict=True)
    ]
    if not any(held):
        return
    real = [(s, a) for s, a in zip(stored, assignments, strict=True) if s.source.format != "mock"]
    length = mix.decontaminate_tokens
    runs = HeldOutRuns.of([text for texts in held for text in texts if len(text) >= length], length)
    jobs = []
    for source, assignment in real:
        ends = np.cumsum([account.num_documents for account in source.accounts])[:-1]
        masks = np.split(assignment.fates == Fate.TRAIN, ends)
        paths = [part.shard_path for part in source.parts]
        jobs += [
            _Scan(path, mask, work_dir, runs.window)
            for path, mask in zip(paths, masks, strict=True)
        ]
    _save_runs(work_dir, runs)
    counts = sum(
        (found for _, found in spread(_count, jobs, workers)), np.zeros(len(runs.hashes), np.int64)
    )
    _save_runs(work_dir, runs.without_common(counts))
    marked = {job.shard_path: found for job, found in spread(_mark, jobs, workers)}
    for source, assignment in real:
        hits = np.concatenate([marked[part.shard_path] for part in source.parts])
        assignment.fates[hits & (assignment.fates == Fate.TRAIN)] = Fate.CONTAMINATED
    for texts, one in zip(held, held_out, strict=True):
        one.found[: len(texts)] |= np.array(
            [runs_found(text, runs, counts) for text in texts], dtype=bool
        )


def _held_out_texts(stored: Stored, assignment: SourceFates) -> list[Tokens]:
    """Tokens of each held-out document, without the last one, and without what all conversations
    begin with.
    """
    if not len(assignment.held_out) or stored.source.format == "mock":
        return []
    shards = _shards(stored)
    ends = shards.document_tokens - 1
    texts = [shards.tokens(n, 0, int(ends[n])) for n in assignment.held_out.tolist()]
    return [body(text) for text in texts] if shards.chat else texts


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Scan:
    """A shard to search for held-out runs."""

    shard_path: Path
    train: npt.NDArray[np.bool_]
    work_dir: Path
    window: int


def _count(job: _Scan) -> npt.NDArray[np.int64]:
    shard = Shard(job.shard_path, verify=False)
    return count_runs(shard.all_tokens, shard.offsets, job.train, _runs(job))


def _mark(job: _Scan) -> npt.NDArray[np.bool_]:
    shard = Shard(job.shard_path, verify=False)
    return contaminated(shard.all_tokens, shard.offsets, _runs(job))


def _save_runs(work_dir: Path, runs: HeldOutRuns) -> None:
    with atomic_write(work_dir / _RUNS_FILE) as file:
        np.save(file, runs.hashes)


def _runs(job: _Scan) -> HeldOutRuns:
    return _load_runs(job.work_dir / _RUNS_FILE, job.window)


@cached_per_file(max_files=1)
def _load_runs(path: Path, window: int) -> HeldOutRuns:
    return HeldOutRuns.from_hashes(np.load(path), window)


def _check_assignments(mix: MixConfig, assignments: Sequence[SourceFates]) -> None:
    """Every source can be trained on, every guard domain measured."""
    for source, assignment in zip(mix.sources, assignments, strict=True):
        if source.held_out_share < 1 and not len(assignment.train):
            raise DataError(
                f"source '{source.name}': no document is left to train on ({assignment.num_duplicates} are copies of "
                f"other documents, {assignment.num_held_out_copies} are held out by other sources, "
                f"{assignment.count(Fate.NEAR_DUPLICATE)} are near copies, {assignment.count(Fate.CONTAMINATED)} share "
                f"{mix.decontaminate_tokens} tokens with a held-out document)."
            )
    held = {
        source.name: len(a.held_out) for source, a in zip(mix.sources, assignments, strict=True)
    }
    for domain in mix.guard_domains():
        if not sum(held[name] for name in domain.sources):
            raise DataError(
                f"guard domain '{domain.name}': no document is held out. Its sources ({', '.join(domain.sources)}) "
                "need at least two different documents each."
            )


def _shards(stored: Stored) -> Shards:
    paths = [part.shard_path for part in stored.parts]
    return Shards(paths[0].parent, [path.name for path in paths], verify=False)


def _pack_source(
    directory: Path, mix: MixConfig, stored: Stored, assignment: SourceFates, held: _HeldOut
) -> SourceEntry:
    """Pack one source's training and held-out documents and describe it."""
    shards, source = _shards(stored), stored.source
    train, held_out = (
        _pack_split(
            directory / source.name / split, documents, shards.document_tokens[documents], mix
        )
        for split, documents in zip(SPLITS, (assignment.train, assignment.held_out), strict=True)
    )
    return SourceEntry(
        name=source.name,
        language=source.language,
        domain=source.domain,
        documents=len(assignment.train),
        tokens=int(shards.document_tokens[assignment.train].sum()),
        predicted_tokens=int(train.piece_pairs.sum()),
        bytes=int(shards.document_bytes[assignment.train].sum()),
        rows=train.num_rows,
        held_out_documents=len(assignment.held_out),
        held_out_rows=held_out.num_rows,
        held_out_tokens=int(held_out.piece_pairs.sum()),
        held_out_hash=held.hash,
        held_out_found=int(held.found.sum()),
        duplicates=stored.num_duplicates + assignment.num_duplicates,
        near_duplicates=assignment.count(Fate.NEAR_DUPLICATE),
        contaminated=assignment.count(Fate.CONTAMINATED),
        held_out_copies=assignment.num_held_out_copies,
        base_model=base_model_of(source),
        rejects=dict(sorted(stored.tally.rejects.items())),
        notes=dict(sorted(stored.tally.notes.items())),
    )


def _pack_split(
    directory: Path, documents: Indices, document_tokens: Indices, mix: MixConfig
) -> PackedRows:
    rows = pack(documents, document_tokens, mix.seq_len, mix.packing)
    directory.mkdir(exist_ok=True)
    for name in ARRAY_NAMES:
        with atomic_write(directory / f"{name}.npy") as file:
            np.save(file, getattr(rows, name).astype("<i8"), allow_pickle=False)
    return rows


def _file_entries(directory: Path, stored: Sequence[Stored]) -> dict[str, FileEntry]:
    """Every file of the build; shards were hashed when they were written."""
    known = {
        part.shard_path: FileEntry(bytes=account.shard_bytes, sha256=account.shard_sha256)
        for source in stored
        for part, account in zip(source.parts, source.accounts, strict=True)
    }
    paths: list[Any] = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): known.get(path)
        or FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }
