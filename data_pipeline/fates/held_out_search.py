"""The search for held-out text in all training documents of a build.

    held-out documents -> tables of runs, files that all tasks map
    search: a shard -> its hits, and how many documents have each run        one task a shard
            and the short held-out documents in it, as a whole (short_texts)
    stock text, if the mix allows any: runs that very many documents have
    decide: the hits of a shard -> which documents go, and what is left of those that are cut

Decisions
    Tokens are read once. The second step reads the hits, of which there are few, so that it costs
    little even where stock text is counted first.
    Tasks write what they find to files in the work directory and return counts. The parent holds
    one number for each run and nothing for each shard.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.console.progress import show_progress
from data_pipeline.engine.executor import Executor
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.decontamination import (
    EDGE_TOKENS,
    NEEDED_WINDOWS,
    HeldOutRuns,
    Hits,
    Mask,
    Stretches,
    count_documents,
    documents_at,
    find_hits,
    what_is_left,
)
from data_pipeline.fates.deduplication import Fate
from data_pipeline.fates.short_texts import (
    FoundTexts,
    ShortTexts,
    find_short_texts,
    hash_of_whole,
    note_unsearched,
    owners_of_wholes,
    short_documents,
    short_of,
)
from data_pipeline.fates.stock_text import (
    FoundPassage,
    FoundStockText,
    StockRuns,
    find_stock_runs,
    find_stock_text,
    list_stock_text,
)
from data_pipeline.parts.near_duplicates import window_hashes
from data_pipeline.parts.part import Part
from data_pipeline.store.files import atomic_write, cached_per_file, make_folder
from data_pipeline.store.manifest import StockText
from data_pipeline.store.packing import Integers, Segments
from data_pipeline.store.shards import Shard
from data_pipeline.text.harmony import own_tokens
from data_pipeline.text.tokenizer import Tokens

_FOLDER = "held_out"
_SHORT_FOLDER = "short"
_TRAIN_FILE = "train.npy"
_OWNERS_FILE = "owners.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scan:
    """A shard to search."""

    shard_path: Path
    folder: Path
    """Folder of the tables and of what is found."""
    number: int
    """Number of the shard among all that are searched."""
    first_document: int
    """Documents in the shards before it."""
    place: str
    """Name of the shard and of the file that it was made of."""
    rules: DecontaminationConfig

    def file(self, suffix: str) -> Path:
        """Return the file for some of the results."""
        return self.folder / f"{self.number:05d}.{suffix}.npy"


def decontaminate(
    sources: Sequence[DecidedSource],
    rules: DecontaminationConfig,
    work_dir: Path,
    executor: Executor,
) -> tuple[list[DecidedSource], tuple[StockText, ...]]:
    """Take held-out text out of the training documents.

    Args:
        sources: Sources of text. Their fates are changed in place (TRAIN into CONTAMINATED), and so
            are the notes of which held-out documents were found.
        rules: What counts as held-out text.
        work_dir: Folder for the tables and the results of the tasks.
        executor: Runs the searches.

    Returns:
        The sources with what is left of documents that were cut, and the stock text that was let
        through.
    """
    texts = [_held_out_texts(source) for source in sources]
    names = [source.parts.source.name for source in sources]
    folder = work_dir / _FOLDER
    make_folder(folder)
    runs = HeldOutRuns.from_documents([text for some in texts for text in some], rules.tokens)
    short = ShortTexts.from_documents(short_documents(sources, texts, rules))
    sources = note_unsearched(sources, texts, rules)
    if not len(runs.hashes) and not len(short.wholes):
        return sources, ()
    runs.save(folder)
    short.save(folder / _SHORT_FOLDER)
    _save(folder / _TRAIN_FILE, np.concatenate([s.fates.fates == Fate.TRAIN for s in sources]))
    _save(folder / _OWNERS_FILE, _owners(texts, runs))
    _save(folder / _SHORT_FOLDER / _OWNERS_FILE, owners_of_wholes(sources, texts, rules, short))
    scans = _scans(sources, folder, rules)
    with show_progress(len(scans), "search for held-out text", "scan") as bar:
        hit = set()
        for scan, num_hits in executor.run(_search, scans):
            if num_hits:
                hit.add(scan.number)
            bar.update()
    hit_scans = [scan for scan in scans if scan.number in hit]
    counts = _add_up(hit_scans, len(runs.hashes))
    stock = find_stock_runs(sources, texts, runs, counts, rules)
    stock.save(folder)
    decided = dict(executor.run(_decide, hit_scans))
    _note_found(sources, texts, runs, (counts > 0) & ~stock.is_stock)
    _note_short(sources, texts, rules, short, hit_scans)
    results = []
    for source, source_scans in zip(sources, _by_source(sources, scans), strict=True):
        results.append(_apply(source, source_scans, decided, names))
    passages: list[FoundPassage] = []
    for scan in hit_scans:
        passages += decided[scan].stock.passages
    return results, list_stock_text(stock, passages)


def _held_out_texts(source: DecidedSource) -> list[Tokens]:
    """Return the tokens of each held-out document, without the token that ends it.

    A conversation is returned without its system message, which all conversations share; one of
    which only a turn is learned, as that turn, without the tools and instructions that many share.
    """
    if not len(source.fates.held_out):
        return []
    shards = source.parts.open_shards()
    texts = []
    for number in source.fates.held_out.tolist():
        text, loss = shards.tokens_and_loss(number, 0, int(shards.document_tokens[number]) - 1)
        if shards.chat:
            text = own_tokens(text, has_mask=loss is not None)
        texts.append(text)
    return texts


def _owners(texts: Sequence[Sequence[Tokens]], runs: HeldOutRuns) -> npt.NDArray[np.uint16]:
    """Return the number of the first source that holds out each run, [runs]."""
    owners = np.zeros(len(runs.hashes), np.uint16)
    for number in range(len(texts) - 1, -1, -1):
        for text in texts[number]:
            if len(text) >= runs.window + EDGE_TOKENS:
                owners[runs.numbers(window_hashes(text, runs.window))] = number
    return owners


def _scans(
    sources: Sequence[DecidedSource], folder: Path, rules: DecontaminationConfig
) -> list[_Scan]:
    scans: list[_Scan] = []
    num_documents = 0
    for source in sources:
        for part, account in zip(source.parts.parts, source.parts.accounts, strict=True):
            scans.append(
                _Scan(
                    shard_path=part.shard_path,
                    folder=folder,
                    number=len(scans),
                    first_document=num_documents,
                    place=_place(part),
                    rules=rules,
                )
            )
            num_documents += account.num_documents
    return scans


def _place(part: Part) -> str:
    """Return the name of a shard, and of its input if that is one file."""
    name = f"{part.source.name}/{part.shard_path.name}"
    if len(part.unit.paths) != 1:
        return name
    return f"{name} (from {part.unit.paths[0].name})"


def _by_source(sources: Sequence[DecidedSource], scans: Sequence[_Scan]) -> list[list[_Scan]]:
    waiting = iter(scans)
    return [[next(waiting) for _ in source.parts.parts] for source in sources]


def _search(scan: _Scan) -> int:
    """Write what a shard has of held-out text; return how many hits there are.

    These are its hits, the number of documents that have each run, and short held-out documents.
    """
    shard = Shard(scan.shard_path, verify=False)
    runs = _load_runs(scan.folder / "held_out_hashes.npy", scan.rules.tokens)
    train = np.load(scan.folder / _TRAIN_FILE, mmap_mode="r", allow_pickle=False)
    own = np.asarray(train[scan.first_document : scan.first_document + shard.num_documents])
    hits = find_hits(shard.all_tokens, shard.offsets, own, runs)
    texts = _load_short(scan.folder / _SHORT_FOLDER / "held_out_hashes.npy")
    short = find_short_texts(shard.all_tokens, shard.offsets, own, texts)
    num_hits = len(hits.places) + len(short.places)
    if num_hits:
        _save(scan.file("hits"), np.stack([hits.places, hits.numbers]))
        _save(scan.file("runs"), np.stack(count_documents(hits, shard.offsets)))
        _save(scan.file("short"), np.stack([short.places, short.tokens, short.numbers]))
    return num_hits


@cached_per_file(max_files=1)
def _load_short(hashes_path: Path) -> ShortTexts:
    return ShortTexts.load(hashes_path.parent)


@cached_per_file(max_files=1)
def _load_runs(hashes_path: Path, length: int) -> HeldOutRuns:
    return HeldOutRuns.load(hashes_path.parent, length)


def _add_up(scans: Sequence[_Scan], num_runs: int) -> Integers:
    """Return the number of training documents that have each run, [num_runs]."""
    counts = np.zeros(num_runs, np.int64)
    for scan in scans:
        met, documents = np.load(scan.file("runs"), allow_pickle=False)
        counts[met] += documents
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decided:
    """What one shard comes to, besides its file."""

    by_owner: tuple[int, ...]
    """Documents dropped, by the number of the source that holds out the text."""
    stock: FoundStockText


def _decide(scan: _Scan) -> _Decided:
    """Write what is left of the documents of a shard that have held-out text.

    The file has a row (document, start, tokens) for each stretch that stays, and (document, 0, 0)
    for a document that goes.
    """
    shard = Shard(scan.shard_path, verify=False)
    places, numbers = np.load(scan.file("hits"), allow_pickle=False)
    hits = Hits(places=places, numbers=numbers)
    stock = StockRuns.load(scan.folder)
    is_stock = stock.is_stock[hits.numbers]
    window = HeldOutRuns.window_of(scan.rules.tokens)
    counted = hits.chosen(~is_stock).in_rows()
    short = _found_short(scan)
    left_by_document: dict[int, list[tuple[int, int]]] = {}
    rows = []
    long_stretches = Stretches.of_hits(counted, shard.offsets, window)
    for document, stretches in _with_short(long_stretches, short, shard.offsets):
        left = []
        if not shard.chat:  # what is left of a conversation would lack what came before it
            num_tokens = int(shard.document_tokens[document])
            left = what_is_left(stretches, num_tokens, scan.rules)
        for start, stop in left:
            rows.append((document, start, stop - start))
        if not left:
            rows.append((document, 0, 0))
        left_by_document[document] = left
    _save(scan.file("left"), np.array(rows, np.int64).reshape(-1, 3))
    found = FoundStockText(num_documents=0, num_tokens=0, passages=())
    if is_stock.any():
        found = find_stock_text(shard, scan.place, hits, stock, window, left_by_document)
    gone = [document for document, left in left_by_document.items() if not left]
    return _Decided(by_owner=_count_owners(scan, gone, counted, short, shard.offsets), stock=found)


def _found_short(scan: _Scan) -> FoundTexts:
    places, tokens, numbers = np.load(scan.file("short"), allow_pickle=False)
    return FoundTexts(places=places, tokens=tokens, numbers=numbers)


def _with_short(
    stretches: Stretches, short: FoundTexts, offsets: Integers
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield (document, its stretches as (start, stop)), with those of short texts, in order."""
    document = documents_at(offsets, short.places)
    start = short.places - offsets[document]
    document = np.concatenate([stretches.document, document])
    starts = np.concatenate([stretches.start, start])
    stops = np.concatenate([stretches.stop, start + short.tokens])
    order = np.lexsort((stops, starts, document))
    together = Stretches(document=document[order], start=starts[order], stop=stops[order])
    return together.by_document()


