"""Columns of Arrow tables (Parquet files, saved datasets) as UTF-8 texts.

Decisions
    A column is taken if it is text without loss: strings of every layout, dictionaries of strings,
    binary values (each is checked to be UTF-8), JSON, and a column without any type, whose values
    are all null and are counted as such. Fields inside a column (structures) are read like columns.
    Columns of filters may hold numbers, times, and true or false as well. A number of 16 or 32 bits
    is the shortest decimal that names it, as JSON would write it: the float32 nearest to 0.7 is
    0.7, and not 0.699999988.
    Anything else is refused with the type that was found, because to write a number or a list as
    text would be a choice that the mix does not name.
    The sizes of the values are known before Python makes objects of them: a row that is too long is
    rejected, and only as many rows become objects at once as fit in the size of one document. Many
    rows of a dictionary may be the same long text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataError
from data_pipeline.escaping import escaped_line
from data_pipeline.text.cleaning import MAX_DOCUMENT_BYTES, TOO_LONG

if TYPE_CHECKING:
    import pyarrow as pa

VALUE_RULES_VERSION = 2
"""Version of the rules by which values of filters, `keep` and `cluster_by` are read.

It belongs to the fingerprint of a build and to what a part is known by, so a change of what a value
is must raise it.
"""


def check_columns(
    place: str, schema: pa.Schema, fields: Sequence[str], values: Sequence[str], cure: str
) -> None:
    """Refuse a table that lacks a column, has it twice, or holds what is not read there.

    Args:
        place: What has the columns, for messages.
        schema: The columns.
        fields: Those that must hold text.
        values: Those that may hold numbers and times as well.
        cure: End of a message about a column of text.

    Raises:
        DataError: It does.
    """
    for field in fields:
        kind = _type_of(place, schema, field, cure)
        if not _is_text(kind):
            raise DataError(
                f"{place}: column '{field}' holds {_shown(kind)}, must hold strings."
                f"{_type_hint(field, kind)} {cure}"
            )
    for field in values:
        kind = _type_of(place, schema, field, "Correct filters or cluster_by.")
        if not (_is_text(kind) or _is_value(kind)):
            raise DataError(
                f"{place}: column '{field}' holds {_shown(kind)}, must hold numbers, texts, times "
                f"or true and false.{_type_hint(field, kind)} Correct filters or cluster_by."
            )


def _type_of(place: str, schema: pa.Schema, field: str, cure: str) -> pa.DataType:
    """Return the type of a column, or of a field inside one.

    Raises:
        DataError: there is none of that name, or more than one.
    """
    path = column_path(schema, field)
    if path is None:
        names = escaped_line(", ".join(schema.names), 2000)
        raise DataError(
            f"{place}: no column '{field}'. It has: {names}.{_nested_hint(schema, field)} {cure}"
        )
    count = schema.names.count(path[0])
    if count > 1:
        raise DataError(
            f"{place}: {count} columns are named '{path[0]}'. Rename all but one, or leave them "
            "out when you write it."
        )
    return field_type(schema, field)


def field_type(schema: pa.Schema, field: str) -> pa.DataType:
    """Return the type of a column, or of a field inside one, which is there."""
    path = column_path(schema, field)
    assert path is not None, "check_columns has found it"
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def column_path(schema: pa.Schema, field: str) -> tuple[str, ...] | None:
    """Return the names that lead to a field, from its column inwards; None if it is not there.

    A column whose own name has dots comes before a field inside another one.
    """
    if field in schema.names:
        return (field,)
    dot = field.find(".")
    while dot >= 0:
        if field[:dot] in schema.names:
            inner = _path_inside(schema.field(field[:dot]).type, field[dot + 1 :])
            if inner is not None:
                return (field[:dot], *inner)
        dot = field.find(".", dot + 1)
    return None


def _path_inside(kind: pa.DataType, field: str) -> tuple[str, ...] | None:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return None
    return column_path(pa.schema(list(kind)), field)


def _column_of(table: pa.RecordBatch | pa.Table, field: str) -> list[pa.Array]:
    """Return the arrays of a column, or of a field inside one; null where that column is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = column_path(table.schema, field)
    assert path is not None, "check_columns has found it"
    column = table.column(path[0])
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    for name in path[1:]:
        chunks = [pc.struct_field(chunk, [name]) for chunk in chunks]
    return _storage_chunks(chunks)


def _nested_hint(schema: pa.Schema, field: str) -> str:
    parent = field.partition(".")[0]
    if parent not in schema.names or parent == field:
        return ""
    return f" '{parent}' holds {_shown(schema.field(parent).type)}, which has no such field."


def _type_hint(field: str, kind: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.num_fields:
        inner = escaped_line(kind.field(0).name, 60)
        return f" Name a field inside it, such as '{field}.{inner}'."
    if pa.types.is_nested(kind):
        return " A text inside a list is not read: write it as a column of its own."
    return ""


def _shown(kind: pa.DataType) -> str:
    return escaped_line(kind, 100)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_string(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type) or _is_binary(kind.value_type)
    return pa.types.is_null(kind) or _is_string(kind) or _is_binary(kind)


def _is_value(kind: pa.DataType) -> bool:
    import pyarrow as pa

    checks = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_decimal,
        pa.types.is_boolean,
        pa.types.is_date,
        pa.types.is_timestamp,
    )
    return any(check(kind) for check in checks)


