"""Held-out documents that are shorter than a run, which are searched for as a whole.

    short documents -> a table of the hashes of whole documents, and a table of their first windows
    a shard -> every 9th window looked up -> places where a document may begin -> whole documents

Decisions
    Only text that is there to be measured and nothing else (guard files, sources held out as a
    whole) is searched for like this. A short document of a training source may be a phrase that
    very many documents have.
    A document counts from MIN_WHOLE_TOKENS tokens on; a shorter one is hardly more than a phrase.
    It is searched for without _END_TOKENS tokens at both ends: in the middle of a text a tokenizer
    may put these together with what stands beside them.
    Of NEEDED_WINDOWS places in a row one is a multiple of NEEDED_WINDOWS, so one of the first
    windows of a document is among those that are looked up, wherever it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.config.decontamination_config import (
    MIN_WHOLE_TOKENS,
    DecontaminationConfig,
)
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.decontamination import (
    NEEDED_WINDOWS,
    HeldOutRuns,
    Mask,
    documents_at,
    sampled_hits,
)
from data_pipeline.parts.near_duplicates import (
    power_of_base,
    scattered,
    window_hashes,
)
from data_pipeline.store.files import atomic_write, make_folder
from data_pipeline.store.hashing import Hashes64
from data_pipeline.store.packing import Integers
from data_pipeline.text.tokenizer import Tokens

_END_TOKENS = 2
"""Tokens at each end of a document that need not agree."""
_BEGIN_TOKENS = MIN_WHOLE_TOKENS - 2 * _END_TOKENS
"""Tokens at the beginning of what is searched for whose windows are looked up."""
_PLACES = 1 << 16
"""Places that are compared at once."""
_WHOLES_FILE = "wholes.npy"
_LENGTHS_FILE = "lengths.npy"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FoundTexts:
    """Short held-out documents in the training documents of a shard."""

    places: Integers
    """First token of each, counted from the start of the shard; ascending."""
    tokens: Integers
    """Tokens of each that agree."""
    numbers: Integers
    """Number of each in `ShortTexts.wholes`."""

    @classmethod
    def none(cls) -> FoundTexts:
        """Return what is found where nothing is searched for."""
        empty = np.zeros(0, np.int64)
        return cls(places=empty, tokens=empty, numbers=empty)


@dataclass(frozen=True, slots=True, eq=False)
class ShortTexts:
    """Tables of the short held-out documents."""

    begins: HeldOutRuns
    """Windows at the beginnings."""
    wholes: Hashes64
    """Hash of each document without its ends, sorted, each once."""
    lengths: Integers
    """Numbers of tokens that they have, ascending, each once."""

    @classmethod
    def from_documents(cls, documents: Iterable[Tokens]) -> ShortTexts:
        """Return the tables of documents of at least MIN_WHOLE_TOKENS tokens."""
        begins = []
        wholes = []
        lengths = set()
        for tokens in documents:
            begins.append(_without_ends(tokens)[:_BEGIN_TOKENS])
            wholes.append(hash_of_whole(tokens))
            lengths.add(len(tokens) - 2 * _END_TOKENS)
        return cls(
            HeldOutRuns.from_documents(begins, _BEGIN_TOKENS),
            np.unique(np.array(wholes, np.uint64)),
            np.array(sorted(lengths), np.int64),
        )

    def save(self, folder: Path) -> None:
        """Write all tables, for `load`."""
        make_folder(folder)
        self.begins.save(folder)
        for name, values in ((_WHOLES_FILE, self.wholes), (_LENGTHS_FILE, self.lengths)):
            with atomic_write(folder / name) as file:
                np.save(file, values, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> ShortTexts:
        """Read the tables that `save` wrote; those of the windows are mapped."""
        wholes = np.load(folder / _WHOLES_FILE, allow_pickle=False)
        lengths = np.load(folder / _LENGTHS_FILE, allow_pickle=False)
        return cls(HeldOutRuns.load(folder, _BEGIN_TOKENS), wholes, lengths)

    def numbers(self, hashes: Hashes64) -> Integers:
        """Return the number of the document that each hash belongs to, or -1 if there is none."""
        found = np.minimum(np.searchsorted(self.wholes, hashes), len(self.wholes) - 1)
        return np.where(self.wholes[found] == hashes, found, -1)


def _without_ends(tokens: Tokens) -> Tokens:
    return tokens[_END_TOKENS : len(tokens) - _END_TOKENS]


def hash_of_whole(tokens: Tokens) -> np.uint64:
    """Return the hash of a document, without its ends."""
    inner = _without_ends(tokens)
    return np.uint64(window_hashes(inner, len(inner))[0])


def short_documents(
    sources: Sequence[DecidedSource],
    texts: Sequence[Sequence[Tokens]],
    rules: DecontaminationConfig,
) -> list[Tokens]:
    """Return the held-out documents that are searched for as a whole."""
    short = []
    for source, source_texts in zip(sources, texts, strict=True):
        short += [text for _, text in short_of(source, source_texts, rules)]
    return short


def short_of(
    source: DecidedSource, texts: Sequence[Tokens], rules: DecontaminationConfig
) -> Iterator[tuple[int, Tokens]]:
    """Yield (number, text) of the held-out documents of a source that are searched for whole."""
    least = rules.min_searched_tokens(source.is_only_measured)
    for number, text in enumerate(texts):
        if least <= len(text) < rules.tokens:
            yield number, text


def note_unsearched(
    sources: Sequence[DecidedSource],
    texts: Sequence[Sequence[Tokens]],
    rules: DecontaminationConfig,
) -> list[DecidedSource]:
    """Return the sources with the number of held-out documents that are too short."""
    noted = []
    for source, source_texts in zip(sources, texts, strict=True):
        least = rules.min_searched_tokens(source.is_only_measured)
        unsearched = sum(len(text) < least for text in source_texts)
        noted.append(dataclasses.replace(source, held_out_unsearched=unsearched))
    return noted


def owners_of_wholes(
    sources: Sequence[DecidedSource],
    texts: Sequence[Sequence[Tokens]],
    rules: DecontaminationConfig,
    short: ShortTexts,
) -> npt.NDArray[np.uint16]:
    """Return the number of the first source that holds out each short document, [documents]."""
    owners = np.zeros(len(short.wholes), np.uint16)
    for number in range(len(texts) - 1, -1, -1):
        for _, text in short_of(sources[number], texts[number], rules):
            owners[np.searchsorted(short.wholes, hash_of_whole(text))] = number
    return owners


def find_short_texts(
    tokens: Tokens, offsets: Integers, train: Mask, texts: ShortTexts
) -> FoundTexts:
    """Return the short held-out documents in the training documents of a shard.

    Args:
        tokens: Tokens of all documents; no held-out document has the token that ends each.
        offsets: First token of each document, and the end, [documents + 1].
        train: Which documents are trained on, [documents].
        texts: What is searched for.
    """
    if not len(texts.wholes):
        return FoundTexts.none()
    hits = sampled_hits(tokens, texts.begins)
    hits = hits[train[documents_at(offsets, hits)]]
    starts = np.unique(hits[:, None] - np.arange(NEEDED_WINDOWS))
    starts = starts[starts >= 0]
    rows = [np.zeros((3, 0), np.int64)]
    for first in range(0, len(starts), _PLACES):
        rows += _compare(tokens, starts[first : first + _PLACES], texts)
    places, lengths, numbers = np.concatenate(rows, axis=1)
    order = np.lexsort((lengths, places))
    return FoundTexts(places=places[order], tokens=lengths[order], numbers=numbers[order])


def _compare(tokens: Tokens, starts: Integers, texts: ShortTexts) -> list[Integers]:
    """Return (places, lengths, numbers) of the documents of each length that begin at `starts`."""
    found = []
    hashes = np.zeros(len(starts), np.uint64)
    base = power_of_base(1)
    lengths = set(texts.lengths.tolist())
    for length in range(1, max(lengths) + 1):
        # the last token of a shard ends a document, so what it is repeated to is no held-out text
        places = np.minimum(starts + (length - 1), len(tokens) - 1)
        hashes = hashes * base + scattered(tokens[places])
        if length in lengths:
            numbers = texts.numbers(hashes ^ (hashes >> np.uint64(32)))
            is_found = numbers >= 0
            sizes = np.full(int(is_found.sum()), length)
            found.append(np.stack([starts[is_found], sizes, numbers[is_found]]))
    return found
