"""Training documents that hold a piece of a held-out document, and what is left of them.

    held-out documents -> runs: a sorted table of hashes, with a filter before it
    a shard -> every 9th window looked up -> hits around those found -> stretches -> what is left

Decisions
    A run of `tokens` equal tokens counts (Lee et al., arXiv 2107.06499, use 50): a short held-out
    text inside a long document is found, a common phrase is not.
    Windows of `tokens` - EDGE_TOKENS tokens are looked up, and only NEEDED_WINDOWS of them in a row
    count: a stock text with a few tokens beside it that happen to agree is still a stock text.
    Of NEEDED_WINDOWS places in a row one is a multiple of NEEDED_WINDOWS. So only every ninth
    window of a shard is hashed and looked up, and only what lies around a hit is read in full; no
    run is missed.
    A filter of about _FILTER_BITS bits a run turns away nearly all windows. It grows with the
    held-out text, and both tables are files that all processes of a machine map.
    A long document loses the stretch with a margin, as in Brown et al. (arXiv 2005.14165, appendix
    C), because the words around a quotation are about it; a short one goes as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.parts.near_duplicates import (
    power_of_base,
    scattered,
    window_hashes,
)
from data_pipeline.store.files import atomic_write
from data_pipeline.store.hashing import Hashes64
from data_pipeline.store.packing import Integers
from data_pipeline.text.tokenizer import Tokens

Mask = npt.NDArray[np.bool_]

EDGE_TOKENS = 8
"""Number of tokens beside a stock text that may agree by chance."""
NEEDED_WINDOWS = EDGE_TOKENS + 1
"""Windows in a row that make a run."""
MAX_STRETCHES = 10
"""Stretches that a document may lose; one with more is mostly made of such text (Brown et al.)."""
MIN_KEPT_SHARE = 0.5
"""Smallest share of its tokens that a document must keep, or else it goes as a whole."""
_FILTER_BITS = 16
"""Bits of the filter for each run, at least; with three bits set for each, 1 in 100 passes."""
_BLOCK_TOKENS = 8192 * NEEDED_WINDOWS  # what fits the cache is searched twice as fast
_ONE = np.uint64(1)
_SIX_BITS = np.uint64(63)
_NO_RUN = -1


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutRuns:
    """All windows of tokens in the held-out documents."""

    window: int
    """Tokens that are looked up at once."""
    hashes: Hashes64
    """Sorted, each once."""
    filter: Hashes64
    """Words with three bits set for each hash, [a power of two]."""

    @staticmethod
    def window_of(length: int) -> int:
        """Return the tokens of a window, for runs of at least `length` tokens."""
        return length - EDGE_TOKENS

    @classmethod
    def from_documents(cls, documents: Iterable[Tokens], length: int) -> HeldOutRuns:
        """Return the runs of `documents`, for matches of at least `length` tokens."""
        window = cls.window_of(length)
        hashes = [np.zeros(0, np.uint64)]
        for tokens in documents:
            if len(tokens) >= length:
                hashes.append(window_hashes(tokens, window))
        ordered = np.sort(np.concatenate(hashes))  # np.unique takes ten times as long
        is_first = np.append(np.ones(min(len(ordered), 1), dtype=bool), ordered[1:] != ordered[:-1])
        return cls.from_hashes(ordered[is_first], window)

    @classmethod
    def from_hashes(cls, hashes: Hashes64, window: int) -> HeldOutRuns:
        """Return the runs with these hashes, which are sorted."""
        num_words = 1 << max(len(hashes) * _FILTER_BITS // 64, 1).bit_length()
        words = np.zeros(num_words, np.uint64)
        if len(hashes):
            numbers = _filter_words(hashes, num_words)
            starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
            words[numbers[starts]] = np.bitwise_or.reduceat(_filter_bits(hashes), starts)
        return cls(window, hashes, words)

    def save(self, folder: Path) -> None:
        """Write both tables, for `load`."""
        for name in ("hashes", "filter"):
            with atomic_write(folder / f"held_out_{name}.npy") as file:
                np.save(file, getattr(self, name))

    @classmethod
    def load(cls, folder: Path, length: int) -> HeldOutRuns:
        """Map the tables that `save` wrote."""
        tables = []
        for name in ("hashes", "filter"):
            path = folder / f"held_out_{name}.npy"
            tables.append(np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)))
        return cls(cls.window_of(length), *tables)

    def numbers(self, hashes: Hashes64) -> Integers:
        """Return the number of the run that each hash belongs to, or -1 if there is none."""
        numbers = np.full(len(hashes), _NO_RUN, np.int64)
        if not len(self.hashes):
            return numbers
        bits = _filter_bits(hashes)
        words = self.filter[_filter_words(hashes, len(self.filter))]
        candidates = np.flatnonzero((words & bits) == bits)
        found = np.searchsorted(self.hashes, hashes[candidates])
        found = np.minimum(found, len(self.hashes) - 1)
        equal = self.hashes[found] == hashes[candidates]
        numbers[candidates[equal]] = found[equal]
        return numbers


def _filter_words(hashes: Hashes64, num_words: int) -> Integers:
    """Return the word of the filter that holds the bits of each hash: its leading bits."""
    bits = num_words.bit_length() - 1
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def _filter_bits(hashes: Hashes64) -> Hashes64:
    """Return a word with three bits set for each hash, chosen by its last 18 bits."""
    bits = _ONE << (hashes & _SIX_BITS)
    bits |= _ONE << ((hashes >> np.uint64(6)) & _SIX_BITS)
    bits |= _ONE << ((hashes >> np.uint64(12)) & _SIX_BITS)
    return bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hits:
    """Windows of a shard that held-out documents have, too: NEEDED_WINDOWS in a row or more."""

    places: Integers
    """First token of each window, counted from the start of the shard; ascending."""
    numbers: Integers
    """Number of the run in `HeldOutRuns` that each window is."""

    def chosen(self, mask: Mask) -> Hits:
        """Return some of the hits."""
        return Hits(places=self.places[mask], numbers=self.numbers[mask])

    def in_rows(self) -> Hits:
        """Return the hits that have enough others beside them to count."""
        if not len(self.places):
            return self
        first, last = rows_of(self.places)
        return self.chosen(np.repeat(last - first + 1 >= NEEDED_WINDOWS, last - first + 1))


def rows_of(places: Integers) -> tuple[Integers, Integers]:
    """Return (first, last) index of each row of places that follow one another."""
    first = np.flatnonzero(np.append(True, np.diff(places) != 1))
    last = np.append(first[1:], len(places)) - 1
    return first, last


def find_hits(tokens: Tokens, offsets: Integers, train: Mask, runs: HeldOutRuns) -> Hits:
    """Return the held-out windows in the training documents of a shard.

    Args:
        tokens: Tokens of all documents; the token that ends each keeps windows from spanning two.
        offsets: First token of each document, and the end, [documents + 1].
        train: Which documents are trained on, [documents].
        runs: Runs of the held-out documents, which hold no such token.
    """
    hits = _all_hits(tokens, runs)
    if not len(hits.places):
        return hits
    return hits.chosen(train[documents_at(offsets, hits.places)])


def documents_at(offsets: Integers, places: Integers) -> Integers:
    """Return the number of the document that each token belongs to."""
    return np.searchsorted(offsets, places, side="right") - 1


def _all_hits(tokens: Tokens, runs: HeldOutRuns) -> Hits:
    places = [np.zeros(0, np.int64)]
    numbers = [np.zeros(0, np.int64)]
    for start, stop in _surroundings(sampled_hits(tokens, runs), len(tokens) - runs.window + 1):
        # a document that is all held-out text is one long surrounding
        for first in range(start, stop, _BLOCK_TOKENS):
            last = min(first + _BLOCK_TOKENS, stop)
            hashes = window_hashes(tokens[first : last + runs.window - 1], runs.window)
            found = runs.numbers(hashes)
            places.append(first + np.flatnonzero(found != _NO_RUN))
            numbers.append(found[found != _NO_RUN])
    return Hits(places=np.concatenate(places), numbers=np.concatenate(numbers)).in_rows()


def sampled_hits(tokens: Tokens, runs: HeldOutRuns) -> Integers:
    """Return the multiples of NEEDED_WINDOWS at which a held-out window begins."""
    hits = [np.zeros(0, np.int64)]
    for start in range(0, len(tokens) - runs.window + 1, _BLOCK_TOKENS):
        block = tokens[start : start + _BLOCK_TOKENS + runs.window - 1]
        numbers = runs.numbers(sampled_window_hashes(block, runs.window))
        hits.append(start + NEEDED_WINDOWS * np.flatnonzero(numbers != _NO_RUN))
    return np.concatenate(hits)


def _surroundings(places: Integers, num_windows: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of the windows that are at most EDGE_TOKENS from one of `places`."""
    if not len(places):
        return
    far = np.diff(places) > 2 * EDGE_TOKENS + 1
    firsts = places[np.append(True, far)]
    lasts = places[np.append(far, True)]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield max(first - EDGE_TOKENS, 0), min(last + EDGE_TOKENS + 1, num_windows)


