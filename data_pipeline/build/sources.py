"""Units of a source -> documents.

    unit -> lines, rows or files -> text field or template -> normalized -> usable? -> Document
                                                                               |
                                            counted by reason, file and line <-+

Decisions
    Files are read in the order given, and the files of a glob by name, so the order of the
    documents depends on nothing else.
    JSONL is read as bytes, one line at a time, so a broken line costs only that line. A line longer
    than MAX_LINE_BYTES is rejected without being held in memory, and so is a text file.
    A file that is empty, cut off or unreadable stops the build: it is more often a failed download
    than intended.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from data_pipeline.build.document import Document
from data_pipeline.build.mock_documents import invent_documents
from data_pipeline.build.stored_rows import read_build_texts, read_dataset_rows
from data_pipeline.build.units import Unit, is_compressed, split_into_units
from data_pipeline.config.source_config import SourceConfig, template_fields
from data_pipeline.errors import DataError
from data_pipeline.text.cleaning import Place, Tally, normalize, why_unusable
from data_pipeline.text.harmony import read_conversation

MAX_LINE_BYTES = 64 * 2**20
"""Length of the longest JSONL line or text file that is read."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20
_PARQUET_ROWS = 256
"""Rows of a Parquet file that are decoded at once."""


def read_texts(source: SourceConfig, tally: Tally) -> Iterator[str]:
    """Yield the usable texts of a source in order, and count everything in `tally`.

    Raises:
        DataError: a file is missing, empty or unreadable, or a Parquet file lacks the column.
    """
    lines_before = 0
    previous_paths = None
    for unit in split_into_units(source):
        if unit.paths != previous_paths:
            lines_before = 0
        previous_paths = unit.paths
        unit_tally = Tally()
        for document in read_documents(source, unit, unit_tally):
            yield document.text
        tally.add(unit_tally, lines_before)
        lines_before += unit_tally.lines