def _count_owners(
    scan: _Scan, gone: Sequence[int], hits: Hits, short: FoundTexts, offsets: Integers
) -> tuple[int, ...]:
    """Return the documents that go by the source that holds out the first text in them."""
    owners = np.load(scan.folder / _OWNERS_FILE, mmap_mode="r", allow_pickle=False)
    path = scan.folder / _SHORT_FOLDER / _OWNERS_FILE
    short_owners = np.load(path, mmap_mode="r", allow_pickle=False)
    places = np.concatenate([hits.places, short.places])
    by_place = np.concatenate([owners[hits.numbers], short_owners[short.numbers]])
    order = np.argsort(places, kind="stable")
    documents, first = np.unique(documents_at(offsets, places[order]), return_index=True)
    is_gone = np.isin(documents, gone)
    return tuple(np.bincount(by_place[order][first[is_gone]]).tolist())


def _note_found(
    sources: Sequence[DecidedSource],
    texts: Sequence[Sequence[Tokens]],
    runs: HeldOutRuns,
    found: Mask,
) -> None:
    """Note which held-out documents have a run that was found in training text and dropped."""
    if not found.any():
        return
    for source, source_texts in zip(sources, texts, strict=True):
        for number, text in enumerate(source_texts):
            source.held_out_found[number] |= has_found_run(text, runs, found)


