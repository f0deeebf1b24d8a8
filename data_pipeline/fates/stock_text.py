"""Held-out text that very many training documents have, such as a license, and may keep.

Decisions
    No text is let through unless the mix says from which share of the training documents on a run
    is stock text (`decontamination.stock_text`). Text of guard files never is, and neither is that
    of a source that is held out as a whole: both are there to be measured and nothing else.
    A run must also be in more than MAX_ORDINARY documents (Brown et al., arXiv 2005.14165, appendix
    C), so that a share of a small mix means something.
    What is let through is counted by source and listed as text, with some documents that have it.
    A run counts where it stays: not in documents that go, nor in what is cut out of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.decontamination import (
    NEEDED_WINDOWS,
    HeldOutRuns,
    Hits,
    Mask,
    documents_at,
    rows_of,
)
from data_pipeline.fates.deduplication import Fate
from data_pipeline.parts.near_duplicates import window_hashes
from data_pipeline.store.files import atomic_write
from data_pipeline.store.manifest import StockText
from data_pipeline.store.packing import Integers
from data_pipeline.store.shards import Shard
from data_pipeline.text.tokenizer import Tokens, decode

MAX_ORDINARY = 10
"""Largest number of training documents that may have a run that is no stock text."""
MAX_LISTED = 50
"""Stock texts that are listed, the most frequent ones."""
_MAX_COUNTED = 20 * MAX_LISTED
"""Stock texts that are counted where they stay; those of which nothing stays are not listed."""
MAX_EXAMPLES = 3
"""Documents that are named for each."""
MAX_CHARACTERS = 200
"""Characters that are shown of each."""
_MASK_FILE = "stock.npy"
_KEYS_FILE = "stock_keys.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A stretch of a held-out document that is stock text."""

    source: str
    """Source of the held-out document."""
    key: int
    """Run in it that the most training documents have."""
    documents: int
    """Training documents that have this run, before any was dropped."""
    tokens: int
    """Tokens of the stretch."""
    text: str
    """Beginning of the stretch."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StockRuns:
    """Which runs are stock text."""

    is_stock: Mask
    """[runs]"""
    keys: Integers
    """Runs that are counted where they stay, the `key` of each passage, [passages]."""
    passages: tuple[Passage, ...] = ()

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        for name, values in ((_MASK_FILE, self.is_stock), (_KEYS_FILE, self.keys)):
            with atomic_write(folder / name) as file:
                np.save(file, values, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> StockRuns:
        """Map the mask that `save` wrote; the passages stay with who saved them."""
        is_stock = np.load(folder / _MASK_FILE, mmap_mode="r", allow_pickle=False)
        keys = np.load(folder / _KEYS_FILE, allow_pickle=False)
        return cls(is_stock=np.asarray(is_stock), keys=keys)


def find_stock_runs(
    sources: Sequence[DecidedSource],
    texts: Sequence[Sequence[Tokens]],
    runs: HeldOutRuns,
    counts: Integers,
    rules: DecontaminationConfig,
) -> StockRuns:
    """Return the runs that may stay.

    Args:
        sources: Sources of text.
        texts: Held-out documents of each source.
        runs: Runs of all held-out documents.
        counts: Number of training documents that have each run, [runs].
        rules: The share from which on a run is stock text.
    """
    none = StockRuns(is_stock=np.zeros(len(counts), dtype=bool), keys=np.zeros(0, np.int64))
    if rules.stock_text == 0:
        return none
    num_train = sum(source.fates.count(Fate.TRAIN) for source in sources)
    is_stock = (counts > MAX_ORDINARY) & (counts >= rules.stock_text * num_train)
    for source, source_texts in zip(sources, texts, strict=True):
        if source.is_only_measured:
            for text in source_texts:
                numbers = runs.numbers(window_hashes(text, runs.window))
                is_stock[numbers[numbers >= 0]] = False  # a short text has windows of no run
    if not is_stock.any():
        return none
    passages: dict[int, Passage] = {}
    for source, source_texts in zip(sources, texts, strict=True):
        for text in source_texts:
            for passage in _passages(source.parts.source.name, text, runs, is_stock, counts):
                passages.setdefault(passage.key, passage)
    listed = sorted(passages.values(), key=lambda passage: (-passage.documents, passage.key))
    listed = listed[:_MAX_COUNTED]
    keys = np.array([passage.key for passage in listed], np.int64)
    return StockRuns(is_stock=is_stock, keys=keys, passages=tuple(listed))


def _passages(
    name: str, text: Tokens, runs: HeldOutRuns, is_stock: Mask, counts: Integers
) -> list[Passage]:
    """Return the stretches of a held-out document that are stock text."""
    numbers = runs.numbers(window_hashes(text, runs.window))
    places = np.flatnonzero(is_stock[numbers] & (numbers >= 0))
    if not len(places):
        return []
    passages = []
    for first, last in zip(*rows_of(places), strict=True):
        if last - first + 1 < NEEDED_WINDOWS:
            continue
        own = numbers[places[first : last + 1]]
        key = int(own[np.argmax(counts[own])])
        stretch = text[places[first] : places[last] + runs.window]
        passages.append(
            Passage(
                source=name,
                key=key,
                documents=int(counts[key]),
                tokens=len(stretch),
                text=decode(stretch[:MAX_CHARACTERS])[:MAX_CHARACTERS],
            )
        )
    return passages


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundPassage:
    """A passage in the documents of one shard that stay."""

    key: int
    """The `key` of the passage."""
    documents: int
    """Documents in which this run stays."""
    examples: tuple[str, ...]
    """Names of some of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundStockText:
    """Stock text in the documents of one shard that stay."""

    num_documents: int
    num_tokens: int
    passages: tuple[FoundPassage, ...]


