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

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.errors import DataError
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.deduplication import Fate
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.store.manifest import BuildManifest

MAX_DROPPED_SHARE = 0.5
"""Largest share of a training source's documents that may be held-out text of other sources."""


def held_out_hash(hashes: Hashes) -> str:
    """Return the hex sha256 of the content hashes of a source's held-out documents, sorted."""
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()


def check_dropped(mix: MixConfig, sources: Sequence[DecidedSource]) -> None:
    """Refuse a mix whose held-out text is most of a training source.

    Raises:
        DataError: it is; the message names every such source, with the figure.
    """
    problems = []
    for config, source in zip(mix.sources, sources, strict=True):
        fates = source.fates
        num_dropped = fates.num_held_out_copies + fates.count(Fate.CONTAMINATED)
        num_documents = len(fates.fates) - len(fates.held_out)
        if config.is_trained and num_dropped > MAX_DROPPED_SHARE * num_documents:
            num_own = source.contaminated_by.get(config.name, 0)
            problems.append(
                f"source '{config.name}': {num_dropped} of {num_documents} training documents are, "
                f"or hold, text that is held out. {_why_dropped(num_own, num_dropped, mix)}"
            )
    if problems:
        raise DataError("\n".join(problems))


def _why_dropped(num_own: int, num_dropped: int, mix: MixConfig) -> str:
    """Return why most of a source was dropped, and what to do.

    Args:
        num_own: Documents that share text with what the source itself holds out.
        num_dropped: Documents dropped.
        mix: The mix.
    """
    if 2 * num_own > num_dropped:
        return (
            f"{num_own} of them share {mix.decontamination_rules.tokens} tokens in a row with what "
            "the source itself holds out: its documents repeat each other's text. Remove what they "
            "repeat, set cluster_by and hold out fewer, or let text that many documents have stay "
            "(decontamination.stock_text)."
        )
    return (
        "Other sources hold it out or guard files have it; the guard set was made from this "
        "source. Take other text for the guard, or remove the guard files and set held_out_share "
        "on this source."
    )


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
        if found.unsearched:
            line += (
                f", {found.unsearched} too short to be searched for in training text (only copies "
                "of them were dropped)"
            )
        lines.append(line)
    return "\n".join(lines)
