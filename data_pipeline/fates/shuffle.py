"""Records on their way from the tasks that read parts to the tasks that compare documents.

    documents of some parts -> records -> one file, sorted by slot
    the same slots of all files -> one task

Decisions
    A slot is a stretch of the values of a hash, so that records which must meet have one slot.
    Each task that reads writes one file, and each task that compares reads one stretch of every
    file, one file after the other. Neither the number of files nor that of open files grows with
    the number of slots times the number of parts.
    A file holds one column after the other, so that a column is read as it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write
from data_pipeline.store.packing import Integers

Column = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordLayout:
    """What all files of one shuffle have in common."""

    num_slots: int
    """Slots of a file."""
    dtypes: tuple[str, ...]
    """Type of each column."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, over all columns."""
        return sum(np.dtype(dtype).itemsize for dtype in self.dtypes)


def slot_bits(num_records: int, slot_records: int) -> int:
    """Return how many bits of a hash name its slot, if a slot has at most about `slot_records`."""
    return (max(num_records - 1, 0) // slot_records).bit_length()


def leading_bits(hashes: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.uint16]:
    """Return the leading `bits` of 64-bit hashes, [documents]; at most 16."""
    assert 0 <= bits <= 16
    if not bits:
        return np.zeros(len(hashes), np.uint16)
    return (hashes >> np.uint64(64 - bits)).astype(np.uint16)


def write_records(
    path: Path, layout: RecordLayout, ends: Integers, columns: Sequence[Column]
) -> None:
    """Write records that are sorted by slot.

    Args:
        path: The file, which appears when it is complete.
        layout: Slots and types.
        ends: Number of records up to the end of each slot, [num_slots].
        columns: The columns, [records] each.
    """
    assert len(ends) == layout.num_slots
    with atomic_write(path) as file:
        file.write(ends.astype("<i8").tobytes())
        for dtype, values in zip(layout.dtypes, columns, strict=True):
            assert len(values) == ends[-1]
            file.write(np.ascontiguousarray(values, dtype).data)


def read_slots(
    path: Path, layout: RecordLayout, first: int, last: int
) -> tuple[Integers, tuple[Column, ...]]:
    """Return the records of the slots [first, last) of a file.

    Returns:
        Number of records up to the beginning of each slot and the end of the last one,
        [last - first + 1], and the columns, [records] each.

    Raises:
        DataError: the file is not what `write_records` wrote.
    """
    header_bytes = 8 * layout.num_slots
    with path.open("rb") as file:
        ends = np.fromfile(file, "<i8", layout.num_slots)
        num_records = int(ends[-1]) if len(ends) == layout.num_slots else -1
        if path.stat().st_size != header_bytes + num_records * layout.record_bytes:
            raise DataError(
                f"{path}: not what the build wrote. Delete the folder, which holds the work of an "
                "unfinished build, and build again."
            )
        borders = np.concatenate([np.zeros(1, np.int64), ends])[first : last + 1]
        begin = int(borders[0])
        count = int(borders[-1]) - begin
        columns = []
        column_at = header_bytes
        for dtype in layout.dtypes:
            item_bytes = np.dtype(dtype).itemsize
            file.seek(column_at + begin * item_bytes)
            columns.append(np.fromfile(file, dtype, count))
            column_at += num_records * item_bytes
    return borders - begin, tuple(columns)
