"""The sizes that the pages of a Parquet file claim, read before anything is made of them.

    footer -> page headers -> rows at a time

Decisions
    A page is decompressed as a whole, and its header alone says how large it becomes: the footer
    only repeats what the writer claimed. pyarrow shows no page headers, so they are read here.
    Values in a page of plain encoding stand there in full, so rows take no more than the pages that
    they are in. Other encodings repeat: a row there takes as much as the longest value, which is no
    longer than the dictionary, or than the page.
    A column that Arrow keeps as a dictionary repeats nothing.
    pyarrow's writer looks at the size of a page only every 1,024 rows, so a page of books has
    hundreds of MiB. It is read, because it takes room in the file as well; a page that takes almost
    none there, and much in memory, is not text.

Source: the Parquet format, parquet.thrift (PageHeader, DataPageHeader, DataPageHeaderV2).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.store.parquet_footer import ColumnChunk, Columns
from data_pipeline.store.thrift import I32, Struct, parse_struct

MAX_PAGE_BYTES = 2**30
"""Bytes of the largest page that is read, before or after its compression."""
FREE_PAGE_BYTES = 128 * 2**20
"""Bytes up to which a page is read whatever it takes in the file."""
MAX_RATIO = 100
"""A larger page may be so many times as large as it is in the file. Snappy reaches 21."""
ROW_COUNTS = (16_384, 4096, 1024, 256, 64, 16, 4)
"""Numbers of rows for which `ColumnBounds` knows the memory."""
_FIRST_BYTES = 512
"""Bytes in which the header of a page is looked for first; statistics can make it longer."""
_MAX_HEADER_BYTES = 2**20
_MOST_WALKED = 500_000
"""Values of the largest dictionary whose values are measured one by one."""
_UNCOMPRESSED = 0
_CODECS = {1: "snappy", 2: "gzip", 6: "zstd"}
"""Names of pyarrow for codecs of the enumeration CompressionCodec."""
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_HEADER_FIELDS = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}
"""Where the header of a page has that of its type."""
_ENCODING_FIELDS = {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}
_PAGE = "the header of a page"
_HEADER = Struct(
    name=_PAGE,
    fields={
        1: I32,  # type
        2: I32,  # uncompressed_page_size
        3: I32,  # compressed_page_size
        5: Struct(name=_PAGE, fields={1: I32, 2: I32}),
        7: Struct(name=_PAGE, fields={1: I32, 2: I32}),
        8: Struct(name=_PAGE, fields={1: I32, 4: I32}),
    },
)
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

    def __init__(
        self,
        path: Path,
        row_groups: Sequence[Columns],
        column: int,
        physical_type: str,
        *,
        keeps: bool,
    ) -> None:
        """Begin without row groups.

        Args:
            path: The file.
            row_groups: The columns of each, as its footer has them.
            column: Number of the leaf column, which has one value a row.
            physical_type: Type of its values in the file, as pyarrow calls it.
            keeps: Arrow keeps the column as a dictionary.
        """
        self.largest_page = 0
        """Bytes of the largest page, decompressed."""
        self._path = path
        self._row_groups = row_groups
        self._column = column
        self._keeps = keeps
        self._has_width = physical_type in _FIXED_WIDTH
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
        chunk = self._chunk(group)
        start = chunk.start
        stop = chunk.stop
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
                        longest = _longest_value(file, page, chunk.codec)
                    self._largest_dictionary = max(self._largest_dictionary, dictionary_size)
                elif page.values > 0:
                    self._add_page(page, dictionary_size, longest)
                    dictionary_size = 0
                start = page.start + page.compressed_size

    def _chunk(self, group: int) -> ColumnChunk:
        columns = self._row_groups[group]
        chunk = columns[self._column] if self._column < len(columns) else None
        if chunk is None:
            raise ValueError(f"row group {group} does not say where its column {self._column} is")
        return chunk

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


def _longest_value(file: IO[bytes], page: _Page, codec: int) -> int:
    """Return the bytes of the longest value of a dictionary, or a number that is larger."""
    import pyarrow as pa

    if page.size > FREE_PAGE_BYTES or page.values > _MOST_WALKED:
        return page.size
    data = _read_at(file, page.start, page.compressed_size)
    if codec in _CODECS:
        data = pa.decompress(data, page.size, _CODECS[codec], asbytes=True)
    elif codec != _UNCOMPRESSED:
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
            fields, length = parse_struct(data, 0, _HEADER)
            break
        except IndexError:
            if len(data) < num_bytes or num_bytes >= _MAX_HEADER_BYTES:
                raise ValueError(f"no header of a page at byte {start:,}") from None
            num_bytes *= 8
    try:
        return _page(fields, start + length)
    except KeyError as error:
        raise ValueError(f"the header of a page lacks its field {error}") from None


def _page(fields: dict[int, Any], start: int) -> _Page:
    """Return what the fields of a header say of the page that begins at `start`.

    Raises:
        KeyError: one is missing.
    """
    kind = fields[1]
    values = encoding = 0
    inner = fields.get(_HEADER_FIELDS.get(kind, 0))
    if inner is not None:
        values = inner[1]
        encoding = inner[_ENCODING_FIELDS[kind]]
    return _Page(
        start=start,
        size=fields[2],
        compressed_size=fields[3],
        type=kind,
        values=values,
        encoding=encoding,
    )
