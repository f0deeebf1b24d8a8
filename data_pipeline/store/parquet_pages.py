"""The sizes that a Parquet file claims, read before anything is made of them.

    file -> length of its footer -> (pyarrow reads the footer) -> page headers -> largest page

Decisions
    A page is decompressed and decoded as a whole, and its header alone says how large it becomes:
    the footer only repeats what the writer claimed. pyarrow shows no page headers, so they are read
    here: two numbers of a Thrift structure, whose other fields are skipped.
    No value is longer than the page, or the dictionary page, that it is in, in whatever encoding.
    So rows times the largest page bounds what some rows can become.

Source: the Parquet format, parquet.thrift (PageHeader, fields 2 and 3), and the compact protocol of
    Thrift (thrift-compact-protocol.md).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_FOOTER_BYTES = 16 * 2**20
"""Bytes of the longest footer that is read; pyarrow makes some 20 times as many of it."""
MAX_PAGE_BYTES = 256 * 2**20
"""Bytes of the largest page that is read, before or after its compression."""
MAX_THRIFT_ITEMS = 100_000
"""Items of a list in the footer: row groups, columns, keys."""
_MAGIC = b"PAR1"
_FIRST_BYTES = 512
"""Bytes in which the header of a page is looked for first; statistics can make it longer."""
_MAX_HEADER_BYTES = 2**20
_MAX_DEPTH = 8
_UNCOMPRESSED_SIZE = 2
_COMPRESSED_SIZE = 3
_I32 = 5


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


def largest_page(path: Path, metadata: pq.FileMetaData, group: int, column: int) -> int:
    """Return the size in bytes of the largest page of a column in a row group, decompressed.

    Args:
        path: The file.
        metadata: Its footer.
        group: Number of the row group.
        column: Number of the leaf column.

    Raises:
        OSError: the file cannot be read.
        ValueError: a page is too large, or is no page.
    """
    chunk = metadata.row_group(group).column(column)
    start = chunk.data_page_offset
    dictionary = chunk.dictionary_page_offset
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    stop = start + chunk.total_compressed_size
    largest = 0
    with path.open("rb", buffering=0) as file:
        if start < 0 or stop > file.seek(0, os.SEEK_END):
            raise ValueError(f"row group {group} claims bytes {start:,} to {stop:,}")
        while start < stop:
            length, size, compressed_size = _page_header(file.fileno(), start, stop)
            if min(size, compressed_size) < 0:
                raise ValueError(f"row group {group} has a page of negative size")
            if max(size, compressed_size) > MAX_PAGE_BYTES:
                raise ValueError(
                    f"row group {group} has a page of {max(size, compressed_size):,} bytes, at "
                    f"most {MAX_PAGE_BYTES:,} are read: write it with smaller pages"
                )
            largest = max(largest, size)
            start += length + compressed_size
    return largest


def _page_header(descriptor: int, start: int, stop: int) -> tuple[int, int, int]:
    """Return (length of the header, size of the page, its size in the file), all in bytes."""
    num_bytes = _FIRST_BYTES
    while True:
        data = os.pread(descriptor, min(num_bytes, stop - start), start)
        try:
            return _parse(data)
        except IndexError:
            if len(data) < num_bytes or num_bytes >= _MAX_HEADER_BYTES:
                raise ValueError(f"no header of a page at byte {start:,}") from None
            num_bytes *= 8


def _parse(data: bytes) -> tuple[int, int, int]:
    """Return what `_page_header` does.

    Raises:
        IndexError: the header goes on behind `data`.
        ValueError: it is no header of a page.
    """
    sizes: dict[int, int] = {}
    at = 0
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
        if field in (_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE) and kind == _I32:
            value, at = _varint(data, at)
            sizes[field] = _signed(value)
        else:
            at = _skip(data, at, kind, 0)
    if len(sizes) < 2:
        raise ValueError("a page does not say its size")
    return at + 1, sizes[_UNCOMPRESSED_SIZE], sizes[_COMPRESSED_SIZE]


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
    if kind == 12:
        return _skip_struct(data, at, depth)
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


def _skip_struct(data: bytes, at: int, depth: int) -> int:
    while data[at]:
        kind = data[at] & 15
        has_number = not data[at] >> 4
        at += 1
        if has_number:
            at = _varint(data, at)[1]
        at = _skip(data, at, kind, depth + 1)
    return at + 1
