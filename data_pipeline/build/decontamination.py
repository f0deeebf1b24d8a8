"""Training documents that hold a piece of a held-out document.

Decisions
    A run of `length` equal tokens counts (Lee et al., arXiv 2107.06499, use 50): a short held-out
    text inside a long document is found, a common phrase is not.
    A run that more than MAX_COMMON training documents have is a stock text, such as a license or a
    colophon, and does not count (Brown et al., arXiv 2005.14165, appendix C, ignore runs in more
    than 10 documents). Shards are therefore searched twice: first the runs are counted, then the
    documents are marked.
    A stock text with a few tokens beside it that happen to agree is still a stock text. Therefore
    runs of `length` - EDGE_TOKENS tokens are looked up, and only more than EDGE_TOKENS of them in a
    row, none of them common, mark a document.
    All runs of the held-out documents are kept as sorted 64-bit hashes, with a bitmap before them
    that turns away nearly all runs of the training documents. Held-out sets are small, and their
    size bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.build.near_duplicates import Hashes64, window_hashes
from data_pipeline.store.packing import Integers
from data_pipeline.text.tokenizer import Tokens

Mask = npt.NDArray[np.bool_]

EDGE_TOKENS = 8
"""Number of tokens beside a stock text that may agree by chance."""
MAX_COMMON = 10
"""Largest number of training documents that may share a run that is no stock text."""
_BITMAP_BITS = 24
_BLOCK_TOKENS = 1 << 16  # what fits the cache is searched twice as fast


@dataclass(frozen=True, slots=True)
class HeldOutRuns:
    """All runs of tokens in the held-out documents."""

    window: int
    """Tokens that are looked up at once."""
    hashes: Hashes64
    """Sorted, each once."""
    bitmap: Mask
    """Whether any run has a hash with these leading bits, [2**_BITMAP_BITS]."""

    @classmethod
    def from_documents(cls, documents: Iterable[Tokens], length: int) -> HeldOutRuns:
        """Return the runs of `documents`, for matches of at least `length` tokens."""
        window = length - EDGE_TOKENS
        hashes = [np.zeros(0, np.uint64)]
        hashes += [window_hashes(tokens, window) for tokens in documents]
        return cls.from_hashes(np.unique(np.concatenate(hashes)), window)

    @classmethod
    def from_hashes(cls, hashes: Hashes64, window: int) -> HeldOutRuns:
        """Return the runs whose sorted `hashes` were stored."""
        bitmap = np.zeros(1 << _BITMAP_BITS, dtype=bool)
        bitmap[_leading_bits(hashes)] = True
        return cls(window, hashes, bitmap)

    def without_common(self, counts: Integers) -> HeldOutRuns:
        """Return these runs without those that more than MAX_COMMON documents have."""
        return HeldOutRuns.from_hashes(self.hashes[counts <= MAX_COMMON], self.window)

    def find(self, tokens: Tokens) -> tuple[Integers, Integers]:
        """Return (places in `tokens` where held-out runs begin, numbers of those runs)."""
        windows = window_hashes(tokens, self.window)
        candidates = np.flatnonzero(self.bitmap[_leading_bits(windows)])
        if not len(candidates):
            return candidates, candidates
        numbers = np.searchsorted(self.hashes, windows[candidates])
        numbers = np.minimum(numbers, len(self.hashes) - 1)
        equal = self.hashes[numbers] == windows[candidates]
        return candidates[equal], numbers[equal]


def count_runs(tokens: Tokens, offsets: Integers, train: Mask, runs: HeldOutRuns) -> Integers:
    """Return, for each run, the number of training documents of a shard that have it.

    Args:
        tokens: Tokens of all documents; END_OF_TEXT after each keeps runs from spanning two.
        offsets: First token of each document, and the end, [documents + 1].
        train: Which documents are trained on, [documents].
        runs: Runs of the held-out documents, which hold no END_OF_TEXT.
    """
    num_runs = len(runs.hashes)
    counts = np.zeros(num_runs, np.int64)
    seen_last = np.full(num_runs, -1, np.int64)
    for documents, numbers in _matches(tokens, offsets, runs):
        once = np.unique(documents * num_runs + numbers)
        documents, numbers = np.divmod(once, num_runs)
        # a document that two blocks share counts once
        counted = train[documents] & (seen_last[numbers] != documents)
        np.add.at(counts, numbers[counted], 1)
        np.maximum.at(seen_last, numbers[counted], documents[counted])
    return counts


def find_contaminated(tokens: Tokens, offsets: Integers, runs: HeldOutRuns) -> Mask:
    """Return, for each document of a shard, whether it shares a long run with a held-out document.

    Args:
        tokens: Tokens of all documents, as in `count_runs`.
        offsets: First token of each document, and the end, [documents + 1].
        runs: Runs of the held-out documents, without the common ones.
    """
    result = np.zeros(len(offsets) - 1, dtype=bool)
    for documents, _ in _matches(tokens, offsets, runs, in_a_row=EDGE_TOKENS + 1):
        result[documents] = True
    return result


def _matches(
    tokens: Tokens, offsets: Integers, runs: HeldOutRuns, in_a_row: int = 1
) -> Iterator[tuple[Integers, Integers]]:
    """Yield (documents, runs) that match, block by block.

    A match counts only if `in_a_row` places in a row are matches.
    """
    if not len(runs.hashes):
        return
    # blocks overlap by what a match at their end needs
    overlap = runs.window + in_a_row - 2
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        places, numbers = runs.find(tokens[start : start + _BLOCK_TOKENS + overlap])
        if in_a_row > 1:
            ends = places[in_a_row - 1 :]
            begins = places[: len(ends)]
            unbroken = ends - begins == in_a_row - 1
            numbers = numbers[: len(ends)][unbroken]
            places = begins[unbroken]
        if len(places):
            yield np.searchsorted(offsets, places + start, side="right") - 1, numbers


def _leading_bits(hashes: Hashes64) -> Integers:
    return (hashes >> np.uint64(64 - _BITMAP_BITS)).astype(np.int64)
