"""The sizes that a Parquet file claims, read before anything is made of them.

    file -> length of its footer -> (pyarrow reads the footer) -> page headers -> rows at a time

Decisions
    A page is decompressed as a whole, and its header alone says how large it becomes: the footer
    only repeats what the writer claimed. pyarrow shows no page headers, so they are read here: some
    numbers of a Thrift structure, whose other fields are skipped.
    Values in a page of plain encoding stand there in full, so rows take no more than the pages that
    they are in. Other encodings repeat: a row there takes as much as the longest value, which is no
    longer than the dictionary, or than the page.
    A column that Arrow keeps as a dictionary repeats nothing.
    pyarrow's writer looks at the size of a page only every 1,024 rows, so a page of books has
    hundreds of MiB. It is read, because it takes room in the file as well; a page that takes almost
    none there, and much in memory, is not text.

Source: the Parquet format, parquet.thrift (PageHeader, DataPageHeader, DataPageHeaderV2), and the
    compact protocol of Thrift (thrift-compact-protocol.md).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_FOOTER_BYTES = 16 * 2**20
"""Bytes of the longest footer that is read; pyarrow makes some 20 times as many of it."""
MAX_PAGE_BYTES = 2**30
"""Bytes of the largest page that is read, before or after its compression."""
FREE_PAGE_BYTES = 128 * 2**20
"""Bytes up to which a page is read whatever it takes in the file."""
MAX_RATIO = 100
"""A larger page may be so many times as large as it is in the file. Snappy reaches 21."""
MAX_THRIFT_ITEMS = 100_000
"""Items of a list in the footer: row groups, columns, keys."""
ROW_COUNTS = (16_384, 4096, 1024, 256, 64, 16, 4)
"""Numbers of rows for which `ColumnBounds` knows the memory."""
_MAGIC = b"PAR1"
_FIRST_BYTES = 512
"""Bytes in which the header of a page is looked for first; statistics can make it longer."""
_MAX_HEADER_BYTES = 2**20
_MAX_DEPTH = 8
_MOST_WALKED = 500_000
"""Values of the largest dictionary whose values are measured one by one."""
_CODECS = ("SNAPPY", "GZIP", "ZSTD")
_I32 = 5
_STRUCT = 12
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_HEADER_FIELDS = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}
"""Where the header of a page has that of its type."""
_ENCODING_FIELDS = {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}
_FIXED_WIDTH = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE")
_WIDEST_VALUE = 16
"""Bytes that a value of _FIXED_WIDTH takes at most."""
_IN_FULL = (0, 6)
"""PLAIN and DELTA_LENGTH_BYTE_ARRAY."""
_BY_DICTIONARY = (2, 8)
"""PLAIN_DICTIONARY and RLE_DICTIONARY."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Page:
    """What the header of a page says."""

    start: int
    """Position of its content in the file."""
    size: int
    """Bytes, decompressed."""
    compressed_size: int
    """Bytes in the file."""
    type: int
    """As in the enumeration PageType."""
    values: int
    """Values in it, null or not, which are rows in a data page of a column that is read."""
    encoding: int
    """As in the enumeration Encoding."""


def check_footer(path: Path) -> None:
    """Refuse a Parquet file whose footer is too long, before it is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no footer, or one that is too long; the message says so.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        end = file.read(8)
    if len(end) < 8 or end[4:] != _MAGIC:
        raise ValueError("it does not end as Parquet does, so it is cut off")
    length = int.from_bytes(end[:4], "little")
    if length > size:
        raise ValueError(f"it is {size:,} bytes long and claims a footer of {length:,}")
    if length > MAX_FOOTER_BYTES:
        raise ValueError(
            f"its footer has {length:,} bytes, at most {MAX_FOOTER_BYTES:,} are read. It has too "
            "many row groups, columns or statistics for a file of texts"
        )


class _Window:
    """The most bytes in the pages that any `rows` successive rows are in."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.most = 0
        self._pages: deque[tuple[int, int]] = deque()
        self._num_rows = 0
        self._num_bytes = 0

    def add(self, rows: int, size: int) -> None:
        """Take the next page, of at least one row."""
        self._pages.append((rows, size))
        self._num_rows += rows
        self._num_bytes += size
        # the first page is left when one row of it, and all that follow, are too many
        while len(self._pages) > 1 and self._num_rows - self._pages[0][0] - rows + 2 > self.rows:
            first_rows, first_size = self._pages.popleft()
            self._num_rows -= first_rows
            self._num_bytes -= first_size
        self.most = max(self.most, self._num_bytes)


