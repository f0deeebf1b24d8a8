"""Decide what becomes of every document of a build.

    content hashes -> held out, trained on, or a copy     (exact_copies)
    signatures     -> a near copy                         (near_copies)
    tokens         -> contaminated with held-out text     (decontamination)

Decisions
    Fates follow from content alone, before any row exists.
    Invented documents stand for no text: they are neither near copies nor contaminated.
    Fates are one byte a document in this process. All else is work of tasks, which read and write
    files of the work directory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.build.decontamination import HeldOutRuns, count_runs, find_contaminated
from data_pipeline.build.deduplication import Fate, SourceFates
from data_pipeline.build.exact_copies import decide_exact
from data_pipeline.build.guard_sets import has_found_run, held_out_hash
from data_pipeline.build.near_copies import mark_near_copies
from data_pipeline.build.part_groups import document_ends
from data_pipeline.build.source_parts import SourceParts
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.console.progress import show_progress
from data_pipeline.engine.executor import Executor
from data_pipeline.store.files import atomic_write, cached_per_file
from data_pipeline.store.packing import Integers
from data_pipeline.store.shards import Shard
from data_pipeline.text.harmony import body
from data_pipeline.text.tokenizer import Tokens

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
_RUNS_FILE = "held_out_runs.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecidedSource:
    """One source, and what becomes of its documents."""

    parts: SourceParts
    fates: SourceFates
    held_out_hash: str
    """Hex sha256 of the content hashes of its held-out documents."""
    held_out_found: Mask
    """For each held-out document, whether training text had a copy or a long run of it."""


def decide_all_fates(
    mix: MixConfig, gathered: Sequence[SourceParts], work_dir: Path, executor: Executor
) -> list[DecidedSource]:
    """Decide what becomes of every document of every source."""
    ends = document_ends(gathered)
    log.info("looking for copies among %d documents", ends[-1])
    shares = [source.held_out_share for source in mix.sources]
    fates, is_copied = decide_exact(gathered, shares, work_dir, executor)
    sources = []
    first = 0
    for parts, end in zip(gathered, ends, strict=True):
        source_fates = SourceFates(fates=fates[first:end])
        held_out = source_fates.held_out
        sources.append(
            DecidedSource(
                parts=parts,
                fates=source_fates,
                held_out_hash=held_out_hash(parts.hashes_of(held_out)),
                held_out_found=is_copied[first:end][held_out],
            )
        )
        first = end
    real_sources = [source for source in sources if not source.parts.is_mock]
    if mix.near_duplicates > 0 and real_sources:
        log.info("looking for near copies")
        mark_near_copies(fates, gathered, mix.near_duplicates, work_dir, executor)
    if mix.decontaminate_tokens and real_sources:
        _decontaminate(real_sources, mix.decontaminate_tokens, work_dir, executor)
    return sources


def _decontaminate(
    sources: Sequence[DecidedSource], length: int, work_dir: Path, executor: Executor
) -> None:
    """Turn TRAIN into CONTAMINATED where a document shares a run with a held-out document.

    Args:
        sources: Sources of text; the fates are changed in place, and so are the notes of which
            held-out documents were found.
        length: Tokens in a row that count as a run.
        work_dir: Folder for the file of runs.
        executor: Runs the searches.
    """
    texts_by_source = [_held_out_texts(source) for source in sources]
    if not any(texts_by_source):
        return
    long_texts = []
    for texts in texts_by_source:
        long_texts += [text for text in texts if len(text) >= length]
    runs = HeldOutRuns.from_documents(long_texts, length)
    scans = []
    for source in sources:
        scans += _scans(source, work_dir, runs.window)
    _save_runs(work_dir, runs)
    counts = np.zeros(len(runs.hashes), np.int64)
    contaminated: dict[Path, Mask] = {}
    with show_progress(2 * len(scans), "search for held-out text", "scan") as bar:
        for _, shard_counts in executor.run(_count_runs, scans):
            counts += shard_counts
            bar.update()
        _save_runs(work_dir, runs.without_common(counts))
        for scan, mask in executor.run(_find_contaminated, scans):
            contaminated[scan.shard_path] = mask
            bar.update()
    for source, texts in zip(sources, texts_by_source, strict=True):
        _mark_contaminated(source, contaminated)
        for number, text in enumerate(texts):
            source.held_out_found[number] |= has_found_run(text, runs, counts)


def _mark_contaminated(source: DecidedSource, contaminated: dict[Path, Mask]) -> None:
    masks = [contaminated[part.shard_path] for part in source.parts.parts]
    fates = source.fates.fates
    fates[np.concatenate(masks) & (fates == Fate.TRAIN)] = Fate.CONTAMINATED


def _held_out_texts(source: DecidedSource) -> list[Tokens]:
    """Return the tokens of each held-out document, without the token that ends it.

    A conversation is returned without its system message, which all conversations share.
    """
    if not len(source.fates.held_out):
        return []
    shards = source.parts.open_shards()
    texts = []
    for number in source.fates.held_out.tolist():
        text = shards.tokens(number, 0, int(shards.document_tokens[number]) - 1)
        texts.append(body(text) if shards.chat else text)
    return texts


@dataclass(frozen=True, slots=True, eq=False)
class _Scan:
    """A shard to search for runs of held-out text."""

    shard_path: Path
    train: Mask
    """Documents of the shard that are trained on."""
    work_dir: Path
    window: int
    """Tokens that are looked up at once."""


def _scans(source: DecidedSource, work_dir: Path, window: int) -> list[_Scan]:
    """Return the searches through the shards of a source."""
    train = source.fates.fates == Fate.TRAIN
    scans = []
    start = 0
    for part, account in zip(source.parts.parts, source.parts.accounts, strict=True):
        stop = start + account.num_documents
        scans.append(_Scan(part.shard_path, train[start:stop], work_dir, window))
        start = stop
    return scans


def _count_runs(scan: _Scan) -> Integers:
    shard = Shard(scan.shard_path, verify=False)
    return count_runs(shard.all_tokens, shard.offsets, scan.train, _read_runs(scan))


def _find_contaminated(scan: _Scan) -> Mask:
    shard = Shard(scan.shard_path, verify=False)
    return find_contaminated(shard.all_tokens, shard.offsets, _read_runs(scan))


def _save_runs(work_dir: Path, runs: HeldOutRuns) -> None:
    with atomic_write(work_dir / _RUNS_FILE) as file:
        np.save(file, runs.hashes)


def _read_runs(scan: _Scan) -> HeldOutRuns:
    return _load_runs(scan.work_dir / _RUNS_FILE, scan.window)


@cached_per_file(max_files=1)
def _load_runs(path: Path, window: int) -> HeldOutRuns:
    return HeldOutRuns.from_hashes(np.load(path), window)