def sampled_window_hashes(tokens: Tokens, length: int) -> Hashes64:
    """Return every ninth (NEEDED_WINDOWS) of `window_hashes(tokens, length)`.

    Tokens are put together to pieces of nine, by Horner's rule, and pieces to windows, so the cost
    of a window hardly grows with its length.
    """
    stride = NEEDED_WINDOWS
    num_windows = (len(tokens) - length) // stride + 1
    if num_windows <= 0:
        return np.zeros(0, np.uint64)
    num_whole, rest = divmod(length, stride)
    num_pieces = num_windows + num_whole
    padded = np.zeros(num_pieces * stride, tokens.dtype)
    used = min(len(tokens), len(padded))
    padded[:used] = tokens[:used]
    columns = scattered(np.ascontiguousarray(padded.reshape(num_pieces, stride).T))
    base = power_of_base(1)
    pieces = np.zeros(num_pieces, np.uint64)
    beginnings = pieces
    for number, column in enumerate(columns, start=1):
        pieces = pieces * base + column
        if number == rest:
            beginnings = pieces
    windows = np.zeros(num_windows, np.uint64)
    for number in range(num_whole):
        windows = windows * power_of_base(stride) + pieces[number : number + num_windows]
    if rest:
        windows = windows * power_of_base(rest) + beginnings[num_whole : num_whole + num_windows]
    windows ^= windows >> np.uint64(32)
    return windows


