"""The footer of a Parquet file: its size, and where the columns of its row groups lie.

    file -> length of its footer -> bytes -> row groups -> columns

Decisions
    pyarrow shows columns as well, but does not translate what its C++ throws at a damaged one
    (ColumnChunk in its libparquet.pxd has no `except +`), so that one wrong byte aborts the
    process. So nothing here asks a row group of pyarrow's metadata for a column. To ask for its
    rows and bytes is safe: they are numbers that were read when the file was opened. So is the
    reading of rows.
    The lists in a column are named here so that a list of another type is refused, which pyarrow
    would read as if it were of the right one.

Source: the Parquet format, parquet.thrift (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_pipeline.store.thrift import BINARY, I32, I64, STRUCT, ListOf, Struct, parse_struct

MAX_FOOTER_BYTES = 16 * 2**20
"""Bytes of the longest footer that is read; pyarrow makes some 20 times as many of it."""
_MAGIC = b"PAR1"
_END_BYTES = 8


class ColumnChunk(NamedTuple):
    """Where a column of a row group lies in the file, as the writer claims."""

    codec: int
    """As in the enumeration CompressionCodec."""
    start: int
    """Position of the first page."""
    stop: int
    """Position behind the last page."""


Columns = Sequence[ColumnChunk | None]
"""One for each leaf column of a row group; None for one that is encrypted."""


def check_footer(path: Path) -> None:
    """Refuse a Parquet file whose footer is too long, before it is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no footer, or one that is too long; the message says so.
    """
    with path.open("rb") as file:
        _footer_bounds(file)


def read_columns(path: Path) -> Sequence[Columns]:
    """Return the columns of each row group.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no footer, or one that is damaged; the message says so.
    """
    with path.open("rb") as file:
        start, length = _footer_bounds(file)
        file.seek(start)
        return _parse_footer(file.read(length))


def _footer_bounds(file: IO[bytes]) -> tuple[int, int]:
    """Return (position of the footer, bytes of it), or raise as `check_footer` does."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END_BYTES, 0))
    end = file.read(_END_BYTES)
    if len(end) < _END_BYTES or end[4:] != _MAGIC:
        raise ValueError("it does not end as Parquet does, so it is cut off")
    length = int.from_bytes(end[:4], "little")
    if length > size - _END_BYTES:
        raise ValueError(f"it is {size:,} bytes long and claims a footer of {length:,}")
    if length > MAX_FOOTER_BYTES:
        raise ValueError(
            f"its footer has {length:,} bytes, at most {MAX_FOOTER_BYTES:,} are read. It has too "
            "many row groups, columns or statistics for a file of texts"
        )
    return size - _END_BYTES - length, length


@functools.lru_cache(maxsize=2)
def _parse_footer(data: bytes) -> Sequence[Columns]:
    """Return the columns of each row group; those of a file in many units are parsed once."""
    try:
        columns: Sequence[Columns] = parse_struct(data, 0, _FILE)[0]
    except IndexError:
        raise ValueError("its footer ends within a structure") from None
    return columns


def _chunk(found: dict[int, Any]) -> ColumnChunk:
    start = found[9]
    dictionary = found.get(11)
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    return ColumnChunk(codec=found[4], start=start, stop=start + found[7])


_HISTOGRAMS = Struct(
    name="the histograms of a column", fields={2: ListOf(items=I64), 3: ListOf(items=I64)}
)
_GEOMETRY = Struct(name="the geometry of a column", fields={2: ListOf(items=I32)})
_CHUNK = Struct(
    name="the metadata of a column",
    fields={
        2: ListOf(items=I32),  # encodings
        3: ListOf(items=BINARY),  # path_in_schema
        4: I32,  # codec
        7: I64,  # total_compressed_size
        8: ListOf(items=STRUCT),  # key_value_metadata
        9: I64,  # data_page_offset
        11: I64,  # dictionary_page_offset
        13: ListOf(items=STRUCT),  # encoding_stats
        16: _HISTOGRAMS,
        17: _GEOMETRY,
    },
    make=_chunk,
)
_COLUMN_KEY = Struct(name="the key of a column", fields={1: ListOf(items=BINARY)})
_ENCRYPTION = Struct(name="the encryption of a column", fields={2: _COLUMN_KEY})
_COLUMN = Struct(
    name="a column", fields={3: _CHUNK, 8: _ENCRYPTION}, make=lambda found: found.get(3)
)
_ROW_GROUP = Struct(
    name="a row group",
    fields={1: ListOf(items=_COLUMN), 4: ListOf(items=STRUCT)},  # columns, sorting_columns
    make=lambda found: found[1],
)
_FILE = Struct(
    name="the footer",
    fields={
        2: ListOf(items=STRUCT),  # schema
        4: ListOf(items=_ROW_GROUP),
        5: ListOf(items=STRUCT),  # key_value_metadata
        7: ListOf(items=STRUCT),  # column_orders
    },
    make=lambda found: found[4],
)
