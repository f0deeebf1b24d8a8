"""Held-out text as a measuring device: is there enough of it, and was it in the training text?

Decisions
    Training text that holds a held-out document is dropped; what is counted here is how much that
    was.  A training source that is mostly held-out text is refused: then the guard files are a copy
    of it, and dropping would leave little to train on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.build.decontamination import EDGE_TOKENS, MAX_COMMON, HeldOutRuns, Integers
from data_pipeline.build.deduplication import Fate, Hashes, SourceFates
from data_pipeline.build.near_duplicates import window_hashes
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.errors import DataError
from data_pipeline.store.manifest import Manifest
from data_pipeline.text.tokenizer import Tokens

Mask = npt.NDArray[np.bool_]
MAX_DROPPED_SHARE = 0.5
"""Share of a training source's documents that may be held-out text of other sources."""


def held_out_hash(hashes: Hashes, assignment: SourceFates) -> str:
    """Hex sha256 of the content hashes of the held-out documents, sorted."""
    return hashlib.sha256(np.sort(hashes[assignment.held_out]).tobytes()).hexdigest()


def copied(hashes: Sequence[Hashes], assignments: Sequence[SourceFates]) -> list[Mask]:
    """For each source and each of its held-out documents whether another source had a copy of it to
    train on.
    """
    copies = [h[a.numbers(Fate.HELD_OUT_COPY)] for h, a in zip(hashes, assignments, strict=True)]
    known = {value.tobytes() for values in copies for value in values}
    return [
        np.array([value.tobytes() in known for value in values[assignment.held_out]], dtype=bool)
        for values, assignment in zip(hashes, assignments, strict=True)
    ]


def runs_found(document: Tokens, runs: HeldOutRuns, counts: Integers) -> bool:
    """Whether training text has a long run of a held-out document that is no stock text.

    Args:
        document: its tokens, without the last one.
        runs: of all held-out documents.
        counts: training documents that have each of the runs.
    """
    needed = EDGE_TOKENS + 1
    if len(document) < runs.window + EDGE_TOKENS:
        return False
    numbers = np.searchsorted(runs.hashes, window_hashes(document, runs.window))
    hits = (counts[numbers] > 0) & (counts[numbers] <= MAX_COMMON)
    sums = np.cumsum(np.concatenate([[0], hits]))
    return bool((sums[needed:] - sums[:-needed] == needed).any())


def check_dropped(mix: MixConfig, assignments: Sequence[SourceFates]) -> None:
    """Refuse a mix whose held-out text is most of a training source.

    Raises:
        DataError: naming every such source, with the figure.
    """
    problems = []
    for source, assignment in zip(mix.sources, assignments, strict=True):
        dropped, left = (
            assignment.num_held_out_copies + assignment.count(Fate.CONTAMINATED),
            len(assignment.train),
        )
        if source.weight > 0 and dropped > MAX_DROPPED_SHARE * (dropped + left):
            problems.append(
                f"source '{source.name}': {dropped} of {dropped + left} training documents are, or hold, text that "
                "other sources hold out or guard files have; the guard set was made from this source. Take other text "
                "for the guard, or remove the guard files and set held_out_share on this source."
            )
    if problems:
        raise DataError("\n".join(problems))


def check_guard_sets(manifest: Manifest, mix: MixConfig) -> None:
    """Refuse guard domains that are too small to measure anything.

    Raises:
        DataError: naming every such domain, with the figure.
    """
    problems = []
    for name, found in manifest.guard_sets().items():
        cure = "Add guard files, or raise held_out_share of its sources"
        if found.documents < mix.guard.min_documents:
            problems.append(
                f"guard domain '{name}': {found.documents} documents are held out, must be at least "
                f"{mix.guard.min_documents} (guard.min_documents): with fewer, a change cannot be told from chance. "
                f"{cure}."
            )
        elif found.tokens < mix.guard.min_tokens:
            problems.append(
                f"guard domain '{name}': {found.tokens} tokens are held out, must be at least {mix.guard.min_tokens} "
                f"(guard.min_tokens): the noise of fewer hides a change of one percent. {cure}."
            )
    if problems:
        raise DataError("\n".join(problems))


def describe_guard_sets(manifest: Manifest) -> str:
    """One line for each guard domain."""
    lines = []
    for name, found in manifest.guard_sets().items():
        seen = f", {found.found} found in training text, which was dropped" if found.found else ""
        size = f"{found.documents:,} documents, {found.tokens:,} tokens"
        lines.append(f"guard domain {name}: {size}, hash {found.hash[:16]}{seen}")
    return "\n".join(lines)
