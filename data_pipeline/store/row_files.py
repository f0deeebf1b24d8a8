"""The packed rows of one split of a source, as files.

    row_offsets.npy, piece_document.npy, piece_start.npy, piece_pairs.npy    a `RowIndex`
    piece_loss.npy         its labels that bear loss, if the documents have loss masks
    row_tokens.npy         predicted tokens of each row, those that bear loss, int32
    row_slots.npy          slots of each row that hold a token of a document, int32, if the
                           documents have loss masks; without, they are its predicted tokens
    document_tokens.npy, document_bytes.npy    of the held-out documents, in ascending order

and in the folder of the source

    shard_documents.npy    number of documents in each shard, in the order of their names

Decisions
    Training reads the pieces of a row when it needs the row, by position: the arrays of a large
    build are larger than what a rank may hold.
    What is read whole by every rank has files of its own, so that nothing has to be computed, or
    gathered from all shards, when a run starts. Builds of earlier versions lack these files; then
    it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write
from data_pipeline.store.open_files import OpenFiles
from data_pipeline.store.packing import (
    ARRAY_NAMES,
    LOSS_NAME,
    Integers,
    RowIndex,
    RowPieces,
    load_array,
    load_integers,
)
from data_pipeline.store.shards import Shards

ROW_TOKENS_FILE = "row_tokens.npy"
ROW_SLOTS_FILE = "row_slots.npy"
DOCUMENT_TOKENS_FILE = "document_tokens.npy"
DOCUMENT_BYTES_FILE = "document_bytes.npy"
SHARD_DOCUMENTS_FILE = "shard_documents.npy"
LOSS_FILE = f"{LOSS_NAME}.npy"
DERIVED_FILES = (
    LOSS_FILE,
    ROW_TOKENS_FILE,
    ROW_SLOTS_FILE,
    DOCUMENT_TOKENS_FILE,
    DOCUMENT_BYTES_FILE,
    SHARD_DOCUMENTS_FILE,
)
"""Files that follow from the others: they are no part of what the rows of a source are."""

RowTokens = npt.NDArray[np.int32]

_BLOCK_PIECES = 1 << 20
"""RowPieces that are worked on at once."""
_BLOCK_ROWS = 1 << 18
_MOST_ROW_TOKENS = 2**31 - 1
_MAPPED_BYTES = 1 << 20
"""A smaller array is read: a memory map keeps a descriptor."""
_RANGE_DOCUMENTS = 1 << 24
"""Documents whose lengths are held at once while rows are checked: 128 MiB."""


def save_row_tokens(folder: Path) -> None:
    """Write the predicted tokens of the rows whose arrays lie in a folder, and their slots."""
    rows = RowFiles(folder, OpenFiles(4))
    save_array(folder / ROW_TOKENS_FILE, rows.count_row_tokens())
    if rows.has_loss:
        save_array(folder / ROW_SLOTS_FILE, rows.count_row_slots())


def save_piece_loss(folder: Path, shards: Shards) -> int:
    """Write how many labels of each piece bear loss, and return how many those of all pieces are.

    Args:
        folder: Folder with the other arrays of the rows.
        shards: The documents of the source, which have loss masks.
    """
    index = RowFiles(folder, OpenFiles(4)).load()
    counts = shards.count_learned(index.piece_document, index.piece_start, index.piece_pairs)
    save_array(folder / LOSS_FILE, counts)
    return int(counts.sum())


def save_array(path: Path, values: npt.NDArray[np.integer]) -> None:
    """Write whole numbers: int32 as they are, all others as int64."""
    with atomic_write(path) as file:
        dtype = "<i4" if values.dtype == np.int32 else "<i8"
        np.save(file, values.astype(dtype, copy=False), allow_pickle=False)


@dataclass(frozen=True, slots=True)
class _ArrayFile:
    """An array in a file, of which ranges are read."""

    path: str
    length: int
    position: int
    """Where the numbers begin."""

    @classmethod
    def open(cls, path: Path) -> _ArrayFile:
        """Read the header.

        Raises:
            DataError: the file is no array of whole numbers, or another size than its header says.
        """
        values = load_array(path)
        position = path.stat().st_size - 8 * len(values)  # nothing follows the numbers
        return cls(str(path), len(values), position)

    def read(self, files: OpenFiles, first: int, stop: int) -> Integers:
        """Return the numbers [first, stop)."""
        content = files.read(self.path, 8 * (stop - first), self.position + 8 * first)
        return np.frombuffer(content, "<i8")


class RowFiles:
    """The rows of one split of a source, read by row."""

    def __init__(self, folder: Path, files: OpenFiles) -> None:
        """Read the headers of the arrays.

        Args:
            folder: The split's folder in the build.
            files: What reads the arrays.

        Raises:
            DataError: an array is missing or damaged, or they do not fit each other.
        """
        self.folder = folder
        self._files = files
        arrays = {name: _ArrayFile.open(folder / f"{name}.npy") for name in ARRAY_NAMES}
        self._offsets = arrays["row_offsets"]
        self._document = arrays["piece_document"]
        self._start = arrays["piece_start"]
        self._pairs = arrays["piece_pairs"]
        self._learned = self._pairs
        """Labels of each piece that bear loss."""
        if (folder / LOSS_FILE).exists():
            self._learned = _ArrayFile.open(folder / LOSS_FILE)
        self.num_rows = self._offsets.length - 1
        """Number of rows."""
        self.num_pieces = self._document.length
        """Number of pieces of all rows."""
        if not self._document.length == self._start.length == self._pairs.length:
            raise self.misfit()
        if self._learned.length != self._pairs.length:
            raise self.misfit()
        if self.num_rows < 0:
            raise self.misfit()

    @property
    def has_loss(self) -> bool:
        """Whether the documents have loss masks."""
        return self._learned is not self._pairs

    def pieces(self, row: int) -> RowPieces:
        """Return the pieces of one row."""
        first, last = self._offsets.read(self._files, row, row + 2).tolist()
        if not 0 <= first < last <= self._document.length:
            raise self.misfit()
        return self.pieces_between(first, last)

    def pieces_between(self, first: int, last: int) -> RowPieces:
        """Return the pieces [first, last), counted through all rows."""
        return RowPieces(
            document=self._document.read(self._files, first, last),
            start=self._start.read(self._files, first, last),
            pairs=self._pairs.read(self._files, first, last),
        )

    def load(self) -> RowIndex:
        """Return all rows, as memory maps."""
        arrays = {name: load_array(self.folder / f"{name}.npy") for name in ARRAY_NAMES}
        if self.has_loss:
            arrays[LOSS_NAME] = load_array(self.folder / LOSS_FILE)
        return RowIndex(**arrays)

    def row_tokens(self) -> RowTokens:
        """Return the predicted tokens of each row, those that bear loss, [num_rows].

        It is a memory map, which the ranks of a node share, where the build has the array.

        Raises:
            DataError: the file does not fit the rows.
        """
        return self._of_rows(ROW_TOKENS_FILE, self.count_row_tokens)

    def row_slots(self) -> RowTokens:
        """Return the slots of each row that hold a token of a document, [num_rows].

        Raises:
            DataError: the file does not fit the rows.
        """
        if not self.has_loss:
            return self.row_tokens()
        return self._of_rows(ROW_SLOTS_FILE, self.count_row_slots)

    def _of_rows(self, name: str, count: Callable[[], RowTokens]) -> RowTokens:
        """Return the array of a file with a number for each row, or count it if there is none."""
        path = self.folder / name
        if not path.exists():
            return count()
        values = load_row_tokens(path)
        if len(values) != self.num_rows:
            raise self.misfit()
        return values

    def count_row_tokens(self) -> RowTokens:
        """Return the same as `row_tokens`, added up from all pieces.

        Raises:
            DataError: the arrays do not fit each other.
        """
        return self._row_sums(self._learned)

    def count_row_slots(self) -> RowTokens:
        """Return the slots of each row that hold a token of a document, [num_rows].

        Raises:
            DataError: the arrays do not fit each other.
        """
        return self._row_sums(self._pairs)

    def _row_sums(self, of_pieces: _ArrayFile) -> RowTokens:
        totals = np.zeros(self.num_rows, np.int32)
        for first in range(0, self.num_rows, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, self.num_rows)
            offsets = self._offsets.read(self._files, first, last + 1)
            rising = offsets[0] >= 0 and offsets[-1] <= of_pieces.length
            if not rising or (np.diff(offsets) <= 0).any():
                raise self.misfit()
            values = of_pieces.read(self._files, int(offsets[0]), int(offsets[-1]))
            sums = np.add.reduceat(values, offsets[:-1] - offsets[0])
            if sums.max() > _MOST_ROW_TOKENS:
                raise self.misfit()
            totals[first:last] = sums
        return totals

    def misfit(self) -> DataError:
        """Return the error of arrays that do not fit each other or the documents."""
        return DataError(
            f"{self.folder}: its row arrays do not fit the documents. "
            "Delete the build and build it again."
        )


def load_row_tokens(path: Path) -> RowTokens:
    """Return the predicted tokens of rows, as a memory map if they are many.

    Raises:
        DataError: the file is no array of 4-byte whole numbers.
    """
    values = load_integers(path, "int32")
    if values.nbytes < _MAPPED_BYTES:
        return np.array(values)
    return np.asarray(values)


def check_rows(rows: RowFiles, shards: Shards, seq_len: int) -> None:
    """Check that the rows fit each other, the documents and seq_len; all arrays are read.

    If they do, no row leaves its documents, and its tokens are those that bear loss in them. The
    memory is bounded: the lengths of a range of documents are compared with all pieces, then those
    of the next range.

    Raises:
        DataError: they do not.
    """
    index = rows.load()
    offsets = index.row_offsets
    if offsets[0] != 0 or offsets[-1] != len(index.piece_document):
        raise rows.misfit()
    for first in range(0, rows.num_rows, _BLOCK_ROWS):
        if (np.diff(offsets[first : first + _BLOCK_ROWS + 1]) <= 0).any():
            raise rows.misfit()
    _check_sizes(rows, index, shards.num_documents, seq_len)
    for first in range(0, shards.num_documents, _RANGE_DOCUMENTS):
        last = min(first + _RANGE_DOCUMENTS, shards.num_documents)
        _check_ends(rows, index, shards, first, last)
    _check_loss(rows, index, shards)
    if not np.array_equal(rows.row_tokens(), rows.count_row_tokens()):
        raise rows.misfit()
    if rows.has_loss and not np.array_equal(rows.row_slots(), rows.count_row_slots()):
        raise rows.misfit()


def _check_sizes(rows: RowFiles, index: RowIndex, num_documents: int, seq_len: int) -> None:
    """Check each piece by itself, and the sum of the pieces of each row."""
    for first in range(0, len(index.piece_document), _BLOCK_PIECES):
        block = slice(first, first + _BLOCK_PIECES)
        documents = index.piece_document[block]
        pairs = index.piece_pairs[block]
        if documents.min() < 0 or documents.max() >= num_documents:
            raise rows.misfit()
        if index.piece_start[block].min() < 0 or pairs.min() < 1 or pairs.max() > seq_len:
            raise rows.misfit()
    if rows.num_rows and rows.count_row_slots().max() > seq_len:
        raise rows.misfit()


def _check_ends(rows: RowFiles, index: RowIndex, shards: Shards, first: int, last: int) -> None:
    """Check that no piece of the documents [first, last) goes beyond its document."""
    lengths = shards.lengths(first, last)
    for begin in range(0, len(index.piece_document), _BLOCK_PIECES):
        block = slice(begin, begin + _BLOCK_PIECES)
        documents = index.piece_document[block]
        inside = (documents >= first) & (documents < last)
        ends = lengths[documents[inside] - first]
        starts = index.piece_start[block][inside]
        if (starts > ends).any():  # so the sum below cannot wrap around
            raise rows.misfit()
        if (starts + index.piece_pairs[block][inside] >= ends).any():
            raise rows.misfit()


def _check_loss(rows: RowFiles, index: RowIndex, shards: Shards) -> None:
    """Check how many labels of each piece bear loss, and that each row has one that does."""
    if not rows.num_rows:
        return
    if shards.has_loss != (index.piece_loss is not None):
        raise rows.misfit()
    if index.piece_loss is None:
        return
    counts = shards.count_learned(index.piece_document, index.piece_start, index.piece_pairs)
    if not np.array_equal(counts, index.piece_loss) or rows.count_row_tokens().min() < 1:
        raise rows.misfit()
