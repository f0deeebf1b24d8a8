"""Documents -> packed rows.

A document of n tokens (END_OF_TEXT included) has n - 1 pairs (input t[i], label t[i+1]) and takes n
- 1 slots of a row.  So every used slot has a label, no label belongs to another document, and
END_OF_TEXT is never an input.

    document lengths -> pieces of at most seq_len pairs -> rows (best fit) -> arrays

Decisions
    A document of more than seq_len pairs is cut into pieces of exactly seq_len pairs and a rest.
    Neighbouring pieces share one token, the label of the one and the input of the next, so no pair
    is lost.  Nothing else is ever cut. Best-fit decreasing: pieces from long to short, each into
    the fullest row that still has room (arXiv 2404.10830). The same lengths always give the same
    rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
BLOCK_DOCUMENTS = 1 << 20
"""Documents that are packed together; bounds the memory."""
ARRAY_NAMES = ("row_offsets", "piece_document", "piece_start", "piece_pairs")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Rows of one source; row r holds the pieces row_offsets[r] to row_offsets[r + 1]."""

    row_offsets: Integers
    """Pieces before each row, num_rows + 1 of them."""
    piece_document: Integers
    """Document number of each piece."""
    piece_start: Integers
    """Tokens of the document before the piece."""
    piece_pairs: Integers
    """Pairs, which are slots, of each piece."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.row_offsets) - 1

    def row_tokens(self) -> Integers:
        """Predicted tokens of each row."""
        totals = np.concatenate([[0], np.cumsum(self.piece_pairs)])
        return np.diff(totals[self.row_offsets])


def pack(
    documents: Integers, document_tokens: Integers, seq_len: int, method: str = "best_fit"
) -> PackedRows:
    """Pack documents into rows.

    Args:
        documents: document numbers; they only label the pieces.
        document_tokens: tokens of each of them, END_OF_TEXT included, at least 2.
        seq_len: slots in a row.
        method: `best_fit`, or `concatenate`: documents one after the other, cut wherever a row
            ends.
    """
    assert len(document_tokens) == 0 or document_tokens.min() >= 2
    if method == "concatenate":
        return _concatenate(documents, document_tokens - 1, seq_len)
    blocks = [
        _pack_block(documents[some], document_tokens[some], seq_len)
        for first in range(0, max(len(documents), 1), BLOCK_DOCUMENTS)
        for some in [slice(first, first + BLOCK_DOCUMENTS)]
    ]
    if len(blocks) == 1:
        return blocks[0]
    before = np.cumsum([0, *(len(block.piece_document) for block in blocks)])
    offsets = [
        block.row_offsets[1:] + first for block, first in zip(blocks, before[:-1], strict=True)
    ]
    names = ("piece_document", "piece_start", "piece_pairs")
    return PackedRows(
        row_offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in names},
    )


def _pack_block(documents: Integers, document_tokens: Integers, seq_len: int) -> PackedRows:
    pairs = document_tokens - 1
    num_full, rest = np.divmod(pairs, seq_len)
    full = np.repeat(np.arange(len(pairs)), num_full)
    full_start = (
        np.arange(len(full)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    ) * seq_len
    partial = np.flatnonzero(rest)
    partial = partial[np.argsort(-rest[partial], kind="stable")]
    rows = _best_fit(rest[partial].tolist(), seq_len)
    order = partial[[piece for row in rows for piece in row]] if rows else partial
    row_sizes = np.concatenate(
        [np.ones(len(full), np.int64), np.array([len(row) for row in rows], np.int64)]
    )
    return PackedRows(
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(row_sizes)]),
        piece_document=documents[np.concatenate([full, order])],
        piece_start=np.concatenate([full_start, num_full[order] * seq_len]).astype(np.int64),
        piece_pairs=np.concatenate([np.full(len(full), seq_len, np.int64), rest[order]]),
    )


def _concatenate(documents: Integers, pairs: Integers, seq_len: int) -> PackedRows:
    """Pieces end where their document or a row does."""
    ends = np.cumsum(pairs)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique(
        np.concatenate([ends, np.arange(seq_len, total, seq_len), np.zeros(0, np.int64)])
    )
    begins = np.concatenate([np.zeros(min(len(cuts), 1), np.int64), cuts[:-1]])
    owner = np.searchsorted(ends, begins, side="right")
    borders = np.append(np.arange(seq_len, total, seq_len), total)[: len(cuts)]
    row_ends = np.searchsorted(cuts, borders) + 1
    return PackedRows(
        row_offsets=np.concatenate([np.zeros(1, np.int64), row_ends]),
        piece_document=documents[owner],
        piece_start=begins - (ends - pairs)[owner],
        piece_pairs=cuts - begins,
    )


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each size into the fullest bin that still has room; returns the indices in each bin."""
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when a bin with room r exists: the fullest fit is one shift and one lowest set bit
    for index, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        left = room - size
        if left:
            by_room[left].append(number)
            rooms |= 1 << left
    return bins
