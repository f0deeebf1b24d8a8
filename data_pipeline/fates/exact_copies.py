"""Held-out documents and exact copies: content hashes of all parts -> one byte a document.

    hashes of a part -> smallest and largest digest of each source      (task per group of parts)
    hashes of a part -> records, sorted by slot                         (task per group of parts)
    the same slot of all files -> fates of what is not simply trained on     (task per slot, SQL)

Decisions
    The rules are those of `deduplication`; equal hashes meet in one slot. Conversations meet by the
    hash of their tokens, which an earlier build has of them, too; by what they are held out is
    another matter (`NumberedPart.digests`).
    A small slot without equal hashes opens no engine.
    What a task holds does not grow with the corpus: hashes of GROUP_DOCUMENTS documents, or the
    memory of the engine. The parent holds 3 bytes a document. On disk the records take 21 bytes a
    document until the step is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.engine.executor import Executor
from data_pipeline.fates.deduplication import Fate, Fates, Mask, held_out_digests
from data_pipeline.fates.embedded_engine import Columns, open_engine
from data_pipeline.fates.shuffle import (
    RecordLayout,
    leading_bits,
    read_slots,
    slot_bits,
    write_records,
)
from data_pipeline.fates.steps import Step
from data_pipeline.parts.part_groups import (
    NumberedPart,
    document_ends,
    group_parts,
    identity_of,
    numbered_parts,
)
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.store.files import atomic_write

GROUP_DOCUMENTS = 1 << 21
"""Documents whose hashes one task reads."""
SLOT_DOCUMENTS = 1 << 22
"""Documents that one task compares, about."""
_FEW_DOCUMENTS = 1 << 16
"""Documents of a slot that are looked at without an engine, whose start takes longer: 1.4 MB."""
_DTYPES = ("<u8", "<u8", "<u4", "u1")
"""Halves of the hash, number of the document, whether its own source holds it out."""
_FOUND = np.dtype([("number", "<u4"), ("mark", "u1")])
_COPIED = 0x80
"""Bit of a mark: another document has the same text."""
_ALL_DIGESTS = (0, 2**64 - 1)
_NO_DIGESTS = (1, 0)
_QUERY = f"""
    WITH shared AS (
        SELECT high, low, min(number) AS first_number, min(number) FILTER (held = 1) AS held_number,
            count(*) AS copies
        FROM documents GROUP BY high, low HAVING count(*) > 1 OR max(held) = 1
    )
    SELECT number, CAST(
        CASE WHEN number = held_number THEN {int(Fate.HELD_OUT)}
            WHEN held_number IS NOT NULL THEN {int(Fate.HELD_OUT_COPY)}
            ELSE {int(Fate.DUPLICATE)} END
        + CASE WHEN copies > 1 THEN {_COPIED} ELSE 0 END AS UTINYINT) AS mark
    FROM documents JOIN shared USING (high, low)
    WHERE held_number IS NOT NULL OR number != first_number
