"""DuckDB, for the group-bys of the last stage: SQL on records, with bounded memory.

Decisions
    DuckDB and not Polars: it has a limit on memory and goes on on disk beyond it, so a text that
    half of the corpus repeats costs time and not the node. docs/data.md has the figures.
    Each task has an engine of its own with one thread, since many tasks run at once.
    An engine reads what it is given and spills into its own folder; it opens no other file, loads
    no extension, and calls no network.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from data_pipeline.errors import StorageError

if TYPE_CHECKING:
    import duckdb

MEMORY_BYTES = 2**29
"""Memory of an engine, from which on it uses the disk."""
_SPILL_PREFIX = "spill-"
_BATCH_ROWS = 1 << 18
Columns = dict[str, npt.NDArray[Any]]
"""Columns of records by name, [records] each."""


@contextlib.contextmanager
def open_engine(folder: Path, memory_bytes: int = MEMORY_BYTES) -> Iterator[EmbeddedEngine]:
    """Yield an engine that may spill into a new folder within `folder`.

    Raises:
        StorageError: the disk is full, the query needs more memory than it has, or the folder has a
            name that DuckDB cannot take.
    """
    with tempfile.TemporaryDirectory(prefix=_SPILL_PREFIX, dir=folder) as spill:
        engine = EmbeddedEngine(spill, memory_bytes)
        try:
            yield engine
        except engine.storage_errors as error:
            raise StorageError(
                f"{folder}: the engine that compares documents stopped: {error}. Free space there; "
                "what is done is kept, and a rerun goes on from there."
            ) from error
        finally:
            engine.close()


def _utf8_name(path: str) -> str:
    """Return a path as DuckDB wants it, in UTF-8 whatever the locale says.

    Raises:
        StorageError: its bytes are no UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise StorageError(
            f"{path}: its name is not UTF-8, which the engine that compares documents needs. Build "
            "in a folder with another name: --out."
        ) from None


class EmbeddedEngine:
    """One connection to DuckDB; `open_engine` makes it.

    It is opened when there are records, which a bucket of a small build often has none of.
    """

    def __init__(self, spill: str, memory_bytes: int) -> None:
        self._spill = spill
        self._memory_bytes = memory_bytes
        self._opened: duckdb.DuckDBPyConnection | None = None
        self.storage_errors: tuple[type[Exception], ...] = ()
        """What DuckDB raises for want of disk or memory."""

    def close(self) -> None:
        """Close the connection."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> duckdb.DuckDBPyConnection:
        import duckdb  # takes longer than a small build

        self.storage_errors = (duckdb.IOException, duckdb.OutOfMemoryException)
        settings: dict[str, str | bool | int | float | list[str]] = {
            "threads": 1,
            "memory_limit": f"{self._memory_bytes}B",
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        connection = duckdb.connect(config=settings)
        connection.execute("SET temp_directory = $path", {"path": _utf8_name(self._spill)})
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        return connection

    def load(self, table: str, batches: Iterable[Columns]) -> bool:
        """Make a table of records, and return whether there are any.

        Args:
            table: Its name.
            batches: Records with the same columns, as they come.
        """
        import pyarrow as pa

        record_batches = _record_batches(batches)
        first = next(record_batches, None)
        if first is None:
            return False

        def all_batches() -> Iterator[pa.RecordBatch]:
            yield first
            yield from record_batches

        reader = pa.RecordBatchReader.from_batches(first.schema, all_batches())
        self._connection.register("incoming", reader)
        self._connection.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM incoming")
        self._connection.unregister("incoming")
        return True

    def query(self, sql: str) -> Iterator[Columns]:
        """Yield the records of an answer, batch by batch."""
        for batch in self._connection.sql(sql).to_arrow_reader(_BATCH_ROWS):
            columns = {}
            for name in batch.schema.names:
                columns[name] = batch.column(name).to_numpy(zero_copy_only=False)
            yield columns


def _record_batches(batches: Iterable[Columns]) -> Iterator[Any]:
    """Yield the batches that hold records, as Arrow has them."""
    import pyarrow as pa

    for columns in batches:
        arrays = [pa.array(values) for values in columns.values()]
        if len(arrays[0]):
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
