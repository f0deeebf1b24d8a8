"""Documents -> packed rows.

A document of n tokens (END_OF_TEXT included) has n - 1 pairs (input t[i], label t[i+1]) and takes
n - 1 slots of a row. So every used slot has a label, no label belongs to another document, and
END_OF_TEXT is never an input.

    segments -> pieces of at most seq_len pairs -> rows (best fit) -> arrays

Decisions
    What is packed are segments: whole documents, or what is left of a document that lost a stretch.
    A segment that stops before its document does gets no END_OF_TEXT; nor does a cut at seq_len.
    A segment of more than seq_len pairs is cut into pieces of exactly seq_len pairs and a rest.
    Neighboring pieces share one token, the last label of one and the first input of the next, so no
    pair is lost. Nothing else is ever cut.
    With loss masks not every label bears loss. How many of a piece do is counted afterwards: rows
    are filled by slots, and the tokens of a row are the labels that bear loss.
    Rows are filled by best-fit decreasing: pieces from long to short, each into the fullest row
    that still has room (arXiv 2404.10830). The same lengths always give the same rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataError

Integers = npt.NDArray[np.int64]
BLOCK_DOCUMENTS = 1 << 20
"""Segments that are packed together, which bounds the memory."""
ARRAY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError, OverflowError)
"""What NumPy raises on a file that is no array, or one with a damaged header."""
ARRAY_NAMES = ("row_offsets", "piece_document", "piece_start", "piece_pairs")
"""Fields of `RowIndex`, which are also the names of its files."""
LOSS_NAME = "piece_loss"
"""Field of `RowIndex`, and name of its file, where the documents have loss masks."""
CLUSTERS_FILE = "clusters.npy"
"""For each held-out document the position of the first one of its cluster; absent if the source
has no `cluster_by`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Stretches of documents, in the order in which they are packed."""

    document: Integers
    """Number of the document of each segment, [num_segments]."""
    start: Integers
    """Tokens of the document before each segment, [num_segments]."""
    tokens: Integers
    """Tokens of each segment, at least 2; END_OF_TEXT included if the document ends there,
    [num_segments].
    """

    @classmethod
    def whole(cls, documents: Integers, document_tokens: Integers) -> Segments:
        """Return one segment for each document, all of it."""
        return cls(document=documents, start=np.zeros_like(documents), tokens=document_tokens)

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.document)

    def part(self, first: int, last: int) -> Segments:
        """Return the segments [first, last)."""
        chosen = slice(first, last)
        return Segments(
            document=self.document[chosen], start=self.start[chosen], tokens=self.tokens[chosen]
        )

    def chosen(self, mask: npt.NDArray[np.bool_]) -> Segments:
        """Return the segments where a mask is True."""
        return Segments(
            document=self.document[mask], start=self.start[mask], tokens=self.tokens[mask]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPieces:
    """The pieces of documents that make up one row."""

    document: Integers
    """Number of the document that each piece belongs to."""
    start: Integers
    """Tokens of the document before each piece."""
    pairs: Integers
    """Pairs, and so slots, of each piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIndex:
    """Which pieces of documents make up each row of a source.

    Row r holds the pieces from row_offsets[r] up to row_offsets[r + 1].
    """

    row_offsets: Integers
    """Number of pieces before each row, [num_rows + 1]."""
    piece_document: Integers
    """Number of the document that each piece belongs to, [num_pieces]."""
    piece_start: Integers
    """Tokens of the document before each piece, [num_pieces]."""
    piece_pairs: Integers
    """Pairs, and so slots, of each piece, [num_pieces]."""
    piece_loss: Integers | None = None
    """Labels of each piece that bear loss, [num_pieces]; None if all do, or before they are
    counted.
    """

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    def pieces(self, row: int) -> RowPieces:
        """Return the pieces of one row."""
        first, last = self.row_offsets[row : row + 2].tolist()
        return RowPieces(
            document=self.piece_document[first:last],
            start=self.piece_start[first:last],
            pairs=self.piece_pairs[first:last],
        )

    def row_tokens(self) -> Integers:
        """Return the predicted tokens of each row, those that bear loss, [num_rows]."""
        if self.piece_loss is None:
            return self.row_slots()
        return self._row_sums(self.piece_loss)

    def row_slots(self) -> Integers:
        """Return the slots of each row that hold a token of a document, [num_rows]."""
        return self._row_sums(self.piece_pairs)

    def _row_sums(self, of_pieces: Integers) -> Integers:
        totals = np.concatenate([[0], np.cumsum(of_pieces)])
        return np.diff(totals[self.row_offsets])