def find_stock_text(
    shard: Shard,
    place: str,
    hits: Hits,
    stock: StockRuns,
    window: int,
    left: Mapping[int, Sequence[tuple[int, int]]],
) -> FoundStockText:
    """Return the held-out text in a shard that stays because it is stock text.

    Args:
        shard: The shard.
        place: Name of the shard and of its input.
        hits: All held-out windows in it.
        stock: Which of them are stock text.
        window: Tokens of a window.
        left: For each document that was cut or dropped the stretches (start, stop) that stay.
    """
    documents = documents_at(shard.offsets, hits.places)
    is_stock = stock.is_stock[hits.numbers]
    stays = np.zeros(len(documents), dtype=bool)
    num_documents = 0
    num_tokens = 0
    for document in np.unique(documents[is_stock]).tolist():
        first, last = np.searchsorted(documents, [document, document + 1])
        places = hits.places[first:last] - shard.offsets[document]
        length = int(shard.document_tokens[document])
        inside = _lie_within(places, window, left.get(document, [(0, length)]))
        inside &= is_stock[first:last]
        if inside.any():
            num_documents += 1
            num_tokens += _covered_tokens(places[inside], window, length)
            stays[first:last] = inside
    passages = []
    listed = stays & np.isin(hits.numbers, stock.keys)
    for key in np.unique(hits.numbers[listed]).tolist():
        having = np.unique(documents[listed & (hits.numbers == key)]).tolist()
        examples = [f"{place}, document {document}" for document in having[:MAX_EXAMPLES]]
        passages.append(FoundPassage(key=key, documents=len(having), examples=tuple(examples)))
    return FoundStockText(
        num_documents=num_documents, num_tokens=num_tokens, passages=tuple(passages)
    )


def _lie_within(places: Integers, window: int, kept: Sequence[tuple[int, int]]) -> Mask:
    """Return which windows of a document lie within one of the stretches that stay."""
    inside = np.zeros(len(places), dtype=bool)
    for start, stop in kept:
        inside |= (places >= start) & (places + window <= stop)
    return inside


def _covered_tokens(places: Integers, window: int, length: int) -> int:
    """Return the tokens in the windows at `places` of a document of `length` tokens."""
    changes = np.zeros(length + 1, np.int64)
    changes[places] += 1
    changes[places + window] -= 1
    return int(np.count_nonzero(np.cumsum(changes)))


def list_stock_text(stock: StockRuns, found: Sequence[FoundPassage]) -> tuple[StockText, ...]:
    """Return the stock text that was let through, the most frequent first, for the manifest.

    Args:
        stock: The runs and their passages.
        found: Passages that stay, by shard, in the order of the mix.
    """
    documents: Counter[int] = Counter()
    places: dict[int, list[str]] = {}
    for one in found:
        documents[one.key] += one.documents
        named = places.setdefault(one.key, [])
        named.extend(one.examples[: MAX_EXAMPLES - len(named)])
    staying = [passage for passage in stock.passages if documents[passage.key]]
    staying.sort(key=lambda passage: -documents[passage.key])
    listed = []
    for passage in staying[:MAX_LISTED]:
        listed.append(
            StockText(
                held_out_by=passage.source,
                text=passage.text,
                tokens=passage.tokens,
                documents=documents[passage.key],
                examples=tuple(places[passage.key]),
            )
        )
    return tuple(listed)
