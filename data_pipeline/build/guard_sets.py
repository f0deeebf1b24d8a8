"""Held-out text as a measuring device: is there enough of it, and was it in the training text?

Decisions
    Training text that holds a held-out document is dropped; this module counts how much that was. A
    training source that is mostly held-out text is refused: the guard files are then a copy of that
    source, and dropping their text would leave little to train on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipeline.build.decontamination import EDGE_TOKENS, MAX_COMMON, HeldOutRuns
from data_pipeline.build.deduplication import Fate, Hashes, SourceFates
from data_pipeline.build.near_duplicates import window_hashes
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.errors import DataError
from data_pipeline.store.manifest import BuildManifest
from data_pipeline.store.packing import Integers
from data_pipeline.text.tokenizer import Tokens

MAX_DROPPED_SHARE = 0.5
"""Largest share of a training source's documents that may be held-out text of other sources."""


def held_out_hash(hashes: Hashes) -> str:
    """Return the hex sha256 of the content hashes of a source's held-out documents, sorted."""
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()


def has_found_run(document: Tokens, runs: HeldOutRuns, counts: Integers) -> bool:
    """Return whether training text has a long run of a held-out document that is no stock text.

    Args:
        document: Tokens of the held-out document, without the one that ends it.
        runs: Runs of all held-out documents.
        counts: Number of training documents that have each of the runs.
    """
    needed = EDGE_TOKENS + 1
    if len(document) < runs.window + EDGE_TOKENS:
        return False
    numbers = np.searchsorted(runs.hashes, window_hashes(document, runs.window))
    found = (counts[numbers] > 0) & (counts[numbers] <= MAX_COMMON)
    sums = np.cumsum(np.concatenate([[0], found]))
    return bool((sums[needed:] - sums[:-needed] == needed).any())


def check_dropped(mix: MixConfig, fates: Sequence[SourceFates]) -> None:
    """Refuse a mix whose held-out text is most of a training source.

    Raises:
        DataError: it is; the message names every such source, with the figure.
    """
    problems = []
    for source, source_fates in zip(mix.sources, fates, strict=True):
        num_dropped = source_fates.num_held_out_copies + source_fates.count(Fate.CONTAMINATED)
        num_documents = num_dropped + len(source_fates.train)
        if source.weight > 0 and num_dropped > MAX_DROPPED_SHARE * num_documents:
            problems.append(
                f"source '{source.name}': {num_dropped} of {num_documents} training documents are, "
                "or hold, text that other sources hold out or guard files have; the guard set was "
                "made from this source. Take other text for the guard, or remove the guard files "
                "and set held_out_share on this source."
            )
    if problems:
        raise DataError("\n".join(problems))


def check_guard_sets(manifest: BuildManifest, mix: MixConfig) -> None:
    """Refuse guard domains that are too small to measure anything.

    Raises:
        DataError: there are some; the message names every one, with the figure.
    """
    cure = "Add guard files, or raise held_out_share of its sources."
    problems = []
    for name, found in manifest.guard_sets().items():
        if found.documents < mix.guard.min_documents:
            problems.append(
                f"guard domain '{name}': {found.documents} documents are held out, must be at "
                f"least {mix.guard.min_documents} (guard.min_documents): with fewer, a change "
                f"cannot be told from chance. {cure}"
            )
        elif found.tokens < mix.guard.min_tokens:
            problems.append(
                f"guard domain '{name}': {found.tokens} tokens are held out, must be at least "
                f"{mix.guard.min_tokens} (guard.min_tokens): the noise of fewer hides a change of "
                f"one percent. {cure}"
            )
    if problems:
        raise DataError("\n".join(problems))


def describe_guard_sets(manifest: BuildManifest) -> str:
    """Return one line for each guard domain; empty if the mix has none."""
    lines = []
    for name, found in manifest.guard_sets().items():
        line = (
            f"guard domain {name}: {found.documents:,} documents, {found.tokens:,} tokens, "
            f"hash {found.hash[:16]}"
        )
        if found.found:
            line += f", {found.found} found in training text, which was dropped"
        lines.append(line)
    return "\n".join(lines)