def _is_string(kind: pa.DataType) -> bool:
    import pyarrow as pa

    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def table_records(
    place: str, table: pa.RecordBatch | pa.Table, fields: Sequence[str]
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yield (values of a row by field, None), or ({}, why the row cannot be used).

    Args:
        place: What the rows belong to, for the message.
        table: Rows; `check_columns` has accepted its columns.
        fields: The columns to read.

    Raises:
        DataError: a column points outside of its memory. An Arrow file can say so.
    """
    import pyarrow as pa

    sizes = np.zeros(table.num_rows, np.int64)
    columns = []
    for field in fields:
        chunks = [_as_binary(chunk) for chunk in _column_of(table, field)]
        try:
            for chunk in chunks:
                chunk.validate(full=True)
        except pa.ArrowException as error:
            raise DataError(
                f"{place}: column '{field}' is damaged: {str(error).rstrip('.')}. Write it again."
            ) from error
        sizes += np.concatenate([_value_bytes(chunk) for chunk in chunks])
        columns.append(pa.chunked_array(chunks))
    for start, stop in _stretches(sizes.tolist()):
        if sizes[start] > MAX_DOCUMENT_BYTES:
            yield {}, TOO_LONG
            continue
        values = []
        for column in columns:
            values.append(_column_values(column.slice(start, stop - start)))
        yield from _decoded_records(values, fields)


def _stretches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of rows that together are no larger than the longest document.

    A row that is larger stands alone.
    """
    start = 0
    gathered = 0
    for row, size in enumerate(sizes):
        if row > start and gathered + size > MAX_DOCUMENT_BYTES:
            yield start, row
            start = row
            gathered = 0
        gathered += size
    if start < len(sizes):
        yield start, len(sizes)


def _storage_chunks(chunks: Sequence[pa.Array]) -> list[pa.Array]:
    """Return the arrays of a column without extension types."""
    import pyarrow as pa

    found = []
    for chunk in chunks:
        found.append(chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk)
    return found


def _as_binary(chunk: pa.Array) -> pa.Array:
    """Return a column of strings as one of bytes, so that invalid UTF-8 is no damage."""
    import pyarrow as pa

    kind = chunk.type
    if pa.types.is_string(kind):
        return chunk.view(pa.binary())
    if pa.types.is_large_string(kind):
        return chunk.view(pa.large_binary())
    if pa.types.is_string_view(kind):
        return chunk.view(pa.binary_view())
    if pa.types.is_dictionary(kind):
        values = _as_binary(chunk.dictionary)
        return pa.DictionaryArray.from_arrays(chunk.indices, values, safe=False)
    return chunk


def _value_bytes(chunk: pa.Array) -> npt.NDArray[np.int64]:
    """Return the number of bytes of each value, null as 0, [values]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = chunk.type
    if pa.types.is_null(kind) or _is_value(kind):
        return np.zeros(len(chunk), np.int64)
    if pa.types.is_dictionary(kind):
        sizes = np.append(_value_bytes(chunk.dictionary), 0)
        null = len(sizes) - 1
        return sizes[chunk.indices.cast(pa.int64()).fill_null(null).to_numpy()]
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = [value.as_buffer() for value in chunk]
        return np.array([0 if view is None else view.size for view in views], np.int64)
    lengths = pc.binary_length(chunk).cast(pa.int64()).fill_null(0)
    return lengths.to_numpy()  # type: ignore[no-any-return]


def _column_values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column: texts as bytes, null as None.

    They come as bytes, because one string that is not UTF-8 must not cost the whole column.
    """
    import pyarrow as pa

    if pa.types.is_null(column.type):
        return [None] * len(column)
    if _is_value(column.type):
        return _scalars(column)
    values: list[bytes | None] = []
    for chunk in column.chunks:
        if isinstance(chunk, pa.DictionaryArray):
            decoded = chunk.dictionary.cast(pa.large_binary()).take(chunk.indices)
        else:
            decoded = chunk.cast(pa.large_binary())
        values += decoded.to_pylist()
    return values


def _scalars(column: pa.ChunkedArray) -> list[Any]:
    """Return numbers as Python's, and times as texts."""
    import pyarrow as pa

    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    elif pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        column = column.cast(pa.string())
    values: list[Any] = column.to_pylist()
    narrow = {pa.float32(): np.float32, pa.float16(): np.float16}.get(column.type)
    if narrow is None:
        return values
    return [None if value is None else float(str(narrow(value))) for value in values]


def _decoded_records(
    columns: Sequence[list[Any]], fields: Sequence[str]
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yield what `table_records` does for columns of values."""
    for values in zip(*columns, strict=True):
        record: dict[str, Any] = {}
        try:
            for field, value in zip(fields, values, strict=True):
                record[field] = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            yield {}, "invalid UTF-8"
        else:
            yield record, None
