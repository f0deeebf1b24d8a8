"""Segments of a source -> the files of its rows, packed block by block.

    segments -> blocks -> rows of each block, in a file       (task per block)
                      -> the files of one block after the other

Decisions
    The rows are those of `store.packing`. Blocks are packed by tasks, and their rows are joined as
    a stream, so beside the segments (24 bytes each) nothing grows with the source.
    A source of one block is packed where it is: its arrays are small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.engine.executor import Executor
from data_pipeline.fates.steps import Step
from data_pipeline.store.array_writer import ArrayWriter
from data_pipeline.store.files import atomic_write, make_folder
from data_pipeline.store.packing import (
    ARRAY_NAMES,
    BLOCK_DOCUMENTS,
    Integers,
    RowIndex,
    Segments,
    close_last_row,
    pack_block,
)

_SEGMENTS_FILE = "segments"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSplit:
    """How much the rows of one split of a source hold."""

    num_rows: int
    num_pieces: int
    num_pairs: int
    """Predicted tokens."""

    def to_array(self) -> Integers:
        """Return the counts as an array."""
        return np.array([self.num_rows, self.num_pieces, self.num_pairs], np.int64)

    @classmethod
    def from_array(cls, counts: Integers) -> PackedSplit:
        """Return what `to_array` made an array of."""
        num_rows, num_pieces, num_pairs = counts.tolist()
        return cls(num_rows=num_rows, num_pieces=num_pieces, num_pairs=num_pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Segments that are packed together."""

    first: int
    last: int
    """One past the number of the last segment."""
    num_segments: int
    """Segments of the whole split."""
    pairs_before: int
    """Pairs of all segments before the block."""
    seq_len: int
    method: str
    output: Path


def pack_split(
    directory: Path,
    segments: Segments,
    seq_len: int,
    method: str,
    work_dir: Path,
    executor: Executor,
    block_segments: int = BLOCK_DOCUMENTS,
) -> PackedSplit:
    """Pack segments and write the arrays of their rows.

    Args:
        directory: Folder of the split in the build.
        segments: What to pack.
        seq_len: Slots of a row.
        method: As for `pack`.
        work_dir: Folder of the build in progress.
        executor: Runs the tasks.
        block_segments: Segments that are packed together.
    """
    make_folder(directory)
    if len(segments) <= block_segments:
        rows = close_last_row(pack_block(segments, seq_len, method, 0))
        packed = _count(rows)
        _write_arrays(directory, [rows])
        return packed
    columns = (segments.document, segments.start, segments.tokens)
    digest = xxhash.xxh3_128()
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    name = f"pack-{directory.parent.name}-{directory.name}"
    inputs = [str(directory), digest.hexdigest(), seq_len, method, block_segments]
    step = Step.begin(work_dir, name, inputs)
    counts = step.result()
    if counts is None or not all((directory / f"{name}.npy").exists() for name in ARRAY_NAMES):
        with atomic_write(step.tasks_folder / _SEGMENTS_FILE) as file:
            for column in columns:
                file.write(np.ascontiguousarray(column, "<i8").data)
        blocks = _blocks(step, segments, seq_len, method, block_segments)
        step.run(executor, _pack_one, blocks, "pack rows")
        outputs = [block.output for block in blocks]
        packed = _count_blocks(outputs)
        _write_arrays(directory, map(_read_block, outputs))
        counts = packed.to_array()
        step.finish(counts)
    return PackedSplit.from_array(counts)


def _blocks(
    step: Step, segments: Segments, seq_len: int, method: str, block_segments: int
) -> list[_Block]:
    blocks: list[_Block] = []
    pairs_before = 0
    for first in range(0, len(segments), block_segments):
        last = min(first + block_segments, len(segments))
        blocks.append(
            _Block(
                first=first,
                last=last,
                num_segments=len(segments),
                pairs_before=pairs_before,
                seq_len=seq_len,
                method=method,
                output=step.tasks_folder / f"rows-{len(blocks):05d}",
            )
        )
        pairs_before += int(segments.tokens[first:last].sum()) - (last - first)
    return blocks


def _pack_one(block: _Block) -> None:
    columns = []
    with block.output.with_name(_SEGMENTS_FILE).open("rb") as file:
        for number in range(3):
            file.seek(8 * (number * block.num_segments + block.first))
            columns.append(np.fromfile(file, "<i8", block.last - block.first))
    document, start, tokens = columns
    segments = Segments(document=document, start=start, tokens=tokens)
    rows = pack_block(segments, block.seq_len, block.method, block.pairs_before)
    if block.last == block.num_segments:
        rows = close_last_row(rows)
    with atomic_write(block.output) as output:
        np.save(output, _count(rows).to_array(), allow_pickle=False)
        for name in ARRAY_NAMES:
            np.save(output, getattr(rows, name), allow_pickle=False)


def _count(rows: RowIndex) -> PackedSplit:
    return PackedSplit(
        num_rows=rows.num_rows,
        num_pieces=len(rows.piece_pairs),
        num_pairs=int(rows.piece_pairs.sum()),
    )


def _read_block(path: Path) -> RowIndex:
    """Return the rows that `_pack_one` wrote."""
    arrays = {}
    with path.open("rb") as file:
        np.load(file, allow_pickle=False)
        for name in ARRAY_NAMES:
            arrays[name] = np.load(file, allow_pickle=False)
    return RowIndex(**arrays)


def _count_blocks(paths: Sequence[Path]) -> PackedSplit:
    """Return how much the rows of all blocks hold."""
    total = np.zeros(3, np.int64)
    for path in paths:
        with path.open("rb") as file:
            total += np.load(file, allow_pickle=False)
    return PackedSplit.from_array(total)


def _write_arrays(directory: Path, blocks: Iterable[RowIndex]) -> None:
    """Write the rows of all blocks, one after the other.

    Args:
        directory: Folder of the split in the build.
        blocks: Rows of each block, in order.
    """
    with contextlib.ExitStack() as stack:
        writers: dict[str, ArrayWriter] = {}
        for name in ARRAY_NAMES:
            file = stack.enter_context(atomic_write(directory / f"{name}.npy"))
            writers[name] = ArrayWriter(file, "<i8")
        writers["row_offsets"].append(np.zeros(1, "<i8"))
        num_pieces_before = 0
        for block in blocks:
            writers["row_offsets"].append(block.row_offsets[1:] + num_pieces_before)
            for name in ARRAY_NAMES[1:]:
                writers[name].append(getattr(block, name))
            num_pieces_before += len(block.piece_pairs)
        for writer in writers.values():
            writer.finish()
