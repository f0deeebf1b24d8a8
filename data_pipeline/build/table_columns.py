"""Columns of Arrow tables (Parquet files, saved datasets) as UTF-8 texts.

Decisions
    A column is taken if it is text without loss: strings of every layout, dictionaries of strings,
    binary values (each is checked to be UTF-8), JSON, and a column without any type, whose values
    are all null and are counted as such.
    Anything else is refused with the type that was found, because to write a number or a list as
    text would be a choice that the mix does not name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def check_columns(place: str, schema: pa.Schema, fields: Sequence[str], cure: str) -> None:
    """Refuse a table that lacks one of the columns `fields`, has it twice, or not as text.

    Raises:
        DataError: It does; the message names `place`, and ends with `cure`.
    """
    for field in fields:
        count = schema.names.count(field)
        if count > 1:
            raise DataError(
                f"{place}: {count} columns are named '{field}'. Rename all but one, or leave them "
                "out when you write it."
            )
        if not count:
            raise DataError(
                f"{place}: no column '{field}'. It has: {', '.join(schema.names)}."
                f"{_nested_hint(schema, field)} {cure}"
            )
        kind = schema.field(field).type
        if not _is_text(kind):
            raise DataError(
                f"{place}: column '{field}' holds {_shown(kind)}, must hold strings."
                f"{_type_hint(kind)} {cure}"
            )


def _nested_hint(schema: pa.Schema, field: str) -> str:
    parent = field.partition(".")[0]
    if parent not in schema.names or parent == field:
        return ""
    return (
        f" '{parent}' holds {_shown(schema.field(parent).type)}, and a field inside a column is "
        "not read: write it as a column of its own."
    )


def _type_hint(kind: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_nested(kind):
        return " A text inside a column is not read: write it as a column of its own."
    return ""


def _shown(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_string(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type) or _is_binary(kind.value_type)
    return pa.types.is_null(kind) or _is_string(kind) or _is_binary(kind)


def _is_string(kind: pa.DataType) -> bool:
    import pyarrow as pa

    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def column_bytes(column: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    """Return the values of a column that `check_columns` accepted, null as None.

    They come as bytes, because one string that is not UTF-8 must not cost the whole column.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_null(kind):
        return [None] * len(column)
    values: list[bytes | None] = []
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    for chunk in chunks:
        if isinstance(chunk, pa.ExtensionArray):
            chunk = chunk.storage
        if isinstance(chunk, pa.DictionaryArray):
            # a cast to strings would refuse the whole column for one that is not UTF-8
            decoded = chunk.dictionary.cast(pa.large_binary()).take(chunk.indices)
        else:
            decoded = chunk.cast(pa.large_binary())
        values += decoded.to_pylist()
    return values


def decoded_records(
    columns: Sequence[list[bytes | None]], fields: Sequence[str]
) -> Iterator[dict[str, str | None] | None]:
    """Yield each row as a record of texts, or None where a value is not UTF-8."""
    for values in zip(*columns, strict=True):
        record: dict[str, str | None] = {}
        try:
            for field, value in zip(fields, values, strict=True):
                record[field] = None if value is None else value.decode("utf-8")
        except UnicodeDecodeError:
            yield None
        else:
            yield record