def count_documents(hits: Hits, offsets: Integers) -> tuple[Integers, Integers]:
    """Return (numbers of the runs that were met, number of documents that have each)."""
    documents = documents_at(offsets, hits.places)
    order = np.lexsort((documents, hits.numbers))
    numbers = hits.numbers[order]
    documents = documents[order]
    is_other = (numbers[1:] != numbers[:-1]) | (documents[1:] != documents[:-1])
    once = np.append(np.ones(min(len(order), 1), dtype=bool), is_other)
    met, counts = np.unique(numbers[once], return_counts=True)
    return met, counts.astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stretches:
    """Stretches of documents that are held-out text, in ascending order."""

    document: Integers
    """Number of the document in its shard, [num_stretches]."""
    start: Integers
    """Tokens of the document before each stretch, [num_stretches]."""
    stop: Integers
    """One past the last token of each stretch, counted as `start` is, [num_stretches]."""

    @classmethod
    def of_hits(cls, hits: Hits, offsets: Integers, window: int) -> Stretches:
        """Return the stretches that hits of NEEDED_WINDOWS in a row make; others do not count."""
        places = hits.in_rows().places
        if not len(places):
            return cls(document=places, start=places, stop=places)
        first, last = rows_of(places)
        document = documents_at(offsets, places[first])
        start = places[first] - offsets[document]
        stop = places[last] + window - offsets[document]
        return cls(document=document, start=start, stop=stop)

    def by_document(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield (document, its stretches as (start, stop))."""
        borders = np.flatnonzero(np.diff(self.document)) + 1
        if not len(self.document):
            return
        for first, last in itertools.pairwise([0, *borders.tolist(), len(self.document)]):
            starts = self.start[first:last].tolist()
            stops = self.stop[first:last].tolist()
            yield int(self.document[first]), list(zip(starts, stops, strict=True))


def what_is_left(
    stretches: Iterable[tuple[int, int]], num_tokens: int, rules: DecontaminationConfig
) -> list[tuple[int, int]]:
    """Return the stretches (start, stop) of a document that can be trained on; none if it goes.

    Args:
        stretches: Held-out text in the document, (start, stop) in ascending order.
        num_tokens: Tokens of the document, END_OF_TEXT included.
        rules: How many tokens a stretch that stays must have.
    """
    left = []
    done = 0
    num_lost = 0
    for start, stop in stretches:
        first = max(start - rules.tokens, 0)
        if first > done or num_lost == 0:
            num_lost += 1
            left.append((done, first))
        done = max(done, min(stop + rules.tokens, num_tokens))
    left.append((done, num_tokens))
    kept = []
    for start, stop in left:
        if stop - start >= max(rules.min_kept_tokens, 2):
            kept.append((start, stop))
    num_kept = sum(stop - start for start, stop in kept)
    if num_lost > MAX_STRETCHES or num_kept < MIN_KEPT_SHARE * num_tokens:
        return []
    return kept