class ColumnBounds:
    """How many bytes some rows of a column can take when they are decoded at once.

    Row groups are added in the order in which they are read, since rows of several are decoded
    together.
    """

    def __init__(self, path: Path, metadata: pq.FileMetaData, column: int, *, keeps: bool) -> None:
        """Begin without row groups.

        Args:
            path: The file.
            metadata: Its footer.
            column: Number of the leaf column, which has one value a row.
            keeps: Arrow keeps the column as a dictionary.
        """
        self.largest_page = 0
        """Bytes of the largest page, decompressed."""
        self._path = path
        self._metadata = metadata
        self._column = column
        self._keeps = keeps
        self._has_width = metadata.schema.column(column).physical_type in _FIXED_WIDTH
        self._windows = [_Window(rows) for rows in ROW_COUNTS]
        self._longest_value = 0
        self._largest_dictionary = 0

    def bytes_of(self, rows: int) -> int:
        """Return the bytes that `rows` successive rows, one of ROW_COUNTS, can take."""
        window = self._windows[ROW_COUNTS.index(rows)]
        kept = self._largest_dictionary if self._keeps else 0
        return window.most + rows * self._longest_value + kept

    def add_group(self, group: int) -> None:
        """Read the page headers of a row group.

        Raises:
            OSError: the file cannot be read.
            ValueError: a page is too large, or is no page.
        """
        chunk = self._metadata.row_group(group).column(self._column)
        start = chunk.data_page_offset
        offset = chunk.dictionary_page_offset
        if offset is not None and 0 < offset < start:
            start = offset
        stop = start + chunk.total_compressed_size
        dictionary_size = longest = 0
        with self._path.open("rb", buffering=0) as file:
            if start < 0 or stop > file.seek(0, os.SEEK_END):
                raise ValueError(f"row group {group} claims bytes {start:,} to {stop:,}")
            while start < stop:
                page = _read_page(file, start, stop)
                _check_size(page, group)
                self.largest_page = max(self.largest_page, page.size)
                if page.type == _DICTIONARY:
                    dictionary_size = page.size
                    longest = _WIDEST_VALUE
                    if not self._has_width:
                        longest = _longest_value(file, page, chunk.compression)
                    self._largest_dictionary = max(self._largest_dictionary, dictionary_size)
                elif page.values > 0:
                    self._add_page(page, dictionary_size, longest)
                    dictionary_size = 0
                start = page.start + page.compressed_size

    def _add_page(self, page: _Page, dictionary_size: int, longest: int) -> None:
        """Take a data page; `dictionary_size` counts where a dictionary is kept, once."""
        size = 0
        if page.encoding in _BY_DICTIONARY:
            if not self._keeps:
                self._longest_value = max(self._longest_value, longest)
        elif page.encoding in _IN_FULL:
            size = page.size
        else:
            widest = _WIDEST_VALUE if self._has_width else page.size
            self._longest_value = max(self._longest_value, widest)
        if self._keeps:
            size += dictionary_size
        for window in self._windows:
            window.add(page.values, size)


def _check_size(page: _Page, group: int) -> None:
    if min(page.size, page.compressed_size) < 0:
        raise ValueError(f"row group {group} has a page of negative size")
    size = max(page.size, page.compressed_size)
    cure = (
        "write it with smaller row groups, or with write_batch_size=16: pyarrow looks at the size "
        "of a page only after that many rows, by default 1,024"
    )
    if size > MAX_PAGE_BYTES:
        raise ValueError(
            f"row group {group} has a page of {size:,} bytes, at most {MAX_PAGE_BYTES:,} are read: "
            f"{cure}"
        )
    if size > FREE_PAGE_BYTES and size > MAX_RATIO * page.compressed_size:
        raise ValueError(
            f"row group {group} has a page of {size:,} bytes that takes {page.compressed_size:,} "
            f"in the file. A page of more than {FREE_PAGE_BYTES:,} bytes is read only if it is at "
            f"most {MAX_RATIO} times as large as in the file: {cure}"
        )


