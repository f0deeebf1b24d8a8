"""Near copies in a whole build: signatures of all parts -> one byte a document.

    signatures of a part -> (band key, number) of its living documents, sorted by slot
                                                              (task per group of parts)
    the same slots of all files -> pairs of neighbors with an equal key
                                                              (task per stretch of slots, SQL)
    pairs that begin in a stretch of documents -> pairs that are similar
                                                              (task per stretch of documents)
    similar pairs -> groups -> fates, and whose copies they are
                                                              (the parent)

Decisions
    A living document is trained on or held out so far; a slot belongs to one band. Of the living
    documents with an equal key, each one and the next, in the order of the mix, are a pair.
    Near copies form groups: the connected documents. The first document of a group, in the order of
    the mix, is trained on, unless one of the group is held out: then none is. That document, or the
    first one that is held out, is the original of the others.
    Nearly all keys of a corpus are unique. One sort of integers finds the records that may share
    theirs, and only those go to the engine, which pairs them and drops pairs that other bands gave.
    What a task holds does not grow with the corpus, unless a key is in very many documents: a slot
    takes 20 bytes for each record of such a key. The parent holds 6 bytes a document, and 45 more
    for one that is held out. On disk the records take 384 bytes a document, 12 for each band, until
    the step is done. Signatures are read once, and again where a document is in a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.engine.executor import Executor
from data_pipeline.fates.deduplication import Fate, Fates
from data_pipeline.fates.embedded_engine import Columns, open_engine
from data_pipeline.fates.shuffle import (
    RecordLayout,
    leading_bits,
    read_slots,
    slot_bits,
    write_records,
)
from data_pipeline.fates.steps import Step
from data_pipeline.parts.near_duplicates import (
    NUM_BANDS,
    NUM_HASHES,
    Signatures,
    band_keys,
)
from data_pipeline.parts.part import read_side_file
from data_pipeline.parts.part_groups import (
    NumberedPart,
    document_ends,
    group_parts,
    identity_of,
    numbered_parts,
)
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.store.files import atomic_write, write_json
from data_pipeline.store.hashing import Hashes64
from data_pipeline.store.packing import Integers

_KEY_DTYPES = ("<u8", "<u4")
"""Key of a band, number of the document."""
_PAIR_DTYPES = ("<u4", "<u4")
"""Numbers of two documents, the smaller one first."""
_PLACES_FILE = "signatures.json"
_ORIGINALS_FILE = "originals.npy"
_COMPARE_PAIRS = 1 << 19
"""Pairs whose second signatures are in memory at once."""
_SLICE_DOCUMENTS = 1 << 22
"""Documents whose groups are looked up at once."""
_QUERY = """
    SELECT DISTINCT previous, number FROM (
        SELECT number, lag(number) OVER (PARTITION BY slot, key ORDER BY number) AS previous
        FROM sharing
    ) WHERE previous IS NOT NULL
