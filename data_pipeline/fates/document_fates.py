"""Decide what becomes of every document of a build.

    content hashes -> held out, trained on, or a copy     (exact_copies)
    signatures     -> a near copy                         (near_copies)
    tokens         -> contaminated with held-out text     (held_out_search)

Decisions
    Fates follow from content alone, before any row exists.
    Invented documents stand for no text: they are neither near copies nor contaminated.
    Fates are one byte a document in this process. All else is work of tasks, which read and write
    files of the work directory.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.engine.executor import Executor
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.deduplication import SourceFates
from data_pipeline.fates.exact_copies import decide_exact
from data_pipeline.fates.guard_sets import held_out_hash
from data_pipeline.fates.held_out_search import decontaminate
from data_pipeline.fates.near_copies import mark_near_copies
from data_pipeline.parts.part_groups import document_ends
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.store.manifest import StockText

log = logging.getLogger(__name__)


def decide_all_fates(
    mix: MixConfig, gathered: Sequence[SourceParts], work_dir: Path, executor: Executor
) -> tuple[list[DecidedSource], tuple[StockText, ...]]:
    """Decide what becomes of every document of every source.

    Returns:
        The sources, and the held-out text that the mix lets through.
    """
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
        originals = mark_near_copies(fates, gathered, mix.near_duplicates, work_dir, executor)
        for number, counts in enumerate(originals.tolist()):
            sources[number] = dataclasses.replace(sources[number], near_copies_of=tuple(counts))
    stock_text: tuple[StockText, ...] = ()
    rules = mix.decontamination_rules
    if rules.tokens and real_sources:
        cleaned, stock_text = decontaminate(real_sources, rules, work_dir, executor)
        by_name = {source.parts.source.name: source for source in cleaned}
        sources = [by_name.get(source.parts.source.name, source) for source in sources]
    return sources, stock_text
