"""Fields of a record that a source keeps beside its tokens, such as url and id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from data_pipeline.config.record_filters import plain_value
from data_pipeline.store.provenance import MAX_KEPT_CHARACTERS
from data_pipeline.text.record_keys import ABSENT, find_field

if TYPE_CHECKING:
    import pyarrow as pa

Kept = tuple[str | None, ...]
"""Values of the fields that a source keeps, in the order of `keep`."""
STRETCH_ROWS = 4096
"""Documents whose kept fields are written at once, as one row group."""


def kept_values(fields: Sequence[str], record: Mapping[str, Any]) -> Kept:
    """Return fields of a record as texts, cut to MAX_KEPT_CHARACTERS; None if absent or null."""
    return tuple(_kept_text(find_field(record, field)) for field in fields)


def _kept_text(value: Any) -> str | None:
    if value is ABSENT or value is None:
        return None
    if isinstance(value, (dict, list)):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = plain_value(value)
    text = text[:MAX_KEPT_CHARACTERS]
    # JSON may hold half of a surrogate pair, which is no text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class KeptWriter:
    """Writes kept fields as Parquet, in stretches, so that memory does not grow with the unit."""

    def __init__(self, file: IO[bytes], fields: Sequence[str]) -> None:
        """Begin a file that is open for writing."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([(field, pa.string()) for field in fields])
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[Kept] = []

    def add(self, values: Kept) -> None:
        """Add the fields of the next document."""
        self._waiting.append(values)
        if len(self._waiting) >= STRETCH_ROWS:
            self._write()

    def finish(self) -> None:
        """Write what waits, and the end of the file."""
        if self._waiting:
            self._write()
        self._writer.close()

    def _write(self) -> None:
        self._writer.write_table(self._table(), row_group_size=STRETCH_ROWS)
        self._waiting = []

    def _table(self) -> pa.Table:
        import pyarrow as pa

        columns = []
        for number in range(len(self._schema)):
            values = [row[number] for row in self._waiting]
            columns.append(pa.array(values, pa.string()))
        return pa.Table.from_arrays(columns, schema=self._schema)
