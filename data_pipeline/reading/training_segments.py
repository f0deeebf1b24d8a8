"""What a source of an earlier build trains on, in the order of documents.

    row arrays of all stages -> lowest and highest document of each block of pieces
    a range of documents -> pieces in the blocks that may hold some -> segments in their order

Decisions
    A large build has hundreds of millions of pieces, and every worker reads some. So nothing is
    held of all of them but a few numbers for each block and range: a range of documents is sorted
    when it is asked for, and the latest one is kept.
    Builds are packed in the order of documents, so the pieces of a range are in few blocks. Others
    would be read as well, but every block for every range.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.store.open_files import OpenFiles
from data_pipeline.store.packing import (
    Integers,
    RowIndex,
    RowPieces,
    Segments,
    join_segments,
    segments_of,
)
from data_pipeline.store.row_files import RowFiles
from data_pipeline.store.shards import Shards

BLOCK_PIECES = 1 << 18
"""Pieces that are read at once: 6 MiB."""
RANGE_PIECES = 1 << 18
"""Pieces of a range of documents, about; some 100 bytes each while they are sorted."""
_OPEN_FILES = 4


class TrainingSegments:
    """The documents, or stretches of them, that a source of an earlier build trains on."""

    def __init__(self, folders: Sequence[Path], shards: Shards) -> None:
        """Read the headers of the row arrays.

        Args:
            folders: Folder of the rows of each stage.
            shards: The documents of the source.

        Raises:
            DataError: an array is missing or damaged.
        """
        self._shards = shards
        files = OpenFiles(_OPEN_FILES)
        self._stages = [_Pieces(RowFiles(folder, files)) for folder in folders]
        num_pieces = sum(stage.num_pieces for stage in self._stages)
        num_ranges = max(num_pieces // RANGE_PIECES, 1)
        self._range_documents = -(-shards.num_documents // num_ranges)
        self._latest: tuple[int, Segments] | None = None

    def __len__(self) -> int:
        """Return the number of segments.

        Raises:
            DataError: as `between`.
        """
        return self._ends[-1]

    def between(self, start: int, stop: int) -> Iterator[Segments]:
        """Yield the segments [start, stop), those of one range of documents at a time.

        Raises:
            DataError: they do not fit the documents.
        """
        number = bisect.bisect_right(self._ends, start)
        while start < stop and number < len(self._ends):
            first = self._ends[number - 1] if number else 0
            last = min(self._ends[number], stop)
            if start < last:
                yield self._checked_range(number).part(start - first, last - first)
                start = last
            number += 1

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Number of segments up to the end of each range."""
        for stage in self._stages:
            stage.check_documents(self._shards.num_documents)
        ends = []
        total = 0
        for first in range(0, self._shards.num_documents, self._range_documents):
            total += len(self._range(first, None))
            ends.append(total)
        return ends

    def _checked_range(self, number: int) -> Segments:
        """Return the segments of a range, which do not leave their documents."""
        if self._latest is None or self._latest[0] != number:
            first = number * self._range_documents
            last = min(first + self._range_documents, self._shards.num_documents)
            self._latest = (number, self._range(first, self._shards.lengths(first, last)))
        return self._latest[1]

    def _range(self, first: int, lengths: Integers | None) -> Segments:
        """Return the segments of the documents from `first` to the end of the range.

        Args:
            first: Number of the first document.
            lengths: Tokens of each document of the range, to check the segments; None for no check.
        """
        parts = []
        for stage in self._stages:
            segments = segments_of(stage.of(first, first + self._range_documents))
            if lengths is not None and len(segments):
                stops = segments.start + segments.tokens
                is_beyond = stops > lengths[segments.document - first]
                if segments.start.min() < 0 or is_beyond.any():
                    raise stage.rows.misfit()
            parts.append(segments)
        return join_segments(parts)


class _Pieces:
    """The pieces of the rows of one stage, read block by block."""

    def __init__(self, rows: RowFiles) -> None:
        self.rows = rows
        self.num_pieces = rows.num_pieces

    @functools.cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Lowest and highest document of each block of pieces."""
        bounds = []
        for first in range(0, self.num_pieces, BLOCK_PIECES):
            documents = self._block(first).document
            bounds.append((int(documents.min()), int(documents.max())))
        return bounds

    def check_documents(self, num_documents: int) -> None:
        """Refuse pieces of documents that are not there.

        Raises:
            DataError: there are some.
        """
        for lowest, highest in self._bounds:
            if lowest < 0 or highest >= num_documents:
                raise DataError(
                    f"{self.rows.folder}: names document {lowest if lowest < 0 else highest}, but "
                    f"the source has {num_documents}. The build is damaged: delete it and build it "
                    "again."
                )

    def of(self, first: int, last: int) -> RowIndex:
        """Return the pieces of the documents [first, last), without the rows that they are in."""
        none = np.zeros(0, np.int64)
        document = [none]
        start = [none]
        pairs = [none]
        for number, (lowest, highest) in enumerate(self._bounds):
            if lowest >= last or highest < first:
                continue
            block = self._block(number * BLOCK_PIECES)
            chosen = (block.document >= first) & (block.document < last)
            document.append(block.document[chosen])
            start.append(block.start[chosen])
            pairs.append(block.pairs[chosen])
        return RowIndex(
            row_offsets=none,
            piece_document=np.concatenate(document),
            piece_start=np.concatenate(start),
            piece_pairs=np.concatenate(pairs),
        )

    def _block(self, first: int) -> RowPieces:
        return self.rows.pieces_between(first, min(first + BLOCK_PIECES, self.num_pieces))