def read_documents(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    """Yield the usable documents of one unit; lines are counted from the start of the unit.

    Raises:
        DataError: a file is missing or unreadable, or a Parquet file lacks the column.
    """
    try:
        yield from _READERS[unit.format](source, unit, tally)
    except OSError as error:
        path = error.filename or (unit.paths[0] if unit.paths else source.name)
        hint = " Fetch it again." if "runcated" in str(error) else ""
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.{hint}") from error


def record_fields(source: SourceConfig) -> tuple[str, ...]:
    """Return the names of the fields that a record must have."""
    if source.template is not None:
        return template_fields(source.template)
    return (source.text_field,)


def _accept_record(
    source: SourceConfig, record: dict[str, Any], place: Place, tally: Tally
) -> Document | None:
    """Return the document of a record, or count why it cannot be used and return None."""
    if source.format == "harmony":
        conversation, reason = read_conversation(record, source.ignored_keys)
        if conversation is not None:
            tally.accepted += 1
            return Document.from_conversation(conversation, place)
    else:
        text, reason = _record_text(source, record)
        if reason is None:
            return _accept_text(source, text, place, tally)
    assert reason is not None, "a record that gives no document comes with a reason"
    tally.reject(reason, place)
    return None


def _record_text(source: SourceConfig, record: dict[str, Any]) -> tuple[Any, str | None]:
    """Return (value of the text field or filled template, None), or (None, reason)."""
    fields = record_fields(source)
    for field in fields:
        if field not in record:
            return None, f"no field '{field}'"
    if source.template is None:
        return record[source.text_field], None
    for field in fields:
        reason = why_unusable(record[field])
        if reason is not None:
            return None, f"field '{field}': {reason}"
    return source.template.format_map(record), None


def _accept_text(source: SourceConfig, text: Any, place: Place, tally: Tally) -> Document | None:
    """Normalize a text and return its document, or count why it cannot be used and return None."""
    if source.normalise and why_unusable(text) is None:
        text = normalize(text, source.normalise, tally.notes)
    if not tally.take(text, place):
        return None
    return Document.from_text(text)


def _accept_bytes(
    source: SourceConfig, content: bytes, place: Place, tally: Tally
) -> Document | None:
    """Return the document of a UTF-8 text, or count why it cannot be used and return None."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        tally.reject("invalid UTF-8", place)
        return None
    return _accept_text(source, text, place, tally)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open a file and decompress it on the way.

    Raises:
        OSError: the file cannot be read, or the compressed data is cut off.
    """
    if not is_compressed(path):
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            yield file
        return
    import pyarrow as pa

    kind = "gzip" if path.name.lower().endswith(".gz") else "zstd"
    try:
        with path.open("rb") as raw, pa.CompressedInputStream(pa.PythonFile(raw), kind) as stream:
            yield cast("IO[bytes]", io.BufferedReader(stream, _BUFFER_BYTES))
    except OSError as error:
        raise OSError(error.errno or 0, str(error), str(path)) from error


def _read_jsonl(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    (path,) = unit.paths
    with _open(path) as file:
        for number, line in _lines(file, path, unit, tally):
            place = Place(str(path), number)
            record, reason = _parse_line(line)
            if reason is not None:
                tally.reject(reason, place)
                continue
            document = _accept_record(source, record, place, tally)
            if document is not None:
                yield document


def _parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    """Return (record, None), or ({}, reason)."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "invalid UTF-8"
    except (ValueError, RecursionError):
        if line.endswith(b"\n"):
            return {}, "broken JSON"
        return {}, "last line cut off"
    if not isinstance(record, dict):
        return {}, "not a JSON object"
    return record, None


def _lines(file: IO[bytes], path: Path, unit: Unit, tally: Tally) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) for the lines of a unit that are neither blank nor too long."""
    stop = math.inf if is_compressed(path) else unit.stop
    position = _seek_first_line(file, unit)
    while position < stop:
        at_start_of_file = position == 0
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        position += len(line)
        tally.lines += 1
        too_long = len(line) > MAX_LINE_BYTES
        if at_start_of_file and line.startswith(_BYTE_ORDER_MARK):
            tally.notes["byte order mark"] += 1
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if too_long:
            while line and not line.endswith(b"\n") and position < stop:
                line = file.readline(_BUFFER_BYTES)
                position += len(line)
            tally.reject(f"line longer than {MAX_LINE_BYTES} bytes", Place(str(path), tally.lines))
        elif line.isspace():
            tally.notes["blank line"] += 1
        else:
            yield tally.lines, line


def _seek_first_line(file: IO[bytes], unit: Unit) -> int:
    """Go to the first line that begins in the unit, and return its position.

    The line that the byte before the unit belongs to is the previous unit's.
    """
    if not unit.start:
        return 0
    position = unit.start - 1
    file.seek(position)
    while position < unit.stop:
        line = file.readline(_BUFFER_BYTES)
        position += len(line)
        if not line or line.endswith(b"\n"):
            break
    return position


def _read_parquet(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (path,) = unit.paths
    fields = record_fields(source)
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, fields)
            number = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
            for values in _parquet_rows(file, unit, fields):
                number += 1
                place = Place(f"{path}: row {number}")
                try:
                    record = _decode_record(fields, values)
                except UnicodeDecodeError:
                    tally.reject("invalid UTF-8", place)
                    continue
                document = _accept_record(source, record, place, tally)
                if document is not None:
                    yield document
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error


def _parquet_rows(
    file: Any, unit: Unit, fields: tuple[str, ...]
) -> Iterator[tuple[bytes | None, ...]]:
    """Yield the values of `fields` in each row of a unit.

    Strings come as bytes, because one invalid string must not cost the whole batch.
    """
    import pyarrow as pa

    batches = file.iter_batches(
        batch_size=_PARQUET_ROWS,
        row_groups=list(range(unit.start, unit.stop)),
        columns=list(fields),
    )
    for batch in batches:
        columns = [batch.column(field).cast(pa.large_binary()).to_pylist() for field in fields]
        yield from zip(*columns, strict=True)


def _decode_record(
    fields: tuple[str, ...], values: tuple[bytes | None, ...]
) -> dict[str, str | None]:
    """Return a row as a record of texts.

    Raises:
        UnicodeDecodeError: a value is not UTF-8.
    """
    record: dict[str, str | None] = {}
    for field, value in zip(fields, values, strict=True):
        record[field] = None if value is None else value.decode("utf-8")
    return record


def _check_columns(path: Path, schema: Any, fields: tuple[str, ...]) -> None:
    import pyarrow as pa

    for field in fields:
        if field not in schema.names:
            raise DataError(
                f"{path}: no column '{field}'. It has: {', '.join(schema.names)}. Set text_field."
            )
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{path}: column '{field}' holds {kind}, must hold strings. Set text_field."
            )


def _read_text_files(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    for path in unit.paths:
        place = Place(str(path))
        with _open(path) as file:
            content = file.read(MAX_LINE_BYTES + 1)
        if len(content) > MAX_LINE_BYTES:
            tally.reject(f"text file longer than {MAX_LINE_BYTES} bytes", place)
            continue
        if content.startswith(_BYTE_ORDER_MARK):
            tally.notes["byte order mark"] += 1
            content = content.removeprefix(_BYTE_ORDER_MARK)
        if b"\r\n" in content:
            tally.notes["file with CRLF line ends, read as LF"] += 1
            content = content.replace(b"\r\n", b"\n")
        document = _accept_bytes(source, content, place, tally)
        if document is not None:
            yield document


def _read_dataset(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    name = unit.paths[0] if unit.paths else source.dataset
    rows = read_dataset_rows(source, unit.start, unit.stop, record_fields(source))
    for number, record in enumerate(rows, unit.start + 1):
        document = _accept_record(source, record, Place(f"{name}: row {number}"), tally)
        if document is not None:
            yield document


def _read_build(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    contents = read_build_texts(source, unit.start, unit.stop)
    for number, content in enumerate(contents, unit.start + 1):
        place = Place(f"{unit.paths[0]}: document {number}")
        document = _accept_bytes(source, content, place, tally)
        if document is not None:
            yield document


def _read_mock(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    for tokens in invent_documents(source, unit.start, unit.stop):
        tally.accepted += 1
        yield Document.from_invented_tokens(tokens)


_READERS: dict[str, Callable[[SourceConfig, Unit, Tally], Iterator[Document]]] = {
    "jsonl": _read_jsonl,
    "harmony": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text_files,
    "huggingface": _read_dataset,
    "build": _read_build,
    "mock": _read_mock,
}
"""Readers by the format of a unit."""