def _note_short(
    sources: Sequence[DecidedSource],
    texts: Sequence[Sequence[Tokens]],
    rules: DecontaminationConfig,
    short: ShortTexts,
    scans: Sequence[_Scan],
) -> None:
    """Note which of the short held-out documents were found in training text."""
    is_found = np.zeros(len(short.wholes), dtype=bool)
    for scan in scans:
        is_found[_found_short(scan).numbers] = True
    if not is_found.any():
        return
    for source, source_texts in zip(sources, texts, strict=True):
        for number, text in short_of(source, source_texts, rules):
            whole = np.searchsorted(short.wholes, hash_of_whole(text))
            source.held_out_found[number] |= is_found[whole]


def has_found_run(document: Tokens, runs: HeldOutRuns, found: Mask) -> bool:
    """Return whether NEEDED_WINDOWS windows in a row of a held-out document were found.

    Args:
        document: Tokens of the document, without the one that ends it.
        runs: Runs of all held-out documents.
        found: Which of them stood in training text that was dropped.
    """
    numbers = runs.numbers(window_hashes(document, runs.window))
    is_found = found[numbers] & (numbers >= 0)
    sums = np.cumsum(np.concatenate([[0], is_found]))
    return bool((sums[NEEDED_WINDOWS:] - sums[:-NEEDED_WINDOWS] == NEEDED_WINDOWS).any())