"""
_Places = Sequence[tuple[str, int, int]]
"""File of signatures, first document and one past the last one, of each part."""
Numbers = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much one task has; the groups that are found do not depend on it."""

    group_documents: int = 1 << 19
    """Documents whose signatures one task reads."""
    slot_records: int = 1 << 22
    """Records of a slot, about."""
    task_records: int = 1 << 24
    """Records of the slots that one task compares, about."""
    stretch_documents: int = 1 << 22
    """Documents whose pairs one task verifies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _MapKeys:
    """Parts whose band keys go to slots."""

    parts: tuple[NumberedPart, ...]
    fates_path: Path
    """Fates of all documents so far."""
    bits: int
    """Leading bits of a key that name its slot within a band."""
    output: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """Slots whose records are paired."""

    num_maps: int
    """Number of files of keys."""
    bits: int
    first: int
    last: int
    """One past the last slot."""
    stretches: RecordLayout
    """Of the file to write: a slot for each stretch of documents."""
    stretch_documents: int
    output: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verify:
    """A stretch of documents whose pairs are verified."""

    pairs: tuple[str, ...]
    """Names of the files of pairs."""
    stretches: RecordLayout
    stretch: int
    work_dir: Path
    threshold: float
    output: Path


def mark_near_copies(
    fates: Fates,
    gathered: Sequence[SourceParts],
    threshold: float,
    work_dir: Path,
    executor: Executor,
    sizes: Sizes | None = None,
) -> Counts:
    """Turn TRAIN into NEAR_DUPLICATE where a document is a near copy.

    Args:
        fates: Fates of all documents, in the order of the mix; changed in place.
        gathered: Parts of each source. Invented documents are no copies of each other.
        threshold: Similarity from which on documents are near copies, above 0 and at most 1.
        work_dir: Folder of the build in progress.
        executor: Runs the tasks.
        sizes: How much one task has.

    Returns:
        Number of documents that are near copies, by their source and that of their original,
        [sources, sources].
    """
    sizes = sizes or Sizes()
    digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(fates).data)
    inputs = [identity_of(gathered), digest, threshold, repr(sizes), _ORIGINALS_FILE]
    step = Step.begin(work_dir, "near", inputs)
    originals_path = step.folder / _ORIGINALS_FILE
    result = step.result()
    if result is None:
        parts = []
        for part in numbered_parts(gathered):
            if not gathered[part.source].is_mock:
                parts.append(part)
        edges = _find_edges(step, parts, fates, threshold, executor, sizes)
        result, originals = _fates_of_groups(fates, edges, document_ends(gathered))
        with atomic_write(originals_path) as file:  # before the result, which says that all is done
            np.save(file, originals, allow_pickle=False)
        step.finish(result)
    fates[:] = result
    return np.asarray(np.load(originals_path, allow_pickle=False))


def _find_edges(
    step: Step,
    parts: Sequence[NumberedPart],
    fates: Fates,
    threshold: float,
    executor: Executor,
    sizes: Sizes,
) -> list[Path]:
    """Return the files of all pairs of near copies."""
    folder = step.tasks_folder
    bits = slot_bits(len(fates), sizes.slot_records)
    num_maps = _write_all_keys(step, parts, fates, bits, executor, sizes)
    num_stretches = len(fates) // sizes.stretch_documents + 1
    stretches = RecordLayout(num_slots=num_stretches, dtypes=_PAIR_DTYPES)
    pairs = []
    num_slots = _key_layout(bits).num_slots
    slots_at_once = max(sizes.task_records // max(len(fates) >> bits, 1), 1)
    for first in range(0, num_slots, slots_at_once):
        pairs.append(
            _Pair(
                num_maps=num_maps,
                bits=bits,
                first=first,
                last=min(first + slots_at_once, num_slots),
                stretches=stretches,
                stretch_documents=sizes.stretch_documents,
                output=folder / f"pairs-{first:05d}",
            )
        )
    step.run(executor, _write_pairs, pairs, "look for near copies")
    _write_places(folder, parts)
    verifies = []
    for stretch in range(num_stretches):
        verifies.append(
            _Verify(
                pairs=tuple(task.output.name for task in pairs),
                stretches=stretches,
                stretch=stretch,
                work_dir=parts[0].work_dir,
                threshold=threshold,
                output=folder / f"edges-{stretch:05d}.npy",
            )
        )
    step.run(executor, _verify_pairs, verifies, "compare near copies")
    return [task.output for task in verifies]


def _write_all_keys(
    step: Step,
    parts: Sequence[NumberedPart],
    fates: Fates,
    bits: int,
    executor: Executor,
    sizes: Sizes,
) -> int:
    """Write the band keys of all living documents, and return the number of files."""
    fates_path = step.tasks_folder / "fates.npy"
    with atomic_write(fates_path) as file:
        np.save(file, fates, allow_pickle=False)
    maps = []
    for number, group in enumerate(group_parts(parts, sizes.group_documents)):
        output = _keys_path(step.tasks_folder, number)
        maps.append(_MapKeys(parts=group, fates_path=fates_path, bits=bits, output=output))
    step.run(executor, _write_keys, maps, "gather signatures")
    return len(maps)


def _keys_path(folder: Path, number: int) -> Path:
    return folder / f"keys-{number:05d}"


def _write_places(folder: Path, parts: Sequence[NumberedPart]) -> None:
    """Write where the signatures of all documents are, and the numbers of the documents."""
    places = []
    for part in parts:
        places.append([str(part.signatures_path), part.first, part.stop])
    write_json(folder / _PLACES_FILE, places)


def _key_layout(bits: int) -> RecordLayout:
    return RecordLayout(num_slots=NUM_BANDS << bits, dtypes=_KEY_DTYPES)


def _write_keys(task: _MapKeys) -> None:
    fates = np.load(task.fates_path, mmap_mode="r", allow_pickle=False)
    numbers = []
    signatures = []
    for part in task.parts:
        part_fates = fates[part.first : part.stop]
        living = np.flatnonzero((part_fates == Fate.TRAIN) | (part_fates == Fate.HELD_OUT))
        numbers.append((living + part.first).astype(np.uint32))
        signatures.append(part.signatures()[living])
    all_numbers = np.concatenate(numbers)
    count = len(all_numbers)
    layout = _key_layout(task.bits)
    keys = np.empty(NUM_BANDS * count, np.uint64)
    owners = np.empty(NUM_BANDS * count, np.uint32)
    sizes = []
    for band in range(NUM_BANDS):
        band_hashes = np.concatenate([band_keys(some, band) for some in signatures])
        slots = leading_bits(band_hashes, task.bits)
        order = np.argsort(slots, kind="stable")
        place = slice(band * count, (band + 1) * count)
        keys[place] = band_hashes[order]
        owners[place] = all_numbers[order]
        sizes.append(np.bincount(slots, minlength=1 << task.bits))
    write_records(task.output, layout, np.cumsum(np.concatenate(sizes)), (keys, owners))


def _write_pairs(task: _Pair) -> None:
    pairs = [np.zeros((0, 2), np.uint32)]
    with open_engine(task.output.parent) as engine:
        if engine.load("sharing", _sharing_records(task)):
            for columns in engine.query(_QUERY):
                pairs.append(np.stack([columns["previous"], columns["number"]], axis=1))
    left, right = np.concatenate(pairs).T
    order = np.lexsort((right, left))
    stretches = left // np.uint32(task.stretch_documents)
    ends = np.cumsum(np.bincount(stretches, minlength=task.stretches.num_slots))
    write_records(task.output, task.stretches, ends, (left[order], right[order]))


def _sharing_records(task: _Pair) -> Iterator[Columns]:
    """Yield, slot by slot, the records whose key another record of the slot has."""
    stretches = []
    for number in range(task.num_maps):
        path = _keys_path(task.output.parent, number)
        stretches.append(read_slots(path, _key_layout(task.bits), task.first, task.last))
    for place in range(task.last - task.first):
        keys = [np.zeros(0, np.uint64)]
        numbers = [np.zeros(0, np.uint32)]
        for borders, (some_keys, some_numbers) in stretches:
            records = slice(borders[place], borders[place + 1])
            keys.append(some_keys[records])
            numbers.append(some_numbers[records])
        slot_keys = np.concatenate(keys)
        chosen = _that_may_share(slot_keys)
        yield {
            "slot": np.full(len(chosen), place, np.uint16),
            "key": slot_keys[chosen],
            "number": np.concatenate(numbers)[chosen],
        }


def _that_may_share(keys: Hashes64) -> Integers:
    """Return the places of all keys that are not unique, and of a few that are.

    Keys of a slot have equal leading bits, which make room for the place in one integer to sort.
    """
    bits = np.uint64(len(keys).bit_length())
    words = keys << bits | np.arange(len(keys), dtype=np.uint64)
    words.sort()
    like_next = words[1:] >> bits == words[:-1] >> bits
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[1:] |= like_next
    chosen[:-1] |= like_next
    places = words[chosen] & ((np.uint64(1) << bits) - np.uint64(1))
    return places.astype(np.int64)


def _verify_pairs(task: _Verify) -> None:
    left, right = _distinct_pairs(task)
    places = read_json(task.output.with_name(_PLACES_FILE), LARGE_BYTES, lone_surrogates=True)
    kept = [np.zeros((0, 2), np.uint32)]
    for start in range(0, len(left), _COMPARE_PAIRS):
        some = slice(start, start + _COMPARE_PAIRS)
        is_similar = _are_similar(task, places, left[some], right[some])
        kept.append(np.stack([left[some][is_similar], right[some][is_similar]], axis=1))
    with atomic_write(task.output) as file:
        np.save(file, np.concatenate(kept), allow_pickle=False)


def _distinct_pairs(task: _Verify) -> tuple[Numbers, Numbers]:
    """Return the pairs whose first document is in the stretch, each once, in order."""
    words = [np.zeros(0, np.uint64)]
    for name in task.pairs:
        path = task.output.with_name(name)
        _, (left, right) = read_slots(path, task.stretches, task.stretch, task.stretch + 1)
        words.append(left.astype(np.uint64) << np.uint64(32) | right)
    distinct = np.unique(np.concatenate(words))
    return (distinct >> np.uint64(32)).astype(np.uint32), distinct.astype(np.uint32)


def _are_similar(
    task: _Verify, places: _Places, left: Numbers, right: Numbers
) -> npt.NDArray[np.bool_]:
    """Return which pairs have enough equal numbers in their signatures, [pairs]."""
    others = np.empty((len(right), NUM_HASHES), np.uint32)
    for chosen, signatures in _signatures_of(task, places, right):
        others[chosen] = signatures
    result = np.zeros(len(left), dtype=bool)
    for chosen, signatures in _signatures_of(task, places, left):
        result[chosen] = (signatures == others[chosen]).mean(axis=1) >= task.threshold
    return result


def _signatures_of(
    task: _Verify, places: _Places, numbers: Numbers
) -> Iterator[tuple[Integers, Signatures]]:
    """Yield (places in `numbers`, signatures of those documents), part by part."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    begins = np.searchsorted(ordered, [first for _, first, _ in places])
    ends = np.searchsorted(ordered, [stop for _, _, stop in places])
    for number in np.flatnonzero(begins < ends).tolist():
        path, first, _ = places[number]
        chosen = slice(begins[number], ends[number])
        signatures = read_side_file(Path(path), task.work_dir)
        yield order[chosen], signatures[ordered[chosen] - np.uint32(first)]