def _longest_value(file: IO[bytes], page: _Page, codec: str) -> int:
    """Return the bytes of the longest value of a dictionary, or a number that is larger."""
    import pyarrow as pa

    if page.size > FREE_PAGE_BYTES or page.values > _MOST_WALKED:
        return page.size
    data = _read_at(file, page.start, page.compressed_size)
    if codec in _CODECS:
        data = pa.decompress(data, page.size, codec.lower(), asbytes=True)
    elif codec != "UNCOMPRESSED":
        return page.size
    longest = 0
    at = 0
    for _ in range(page.values):
        length = int.from_bytes(data[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return min(longest, page.size)


def _read_at(file: IO[bytes], start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return file.read(num_bytes)


def _read_page(file: IO[bytes], start: int, stop: int) -> _Page:
    """Return what the header at `start` says.

    Raises:
        ValueError: it is no header of a page.
    """
    num_bytes = _FIRST_BYTES
    while True:
        data = _read_at(file, start, min(num_bytes, stop - start))
        try:
            fields, length = _parse_struct(data, 0, 0)
            break
        except IndexError:
            if len(data) < num_bytes or num_bytes >= _MAX_HEADER_BYTES:
                raise ValueError(f"no header of a page at byte {start:,}") from None
            num_bytes *= 8
    kind = _number(fields, 1)
    inner = fields.get(_HEADER_FIELDS.get(kind, 0))
    values = encoding = 0
    if isinstance(inner, dict):
        values = _number(inner, 1)
        encoding = _number(inner, _ENCODING_FIELDS[kind])
    return _Page(
        start=start + length,
        size=_number(fields, 2),
        compressed_size=_number(fields, 3),
        type=kind,
        values=values,
        encoding=encoding,
    )


def _number(fields: Mapping[int, object], field: int) -> int:
    value = fields.get(field)
    if not isinstance(value, int):
        raise ValueError(f"the header of a page lacks its field {field}")
    return value


def _parse_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, object], int]:
    """Return (numbers of 32 bits and structures by field, position behind the structure).

    Raises:
        IndexError: it goes on behind `data`.
        ValueError: it is none.
    """
    fields: dict[int, object] = {}
    field = 0
    while data[at]:
        kind = data[at] & 15
        step = data[at] >> 4
        at += 1
        if step:
            field += step
        else:
            value, at = _varint(data, at)
            field = _signed(value)
        if kind == _I32:
            value, at = _varint(data, at)
            fields[field] = _signed(value)
        elif kind == _STRUCT and depth < _MAX_DEPTH:
            fields[field], at = _parse_struct(data, at, depth + 1)
        else:
            at = _skip(data, at, kind, depth)
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (number, position behind it) of a number of 7 bits a byte."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("the header of a page has a number of more than 64 bits")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """Return the position behind a value of the compact protocol."""
    if depth > _MAX_DEPTH:
        raise ValueError("the header of a page is nested too deeply")
    if kind in (1, 2):  # true and false, which are the kind itself
        return at
    if kind == 3:
        return at + 1
    if kind in (4, 5, 6):
        return _varint(data, at)[1]
    if kind == 7:
        return at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return at + length
    if kind in (9, 10):
        return _skip_list(data, at, depth)
    if kind == _STRUCT:
        return _parse_struct(data, at, depth + 1)[1]
    raise ValueError(f"the header of a page has a value of the unknown kind {kind}")


def _skip_list(data: bytes, at: int, depth: int) -> int:
    count = data[at] >> 4
    kind = data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    if count > len(data):
        raise IndexError("a list that is longer than what was read")
    for _ in range(count):
        # in a list, true and false take a byte each
        at = at + 1 if kind in (1, 2) else _skip(data, at, kind, depth + 1)
    return at
