"""Training documents that hold a piece of a held-out document.

Decisions
    A run of `length` equal tokens counts (Lee et al., arXiv 2107.06499, use 50): a short held-out
    text inside a long document is found, a common phrase is not.
    A run that more than MAX_COMMON training documents have is a stock text, such as a licence or a
    colophon, and does not count (Brown et al., arXiv 2005.14165, appendix C, ignore runs in more
    than 10 documents).  Shards are therefore searched twice: first runs are counted, then documents
    are marked. A stock text with a few tokens beside it that happen to agree is still one.  Runs of
    `length` - EDGE_TOKENS tokens are looked up, and more than EDGE_TOKENS of them in a row, none of
    them common, mark a document. All runs of the held-out documents are kept as sorted 64-bit
    hashes, with a bitmap before them that turns nearly all runs of the training documents away.
    Held-out sets are small; their size bounds the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from data_pipeline.build.near_duplicates import window_hashes
from data_pipeline.text.tokenizer import Tokens

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

EDGE_TOKENS = 8
"""Tokens beside a stock text that may agree."""
MAX_COMMON = 10
"""Training documents."""
_BITMAP_BITS = 24
_BLOCK_TOKENS = 1 << 16  # what fits the cache is searched twice as fast


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOutRuns:
    """All runs of tokens in the held-out documents."""

    window: int
    """Tokens that are looked up at once."""
    hashes: npt.NDArray[np.uint64]
    """Sorted, each once."""
    bitmap: npt.NDArray[np.bool_]
    """By the leading bits of a hash: whether any run has them."""

    @classmethod
    def of(cls, documents: Iterable[Tokens], length: int) -> HeldOutRuns:
        """Runs of `documents`."""
        window = length - EDGE_TOKENS
        parts = [window_hashes(tokens, window) for tokens in documents]
        return cls.from_hashes(np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])), window)

    @classmethod
    def from_hashes(cls, hashes: npt.NDArray[np.uint64], window: int) -> HeldOutRuns:
        """From `hashes` of a set made before."""
        bitmap = np.zeros(1 << _BITMAP_BITS, dtype=bool)
        bitmap[_leading(hashes)] = True
        return cls(window, hashes, bitmap)

    def without_common(self, counts: Integers) -> HeldOutRuns:
        """These runs without those that more than MAX_COMMON documents have."""
        return HeldOutRuns.from_hashes(self.hashes[counts <= MAX_COMMON], self.window)

    def find(self, tokens: Tokens) -> tuple[Integers, Integers]:
        """(places of `tokens` where a run of a held-out document begins, numbers of those runs)."""
        windows = window_hashes(tokens, self.window)
        candidates = np.flatnonzero(self.bitmap[_leading(windows)])
        numbers = np.searchsorted(self.hashes, windows[candidates])
        numbers = np.minimum(numbers, max(len(self.hashes) - 1, 0))
        equal = (
            self.hashes[numbers] == windows[candidates]
            if len(candidates)
            else np.zeros(0, dtype=bool)
        )
        return candidates[equal], numbers[equal]


def count_runs(tokens: Tokens, offsets: Integers, train: Mask, runs: HeldOutRuns) -> Integers:
    """For each run the training documents of a shard that have it.

    Args:
        tokens: of all documents; END_OF_TEXT after each keeps runs from spanning two.
        offsets: first token of each document, and the end.
        train: which documents are trained on.
        runs: of the held-out documents, which hold no END_OF_TEXT.
    """
    counts = np.zeros(len(runs.hashes), np.int64)
    seen_last = np.full(len(runs.hashes), -1, np.int64)
    for documents, numbers in _hits(tokens, offsets, runs):
        documents, numbers = np.divmod(np.unique(documents * len(counts) + numbers), len(counts))
        new = train[documents] & (
            seen_last[numbers] != documents
        )  # a document that two blocks share counts once
        np.add.at(counts, numbers[new], 1)
        np.maximum.at(seen_last, numbers[new], documents[new])
    return counts


def contaminated(tokens: Tokens, offsets: Integers, runs: HeldOutRuns) -> Mask:
    """For each document of a shard whether it has one of `runs`; arguments as in `count_runs`."""
    result = np.zeros(len(offsets) - 1, dtype=bool)
    for documents, _ in _hits(tokens, offsets, runs, in_a_row=EDGE_TOKENS + 1):
        result[documents] = True
    return result


def _hits(
    tokens: Tokens, offsets: Integers, runs: HeldOutRuns, in_a_row: int = 1
) -> Iterator[tuple[Integers, Integers]]:
    """(documents, runs) that meet, block by block; only where `in_a_row` places in a row are
    hits.
    """
    if not len(runs.hashes):
        return
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        # blocks overlap by what a hit at their end needs
        places, numbers = runs.find(
            tokens[start : start + _BLOCK_TOKENS + runs.window + in_a_row - 2]
        )
        if in_a_row > 1:
            ends = places[in_a_row - 1 :]
            whole = ends - places[: len(ends)] == in_a_row - 1
            places, numbers = places[: len(ends)][whole], numbers[: len(ends)][whole]
        if len(places):
            yield np.searchsorted(offsets, places + start, side="right") - 1, numbers


def _leading(hashes: npt.NDArray[np.uint64]) -> Integers:
    return (hashes >> np.uint64(64 - _BITMAP_BITS)).astype(np.int64)
