"""The last stage of a build: parts -> checks, packed rows, manifest.

Decisions
    This stage sees all documents, when all parts are made. What grows with them is done by tasks of
    the engine, through files; the process that leads them holds some bytes of each document, and
    never its text or tokens.
    The manifest is written last, so a build with a manifest is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.build.origin import Origin
from data_pipeline.build.packed_split import pack_split
from data_pipeline.build.provenance import write_provenance
from data_pipeline.build.self_replay import base_model_of
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.engine.executor import Executor
from data_pipeline.errors import DataError
from data_pipeline.fates.copied_sources import CopiedSource, find_copied_sources
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.deduplication import Fate
from data_pipeline.fates.document_fates import decide_all_fates
from data_pipeline.fates.dropped import count_dropped, count_exempted, count_read
from data_pipeline.fates.guard_sets import check_dropped, check_guard_sets
from data_pipeline.fates.stage_choice import split_by_stage
from data_pipeline.parts.part import Part
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.reading.clusters import first_of_cluster
from data_pipeline.store.files import sha256_of, sync_directory
from data_pipeline.store.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    TRAIN_FOLDER,
    BuildManifest,
    FileEntry,
    SourceEntry,
    StageEntry,
)
from data_pipeline.store.packing import BLOCK_DOCUMENTS, CLUSTERS_FILE, Integers, Segments
from data_pipeline.store.row_files import (
    DOCUMENT_BYTES_FILE,
    DOCUMENT_TOKENS_FILE,
    SHARD_DOCUMENTS_FILE,
    save_array,
    save_piece_loss,
    save_row_tokens,
)
from data_pipeline.store.shards import Shards
from data_pipeline.store.verification import NOTE_FILE, Facts, inspect, leave_note
from data_pipeline.text.tokenizer import NAME, RANKS_SHA256

log = logging.getLogger(__name__)


def assemble_build(
    work_dir: Path,
    mix: MixConfig,
    origin: Origin,
    parts: Sequence[Sequence[Part]],
    executor: Executor,
) -> BuildManifest:
    """Turn the parts in `work_dir` into a whole build in its folder `build`.

    Args:
        work_dir: Folder of the build in progress.
        mix: The mix to build.
        origin: Rules of the mix and its input files.
        parts: All parts of each source, made.
        executor: Runs what is spread over workers.

    Raises:
        DataError: a source has too many rejects or no documents to train on, or a guard domain is
            too small.
    """
    gathered = []
    for source, source_parts in zip(mix.sources, parts, strict=True):
        gathered.append(SourceParts.gather(source, source_parts))
    for one in gathered:
        one.check_rejects(mix.max_reject_share)
    decided, stock_text = decide_all_fates(mix, gathered, work_dir, executor)
    copied = find_copied_sources(decided)
    for one_copied in copied:
        log.warning("%s", one_copied.describe())
    check_dropped(mix, decided)
    _check_every_source_is_trained_on(mix, decided, copied)
    _check_every_domain_is_measured(mix, decided)
    directory = work_dir / "build"
    for name in (FILE_NAME, NOTE_FILE):  # left by a build killed just before its end
        (directory / name).unlink(missing_ok=True)
    lengths = [stage.seq_len for stage in mix.stages] or [mix.seq_len]
    log.info("packing rows of %s tokens", ", ".join(map(str, lengths)))
    entries = tuple(_pack_source(work_dir, mix, one, executor) for one in decided)
    for one in gathered:
        write_provenance(directory, one)
    manifest = BuildManifest(
        format_version=FORMAT_VERSION,
        fingerprint=origin.fingerprint,
        tokenizer=NAME,
        tokenizer_sha256=RANKS_SHA256,
        seq_len=mix.seq_len,
        sources=entries,
        guard_domains=mix.guard_domains(),
        rules=origin.rules,
        inputs=origin.listed_inputs(),
        files=_file_entries(directory, gathered),
        stock_text=stock_text,
    )
    check_guard_sets(manifest, mix)
    for folder in {path.parent for path in directory.rglob("*")}:
        sync_directory(folder)
    manifest.write(directory)
    sync_directory(directory)
    leave_note(directory, manifest, _hashed_facts(directory, manifest, gathered))
    return manifest


def _check_every_source_is_trained_on(
    mix: MixConfig, decided: Sequence[DecidedSource], copied: Sequence[CopiedSource]
) -> None:
    reasons = {one.name: f" The {one.describe()}" for one in copied}
    for one in decided:
        fates = one.fates
        source = one.parts.source
        if source.held_out_share < 1 and not len(fates.train):
            raise DataError(
                f"source '{source.name}': no document is left to train on "
                f"({fates.num_duplicates} are copies of other documents, "
                f"{fates.num_held_out_copies} are held out by other sources, "
                f"{fates.count(Fate.NEAR_DUPLICATE)} are near copies, "
                f"{fates.count(Fate.CONTAMINATED)} share {mix.decontamination_rules.tokens} tokens "
                "with a held-out document). Remove the source, or give it other text."
                f"{reasons.get(source.name, '')}"
            )


def _check_every_domain_is_measured(mix: MixConfig, decided: Sequence[DecidedSource]) -> None:
    num_held_out = {one.parts.source.name: len(one.fates.held_out) for one in decided}
    for domain in mix.guard_domains():
        if not any(num_held_out[name] for name in domain.sources):
            raise DataError(
                f"guard domain '{domain.name}': no document is held out. Its sources "
                f"({', '.join(domain.sources)}) need at least two different documents each."
            )


def _pack_source(
    work_dir: Path, mix: MixConfig, decided: DecidedSource, executor: Executor
) -> SourceEntry:
    """Pack the training and the held-out documents of a source, and describe it."""
    source = decided.parts.source
    fates = decided.fates
    shards = decided.parts.open_shards()
    folder = work_dir / "build" / source.name
    tokens = shards.document_tokens
    trained = decided.training_segments(tokens)
    measured = Segments.whole(fates.held_out, tokens[fates.held_out])
    _check_nothing_is_cut(mix, source.name, shards)
    packer = _Packer(mix.packing, shards, work_dir, executor)
    stages: tuple[StageEntry, ...] = ()
    if mix.stages:
        stages = _pack_stages(work_dir, mix, decided, trained, packer)
        train = _sum_of_stages(stages)
    else:
        train = packer.pack(folder / TRAIN_FOLDER, trained, mix.seq_len)
    held_out = packer.pack(folder / "held_out", measured, mix.seq_len)
    if decided.parts.has_clusters:
        clusters = first_of_cluster(decided.parts.clusters_of(fates.held_out))
        save_array(folder / "held_out" / CLUSTERS_FILE, clusters)
    _save_sizes(folder, decided, shards)
    for offsets in folder.glob("*/row_offsets.npy"):
        save_row_tokens(offsets.parent)
    read_documents, read_tokens = count_read(decided)
    return SourceEntry(
        name=source.name,
        language=source.language,
        domain=source.domain,
        documents=len(fates.train),
        tokens=int(trained.tokens.sum()),
        predicted_tokens=train.labels,
        bytes=_num_bytes(trained, tokens, shards.document_bytes),
        rows=train.rows,
        held_out_documents=len(fates.held_out),
        held_out_rows=held_out.rows,
        held_out_tokens=held_out.labels,
        held_out_hash=decided.held_out_hash,
        held_out_found=int(decided.held_out_found.sum()),
        duplicates=decided.parts.num_duplicates + fates.num_duplicates,
        near_duplicates=fates.count(Fate.NEAR_DUPLICATE),
        contaminated=fates.count(Fate.CONTAMINATED),
        held_out_copies=fates.num_held_out_copies,
        base_model=base_model_of(source),
        rejects=dict(sorted(decided.parts.tally.rejects.items())),
        notes=dict(sorted(decided.parts.tally.notes.items())),
        stages=stages,
        read_documents=read_documents,
        read_tokens=read_tokens,
        dropped=count_dropped(decided, tokens, trained),
        exempted=count_exempted(decided),
        held_out_unsearched=decided.held_out_unsearched,
        slots=train.slots,
    )


def _check_nothing_is_cut(mix: MixConfig, name: str, shards: Shards) -> None:
    """Refuse to lay conversations end to end, which cuts them where a row ends.

    Raises:
        DataError: the mix asks for it. Answers without their questions would come of it, and with
            loss masks rows without a single label. What a mix itself says is refused when it is
            read; an earlier build is looked at here.
    """
    if mix.packing == "concatenate" and (shards.chat or shards.has_loss):
        raise DataError(
            f"source '{name}' holds conversations or loss masks, but packing is concatenate, which "
            "cuts a document wherever a row ends: an answer would be learned without its question, "
            "and a row of questions would teach nothing. Set packing: best_fit."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packed:
    """How much the rows of a split hold."""

    rows: int
    labels: int
    """Labels that bear loss."""
    slots: int
    """Slots that hold a token of a document; 0 if the documents have no loss masks."""


@dataclass(frozen=True, slots=True)
class _Packer:
    """Packs splits of one source."""

    method: str
    """As for `store.packing.pack`."""
    shards: Shards
    work_dir: Path
    executor: Executor

    def pack(self, folder: Path, segments: Segments, seq_len: int) -> _Packed:
        """Pack segments into the rows of a split, and write their arrays into a folder."""
        packed = pack_split(folder, segments, seq_len, self.method, self.work_dir, self.executor)
        if not self.shards.has_loss:
            return _Packed(rows=packed.num_rows, labels=packed.num_pairs, slots=0)
        num_labels = save_piece_loss(folder, self.shards)
        return _Packed(rows=packed.num_rows, labels=num_labels, slots=packed.num_pairs)


def _sum_of_stages(stages: Sequence[StageEntry]) -> _Packed:
    return _Packed(
        rows=sum(stage.rows for stage in stages),
        labels=sum(stage.predicted_tokens for stage in stages),
        slots=sum(stage.slots for stage in stages),
    )


def _num_bytes(trained: Segments, document_tokens: Integers, document_bytes: Integers) -> int:
    """Return the UTF-8 bytes of segments; of cut documents in proportion to their tokens."""
    total = 0
    for first in range(0, len(trained), BLOCK_DOCUMENTS):
        some = trained.part(first, first + BLOCK_DOCUMENTS)
        whole_bytes = document_bytes[some.document]
        total += int((whole_bytes * some.tokens // document_tokens[some.document]).sum())
    return total


def _pack_stages(
    work_dir: Path,
    mix: MixConfig,
    decided: DecidedSource,
    trained: Segments,
    packer: _Packer,
) -> tuple[StageEntry, ...]:
    """Pack the training documents of a source into the rows of the stages.

    Raises:
        DataError: the source is trained on, and a stage gets none of its documents.
    """
    source = decided.parts.source
    shards = packer.shards
    hashes = decided.parts.hashes_of(np.unique(trained.document))
    splits = split_by_stage(trained, hashes, mix.stages, is_chat=shards.chat)
    entries = []
    for stage, segments in zip(mix.stages, splits, strict=True):
        if not len(segments) and source.is_trained:
            raise DataError(
                f"source '{source.name}': no document is left for the stage of rows of "
                f"{stage.seq_len} tokens. It has {len(np.unique(trained.document))} documents, and "
                f"each of the {len(mix.stages)} stages needs one at least. Give it more text, or "
                "weight 0."
            )
        folder = work_dir / "build" / source.name / f"{TRAIN_FOLDER}-{stage.seq_len}"
        packed = packer.pack(folder, segments, stage.seq_len)
        documents = np.unique(segments.document)
        entries.append(
            StageEntry(
                seq_len=stage.seq_len,
                documents=len(documents),
                tokens=int(segments.tokens.sum()),
                predicted_tokens=packed.labels,
                bytes=_num_bytes(segments, shards.document_tokens, shards.document_bytes),
                rows=packed.rows,
                slots=packed.slots,
            )
        )
    return tuple(entries)


def _save_sizes(folder: Path, decided: DecidedSource, shards: Shards) -> None:
    """Write what training would otherwise gather from all shards of a source."""
    held_out = np.sort(decided.fates.held_out)
    counts = [account.num_documents for account in decided.parts.accounts]
    save_array(folder / "held_out" / DOCUMENT_TOKENS_FILE, shards.document_tokens[held_out])
    save_array(folder / "held_out" / DOCUMENT_BYTES_FILE, shards.learned_bytes[held_out])
    save_array(folder / SHARD_DOCUMENTS_FILE, np.array(counts, np.int64))


def _hashed_facts(
    directory: Path, manifest: BuildManifest, gathered: Sequence[SourceParts]
) -> dict[str, Facts]:
    """Return the facts of the files that have not changed since they were hashed.

    A shard was hashed before its account was written, perhaps by a build that was killed long ago.
    """
    facts = dict(inspect(directory, manifest).facts)
    for source in gathered:
        for part in source.parts:
            hashed_ns = part.account_path.stat().st_mtime_ns
            name = part.shard_path.relative_to(directory).as_posix()
            _, modified_ns, changed_ns, _ = facts[name]
            if max(modified_ns, changed_ns) > hashed_ns:
                del facts[name]
    return facts


def _file_entries(directory: Path, gathered: Sequence[SourceParts]) -> dict[str, FileEntry]:
    """Return size and hash of every file of the build; shards were hashed when written."""
    shards: dict[Path, FileEntry] = {}
    for source in gathered:
        for part, account in zip(source.parts, source.accounts, strict=True):
            shards[part.shard_path] = FileEntry(
                bytes=account.shard_bytes, sha256=account.shard_sha256
            )
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            entry = shards.get(path)
            if entry is None:
                entry = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
            entries[path.relative_to(directory).as_posix()] = entry
    return entries