"""


@dataclass(frozen=True, slots=True)
class _Group:
    """Parts whose hashes are read by one task."""

    parts: tuple[NumberedPart, ...]


@dataclass(frozen=True, slots=True)
class _MapHashes:
    """Parts whose hashes go to slots."""

    parts: tuple[NumberedPart, ...]
    held_digests: tuple[tuple[int, int], ...]
    """Digests that each source of the mix holds out: first and last."""
    bits: int
    """Leading bits of a hash that name its slot."""
    output: Path


@dataclass(frozen=True, slots=True)
class _Compare:
    """A slot whose documents are compared."""

    num_maps: int
    """Number of files of hashes."""
    bits: int
    slot: int
    output: Path


def decide_exact(
    gathered: Sequence[SourceParts],
    shares: Sequence[float],
    work_dir: Path,
    executor: Executor,
    *,
    group_documents: int = GROUP_DOCUMENTS,
    slot_documents: int = SLOT_DOCUMENTS,
) -> tuple[Fates, Mask]:
    """Decide which documents are trained on, held out, or copies.

    Args:
        gathered: Parts of each source, in the order of the mix.
        shares: The held_out_share of each source.
        work_dir: Folder of the build in progress.
        executor: Runs the tasks.
        group_documents: Documents whose hashes one task reads.
        slot_documents: Documents that one task compares, about.

    Returns:
        Fates, and whether another document has the same text as one that is held out or a copy,
        [documents] each, in the order of the mix.
    """
    parts = numbered_parts(gathered)
    hashes = [(part.bodies_path or part.hashes_path).name for part in parts]
    inputs = [identity_of(gathered), hashes, list(shares), group_documents, slot_documents]
    step = Step.begin(work_dir, "exact", inputs)
    marks = step.result()
    if marks is None:
        groups = list(group_parts(parts, group_documents))
        held_digests = _held_digests(groups, shares, executor)
        num_documents = document_ends(gathered)[-1]
        bits = slot_bits(num_documents, slot_documents)
        found = _compare(step, groups, held_digests, bits, executor)
        marks = _gather_marks(num_documents, found)
        step.finish(marks)
    is_copied = np.asarray(marks >= _COPIED)
    return marks & np.uint8(_COPIED - 1), is_copied


def _held_digests(
    groups: Sequence[tuple[NumberedPart, ...]], shares: Sequence[float], executor: Executor
) -> tuple[tuple[int, int], ...]:
    """Return the range of digests that each source holds out."""
    wanted = []
    for parts in groups:
        drawn = tuple(part for part in parts if 0 < shares[part.source] < 1)
        if drawn:
            wanted.append(_Group(drawn))
    lowest: dict[int, int] = {}
    highest: dict[int, int] = {}
    for _, extremes in executor.run(_find_extremes, wanted):
        for source, (low, high) in extremes.items():
            lowest[source] = min(lowest.get(source, low), low)
            highest[source] = max(highest.get(source, high), high)
    ranges = []
    for source, share in enumerate(shares):
        if share >= 1:
            ranges.append(_ALL_DIGESTS)
        elif source in lowest:
            ranges.append(held_out_digests(lowest[source], highest[source], share))
        else:
            ranges.append(_NO_DIGESTS)
    return tuple(ranges)


def _find_extremes(group: _Group) -> dict[int, tuple[int, int]]:
    """Return the smallest and the largest digest of each source in a group of parts."""
    found: dict[int, tuple[int, int]] = {}
    for part in group.parts:
        digests = part.digests()
        low = int(digests.min())
        high = int(digests.max())
        if part.source in found:
            low = min(low, found[part.source][0])
            high = max(high, found[part.source][1])
        found[part.source] = (low, high)
    return found


def _compare(
    step: Step,
    groups: Sequence[tuple[NumberedPart, ...]],
    held_digests: tuple[tuple[int, int], ...],
    bits: int,
    executor: Executor,
) -> list[Path]:
    """Let all equal hashes meet, and return the files of what was found."""
    folder = step.tasks_folder
    maps = []
    for number, parts in enumerate(groups):
        maps.append(_MapHashes(parts, held_digests, bits, _hashes_path(folder, number)))
    step.run(executor, _write_hashes, maps, "gather hashes")
    compares = []
    for slot in range(1 << bits):
        compares.append(_Compare(len(maps), bits, slot, folder / f"found-{slot:05d}.npy"))
    step.run(executor, _compare_slot, compares, "look for copies")
    return [task.output for task in compares]


def _hashes_path(folder: Path, number: int) -> Path:
    return folder / f"hashes-{number:05d}"


def _layout(bits: int) -> RecordLayout:
    return RecordLayout(num_slots=1 << bits, dtypes=_DTYPES)


def _write_hashes(task: _MapHashes) -> None:
    # copies: every map would keep a file open
    hashes: Hashes = np.concatenate([np.array(part.copy_hashes()) for part in task.parts])
    held = [_is_held(part, task.held_digests[part.source]) for part in task.parts]
    first = task.parts[0].first
    slots = leading_bits(hashes["high"], task.bits)
    order = np.argsort(slots, kind="stable")
    layout = _layout(task.bits)
    columns = (
        hashes["high"][order],
        hashes["low"][order],
        (order + first).astype(np.uint32),
        np.concatenate(held)[order],
    )
    ends = np.cumsum(np.bincount(slots, minlength=layout.num_slots))
    write_records(task.output, layout, ends, columns)


def _is_held(part: NumberedPart, held_digests: tuple[int, int]) -> Mask:
    """Return which documents of a part its own source holds out."""
    first, last = held_digests
    num_documents = part.stop - part.first
    if held_digests == _ALL_DIGESTS:
        return np.ones(num_documents, dtype=bool)
    if first > last:
        return np.zeros(num_documents, dtype=bool)
    digests = part.digests()
    return np.asarray((digests >= np.uint64(first)) & (digests <= np.uint64(last)))


def _compare_slot(task: _Compare) -> None:
    found = _found_without_copies(task)
    if found is None:
        found = _found_by_engine(task)
    with atomic_write(task.output) as file:
        np.save(file, found, allow_pickle=False)


def _found_without_copies(task: _Compare) -> npt.NDArray[np.void] | None:
    """Return what is found in a slot of few documents, or None where some may be copies.

    Documents that all differ keep their own fate: they are held out, or simply trained on.
    """
    batches = []
    num_documents = 0
    for columns in _slot_records(task):
        batches.append(columns)
        num_documents += len(columns["number"])
        if num_documents > _FEW_DOCUMENTS:
            return None
    high = np.concatenate([columns["high"] for columns in batches])
    if len(np.unique(high)) < num_documents:
        return None
    numbers = np.concatenate([columns["number"] for columns in batches])
    held = np.concatenate([columns["held"] for columns in batches])
    return _found(numbers[held == 1], np.uint8(Fate.HELD_OUT))


def _found_by_engine(task: _Compare) -> npt.NDArray[np.void]:
    """Return what is found in a slot of any size, copies among it."""
    found = [np.zeros(0, _FOUND)]
    with open_engine(task.output.parent) as engine:
        if engine.load("documents", _slot_records(task)):
            for columns in engine.query(_QUERY):
                found.append(_found(columns["number"], columns["mark"]))
    return np.concatenate(found)


def _found(numbers: npt.NDArray[Any], marks: npt.NDArray[Any] | np.uint8) -> npt.NDArray[np.void]:
    records = np.empty(len(numbers), _FOUND)
    records["number"] = numbers
    records["mark"] = marks
    return records


def _slot_records(task: _Compare) -> Iterator[Columns]:
    """Yield the records of a slot, file by file."""
    for number in range(task.num_maps):
        path = _hashes_path(task.output.parent, number)
        _, columns = read_slots(path, _layout(task.bits), task.slot, task.slot + 1)
        yield dict(zip(("high", "low", "number", "held"), columns, strict=True))


def _gather_marks(num_documents: int, files: Sequence[Path]) -> Fates:
    marks = np.full(num_documents, Fate.TRAIN, np.uint8)
    for path in files:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        marks[found["number"]] = found["mark"]
    return marks