def pack(segments: Segments, seq_len: int, method: str = "best_fit") -> RowIndex:
    """Pack segments into rows.

    Args:
        segments: What to pack; their document numbers only label the pieces.
        seq_len: Slots of a row.
        method: `best_fit`, or `concatenate`: segments one after the other, cut wherever a row ends.
    """
    blocks = []
    pairs_before = 0
    for first in range(0, max(len(segments), 1), BLOCK_DOCUMENTS):
        block = segments.part(first, first + BLOCK_DOCUMENTS)
        blocks.append(pack_block(block, seq_len, method, pairs_before))
        pairs_before += int(block.tokens.sum()) - len(block)
    return close_last_row(_join(blocks))


def pack_block(segments: Segments, seq_len: int, method: str, pairs_before: int) -> RowIndex:
    """Pack the segments of one block.

    Args:
        segments: What to pack.
        seq_len: Slots of a row.
        method: As for `pack`. `concatenate` goes on in the row that the block before left open, and
            lists only the rows that end in this block.
        pairs_before: Pairs of all blocks before this one.
    """
    assert len(segments) == 0 or segments.tokens.min() >= 2
    if method == "concatenate":
        return _concatenate(segments, seq_len, pairs_before % seq_len)
    return _fit_best(segments, seq_len)


def close_last_row(rows: RowIndex) -> RowIndex:
    """End the last row where the last piece ends."""
    num_pieces = len(rows.piece_pairs)
    if rows.row_offsets[-1] == num_pieces:
        return rows
    return dataclasses.replace(rows, row_offsets=np.append(rows.row_offsets, num_pieces))


def segments_of(rows: RowIndex) -> Segments:
    """Return the segments that rows were packed from, in the order of documents and of starts.

    Two pieces of one segment share a token, so a piece that begins where another one's pairs end
    continues it; between two segments of a document at least one token is in neither.
    """
    order = np.lexsort((rows.piece_start, rows.piece_document))
    documents = rows.piece_document[order]
    starts = rows.piece_start[order]
    ends = starts + rows.piece_pairs[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (documents[1:] != documents[:-1]) | (starts[1:] != ends[:-1])
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], len(order))[: len(first)] - 1
    return Segments(
        document=documents[first], start=starts[first], tokens=ends[last] - starts[first] + 1
    )


def join_segments(parts: Sequence[Segments]) -> Segments:
    """Return the segments of several lists in the order of documents and of starts."""
    if len(parts) == 1:
        return parts[0]
    document = np.concatenate([part.document for part in parts])
    start = np.concatenate([part.start for part in parts])
    tokens = np.concatenate([part.tokens for part in parts])
    order = np.lexsort((start, document))
    return Segments(document=document[order], start=start[order], tokens=tokens[order])


