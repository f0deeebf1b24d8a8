"""Parquet files: opened with bounds on their footer, read in batches of bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_pipeline.objects.object_paths import ObjectPath
from data_pipeline.reading.table_columns import check_columns, field_type
from data_pipeline.reading.unreadable_files import parquet_errors, unreadable, unreadable_parquet
from data_pipeline.store.parquet_footer import MAX_FOOTER_BYTES, check_footer, read_columns
from data_pipeline.store.parquet_pages import ROW_COUNTS, ColumnBounds
from data_pipeline.store.thrift import MAX_ITEMS

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 1024
"""Most rows that are decoded at once, unless Arrow keeps every column as a dictionary."""
_LARGE_PAGE_ROWS = 256
"""Most rows that are decoded at once where pages alone take more than _BATCH_BYTES."""
_BATCH_BYTES = 128 * 2**20
"""Bytes that the rows which are decoded at once can take, however they are encoded."""
_BUFFER_BYTES = 2**20


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises:
        DataError: it is damaged, or larger in one of its parts than what is read.
    """
    import pyarrow.parquet as pq

    try:
        check_footer(path)
        # Without a buffer, and with `pre_buffer`, all of a row group would be read at once.
        with (
            _source_of(path) as source,
            pq.ParquetFile(
                source,
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                thrift_string_size_limit=MAX_FOOTER_BYTES,
                thrift_container_size_limit=MAX_ITEMS,
            ) as file,
        ):
            yield file
    except parquet_errors() as error:
        if isinstance(error, OSError) and isinstance(path, ObjectPath) and error.filename:
            raise unreadable(path, error) from error
        raise unreadable_parquet(path, error) from error


@contextlib.contextmanager
def _source_of(path: Path) -> Iterator[Path | IO[bytes]]:
    """Yield what pyarrow reads: the path of a file, or an object that is open."""
    if not isinstance(path, ObjectPath):
        yield path
        return
    with path.open("rb") as file:
        yield file


def row_group_bytes(path: Path) -> list[int]:
    """Return the size of each row group of a file, uncompressed; none if the file has no row.

    The sizes are what the file claims: they divide work, and bound nothing.

    Raises:
        DataError: it cannot be read.
    """
    with open_parquet(path) as file:
        metadata = file.metadata
        if metadata.num_rows <= 0:
            return []
        sizes = []
        for group in range(metadata.num_row_groups):
            sizes.append(max(metadata.row_group(group).total_byte_size, 0))
        return sizes


def parquet_batches(
    path: Path, groups: range, fields: tuple[str, ...], values: tuple[str, ...] = ()
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (rows of the file before it, batch) for the rows of some row groups.

    Args:
        path: The file.
        groups: Numbers of the row groups.
        fields: Columns that are read and must hold text.
        values: Columns that are read and may hold numbers.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    with open_parquet(path) as file:
        check_columns(str(path), file.schema_arrow, fields, values, "Set text_field or template.")
        read = (*fields, *values)
        rows = [file.metadata.row_group(group).num_rows for group in range(groups.stop)]
        number = sum(rows[: groups.start])
        batches = file.iter_batches(
            batch_size=_batch_rows(path, file, groups, read),
            row_groups=list(groups),
            columns=list(read),
        )
        for batch in batches:
            yield number, batch
            number += batch.num_rows
        if number != sum(rows):
            raise ValueError(f"it claims {sum(rows):,} rows and holds {number:,}")


def _batch_rows(path: Path, file: pq.ParquetFile, groups: range, fields: tuple[str, ...]) -> int:
    """Return how many rows are decoded at once: so many that they fit in _BATCH_BYTES.

    Where single pages are larger, as many rows as two of them hold: rows may be in the end of one
    and the start of the next.
    """
    import pyarrow as pa

    row_groups = read_columns(path)
    columns = []
    most_rows = ROW_COUNTS[0]
    for number in range(file.metadata.num_columns):
        described = file.schema.column(number)
        if described.path not in fields:
            continue
        keeps = pa.types.is_dictionary(field_type(file.schema_arrow, described.path))
        if not keeps:
            most_rows = _BATCH_ROWS
        columns.append(ColumnBounds(path, row_groups, number, described.physical_type, keeps=keeps))
    for column in columns:
        for group in groups:
            column.add_group(group)
    large_pages = 2 * sum(column.largest_page for column in columns)
    for limit, most in ((_BATCH_BYTES, most_rows), (large_pages, _LARGE_PAGE_ROWS)):
        for rows in ROW_COUNTS:
            if rows <= most and sum(column.bytes_of(rows) for column in columns) <= limit:
                return rows
    return 1