def _fates_of_groups(
    fates: Fates, edges: Sequence[Path], ends: Sequence[int]
) -> tuple[Fates, Counts]:
    """Return the fates after near copies were dropped, and the copies by source and original.

    Args:
        fates: Fates of all documents so far.
        edges: Files of the pairs that are near copies.
        ends: Number of documents up to the end of each source.
    """
    parents = np.arange(len(fates), dtype=np.uint32)
    for path in edges:
        pairs = np.load(path, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(pairs), _SLICE_DOCUMENTS):
            some = pairs[start : start + _SLICE_DOCUMENTS]
            _join(parents, some[:, 0], some[:, 1])
    group_held = np.zeros(len(fates), dtype=bool)
    held_roots = [np.zeros(0, np.uint32)]
    held_sources = [np.zeros(0, np.int64)]
    for numbers, roots in _all_roots(parents):
        is_held = fates[numbers] == Fate.HELD_OUT
        group_held[roots[is_held]] = True
        held_roots.append(roots[is_held])
        held_sources.append(np.searchsorted(ends, numbers[is_held], side="right"))
    led_by_held, first = np.unique(np.concatenate(held_roots), return_index=True)
    held_leaders = np.concatenate(held_sources)[first]
    originals = np.zeros((len(ends), len(ends)), np.int64)
    result = fates.copy()
    for numbers, roots in _all_roots(parents):
        is_first = roots == numbers
        copies = (fates[numbers] == Fate.TRAIN) & (group_held[roots] | ~is_first)
        result[numbers[copies]] = Fate.NEAR_DUPLICATE
        roots = roots[copies]
        leaders = np.searchsorted(ends, roots, side="right")
        is_held = group_held[roots]
        leaders[is_held] = held_leaders[np.searchsorted(led_by_held, roots[is_held])]
        own = np.searchsorted(ends, numbers[copies], side="right")
        np.add.at(originals, (own, leaders), 1)
    return result, originals


def _all_roots(parents: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield (documents, the first document of the group of each), slice by slice."""
    for start in range(0, len(parents), _SLICE_DOCUMENTS):
        stop = min(start + _SLICE_DOCUMENTS, len(parents))
        numbers = np.arange(start, stop, dtype=np.uint32)
        yield numbers, _roots(parents, numbers)


def _join(parents: Numbers, left: Numbers, right: Numbers) -> None:
    """Put the groups of each pair together, led by the smallest number."""
    while True:
        one = _roots(parents, left)
        other = _roots(parents, right)
        apart = np.flatnonzero(one != other)
        if not len(apart):
            return
        smaller = np.minimum(one[apart], other[apart])
        larger = np.maximum(one[apart], other[apart])
        # a root that several pairs join gets one of them now, and is looked at again
        np.minimum.at(parents, larger, smaller)
        left = left[apart]
        right = right[apart]


def _roots(parents: Numbers, numbers: Numbers) -> Numbers:
    """Return the first document of the group of each document, and shorten the ways there."""
    above = parents[numbers]
    while True:
        higher = parents[above]
        if (higher == above).all():
            parents[numbers] = above
            return above
        # halves the ways of all documents that lie on one
        parents[above] = parents[higher]
        above = higher