def _join(blocks: Sequence[RowIndex]) -> RowIndex:
    """Put the rows of several blocks one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    offsets = [np.zeros(1, np.int64)]
    num_pieces_before = 0
    for block in blocks:
        offsets.append(block.row_offsets[1:] + num_pieces_before)
        num_pieces_before += len(block.piece_pairs)
    return RowIndex(
        row_offsets=np.concatenate(offsets),
        piece_document=np.concatenate([block.piece_document for block in blocks]),
        piece_start=np.concatenate([block.piece_start for block in blocks]),
        piece_pairs=np.concatenate([block.piece_pairs for block in blocks]),
    )


def _fit_best(segments: Segments, seq_len: int) -> RowIndex:
    """Pack segments by best fit: first the rows that a single piece fills, then the others."""
    pairs = segments.tokens - 1
    num_full, rest = np.divmod(pairs, seq_len)
    owner_of_full = np.repeat(np.arange(len(pairs)), num_full)
    num_full_before = np.repeat(np.cumsum(num_full) - num_full, num_full)
    start_of_full = (np.arange(len(owner_of_full)) - num_full_before) * seq_len
    start_of_full += segments.start[owner_of_full]

    owner_of_rest = np.flatnonzero(rest)
    by_size = np.argsort(-rest[owner_of_rest], kind="stable")
    owner_of_rest = owner_of_rest[by_size]
    rows = _best_fit(rest[owner_of_rest].tolist(), seq_len)
    if rows:
        owner_of_rest = owner_of_rest[list(itertools.chain.from_iterable(rows))]
    start_of_rest = segments.start[owner_of_rest] + num_full[owner_of_rest] * seq_len

    pieces_in_full_rows = np.ones(len(owner_of_full), np.int64)
    pieces_in_other_rows = np.array([len(row) for row in rows], np.int64)
    row_ends = np.cumsum(np.concatenate([pieces_in_full_rows, pieces_in_other_rows]))
    full_pairs = np.full(len(owner_of_full), seq_len, np.int64)
    return RowIndex(
        row_offsets=np.concatenate([np.zeros(1, np.int64), row_ends]),
        piece_document=segments.document[np.concatenate([owner_of_full, owner_of_rest])],
        piece_start=np.concatenate([start_of_full, start_of_rest]).astype(np.int64),
        piece_pairs=np.concatenate([full_pairs, rest[owner_of_rest]]),
    )


def _concatenate(segments: Segments, seq_len: int, taken: int) -> RowIndex:
    """Lay segments end to end; a piece ends where its segment or its row does.

    Args:
        segments: What to pack.
        seq_len: Slots of a row.
        taken: Slots of the first row that other segments have.
    """
    pairs = segments.tokens - 1
    segment_ends = np.cumsum(pairs) + taken
    total = int(segment_ends[-1]) if len(segment_ends) else taken
    row_borders = np.arange(seq_len, total, seq_len)
    piece_ends = np.unique(np.concatenate([segment_ends, row_borders]).astype(np.int64))
    first_start = np.full(min(len(piece_ends), 1), taken, np.int64)
    piece_starts = np.concatenate([first_start, piece_ends[:-1]])
    owner = np.searchsorted(segment_ends, piece_starts, side="right")
    pieces_until_row_end = np.flatnonzero(piece_ends % seq_len == 0) + 1
    return RowIndex(
        row_offsets=np.concatenate([np.zeros(1, np.int64), pieces_until_row_end]),
        piece_document=segments.document[owner],
        piece_start=segments.start[owner] + piece_starts - (segment_ends - pairs)[owner],
        piece_pairs=piece_ends - piece_starts,
    )


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each size into the fullest bin that still has room; return the indices in each bin."""
    bins: list[list[int]] = []
    bins_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while a bin with room r exists, so the fullest bin that fits is found with one
    # shift and the lowest set bit.
    rooms = 0
    for index, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            room = size + lowest_bit
            number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                rooms ^= 1 << room
        else:
            room = capacity
            number = len(bins)
            bins.append([])
        bins[number].append(index)
        room_left = room - size
        if room_left:
            bins_by_room[room_left].append(number)
            rooms |= 1 << room_left
    return bins


def why_no_array(error: Exception) -> str:
    """Return why NumPy could not read a file, without its advice to read it unsafely."""
    return "it is no array of NumPy" if "pickle" in str(error) else str(error)


def load_array(path: Path) -> Integers:
    """Return one array of a `RowIndex`, as a memory map.

    Raises:
        DataError: the file is no array of whole numbers.
    """
    return np.asarray(load_integers(path, "int64"))


def load_integers(path: Path, dtype: str) -> npt.NDArray[Any]:
    """Return an array of a build, as a memory map.

    Args:
        path: A file that NumPy wrote.
        dtype: Name of the type that its numbers must have.

    Raises:
        DataError: it holds something else.
    """
    try:
        values: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise DataError(
            f"{path}: not a readable array ({why_no_array(error)}). Delete the build and build it "
            "again."
        ) from error
    if values.dtype != np.dtype(dtype).newbyteorder("<") or values.ndim != 1:
        raise DataError(
            f"{path}: holds {values.ndim}-d {values.dtype}, must be 1-d {dtype}. Build it again."
        )
    return values