def _apply(
    source: DecidedSource,
    scans: Sequence[_Scan],
    decided: dict[_Scan, _Decided],
    names: Sequence[str],
) -> DecidedSource:
    """Return a source with the decisions on its shards; the fates are changed in place."""
    by_owner: Counter[str] = Counter()
    left = [np.zeros((0, 3), np.int64)]
    num_documents = 0
    num_tokens = 0
    for scan in scans:
        if scan not in decided:
            continue
        rows = np.load(scan.file("left"), allow_pickle=False)
        rows[:, 0] += scan.first_document - scans[0].first_document
        gone = rows[:, 2] == 0
        source.fates.fates[rows[gone, 0]] = Fate.CONTAMINATED
        left.append(rows[~gone])
        for owner, documents in enumerate(decided[scan].by_owner):
            by_owner[names[owner]] += documents
        num_documents += decided[scan].stock.num_documents
        num_tokens += decided[scan].stock.num_tokens
    document, start, tokens = np.concatenate(left).T.copy()
    return dataclasses.replace(
        source,
        left=Segments(document=document, start=start, tokens=tokens),
        contaminated_by=+by_owner,
        exempted_documents=num_documents,
        exempted_tokens=num_tokens,
    )


def _save(path: Path, values: npt.NDArray[np.generic]) -> None:
    with atomic_write(path) as file:
        np.save(file, values, allow_pickle=False)
