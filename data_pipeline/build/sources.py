"""Units of a source -> texts, and invented documents for speed tests.

    unit -> lines, rows or files -> text field or template -> usable? -> normalised -> text
                                                                 |
                                                                 +-> counted by reason, with file
                                                                 and line

Decisions
    Files are read in the order given, a glob's files by name, so the order of documents depends on
    nothing else. JSONL is read as bytes, one line at a time: a broken line costs that line.  A line
    longer than MAX_LINE_BYTES is rejected without being held in memory, and so is a text file.
    A file that is empty, cut off or unreadable stops the build: it is more often a failed download
    than a wish.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from data_pipeline.build.stored_rows import read_build, read_dataset
from data_pipeline.build.units import Unit, compressed, split
from data_pipeline.config.source_config import SourceConfig, template_fields
from data_pipeline.errors import DataError
from data_pipeline.store.hashing import splitmix64
from data_pipeline.text.cleaning import Place, Tally, normalise, why_unusable
from data_pipeline.text.harmony import Conversation, read_conversation
from data_pipeline.text.tokenizer import NUM_TEXT_TOKENS, Tokens

MAX_LINE_BYTES = 64 * 2**20
"""Bytes; the longest JSONL line or text file that is read."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20
_PARQUET_ROWS = 256


def read_texts(source: SourceConfig, tally: Tally) -> Iterator[str]:
    """Usable texts of a source in order, normalised; everything else is counted in `tally`.

    Raises:
        DataError: a file is missing, empty or unreadable, or a Parquet file lacks the column.
    """
    lines, previous = 0, None
    for unit in split(source):
        lines = lines if unit.paths == previous else 0
        part, previous = Tally(), unit.paths
        yield from read_unit(source, unit, part)
        tally.add(part, lines)
        lines += part.lines


def read_unit(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[str]:
    """Usable texts of one unit, as in `read_texts`; lines are counted from the start of the
    unit.
    """
    for document in read_documents(source, unit, tally):
        yield document.text if isinstance(document, Conversation) else document


def read_documents(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[str | Conversation]:
    """What `read_unit` reads, before the format of a conversation is lost."""
    readers: dict[str, Callable[[SourceConfig, Unit, Tally], Iterator[tuple[Any, Place]]]]
    readers = {
        "jsonl": _read_jsonl,
        "harmony": _read_jsonl,
        "parquet": _read_parquet,
        "text": _read_text,
    }
    readers |= {"huggingface": _read_dataset, "build": _read_build}
    try:
        for text, place in readers[unit.format](source, unit, tally):
            if isinstance(text, Conversation):
                tally.accepted += 1
                yield text
                continue
            if why_unusable(text) is None and source.normalise:
                text = normalise(text, source.normalise, tally.notes)
            if tally.take(text, place):
                yield text
    except OSError as error:
        path = error.filename or (unit.paths[0] if unit.paths else source.name)
        hint = " Fetch it again." if "runcated" in str(error) else ""
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.{hint}") from error


def fields_of(source: SourceConfig) -> tuple[str, ...]:
    """Fields that a record must have."""
    return template_fields(source.template) if source.template is not None else (source.text_field,)


def _text_of(source: SourceConfig, record: dict[str, Any]) -> tuple[Any, str | None]:
    """(text or conversation, None), or (None, reason)."""
    if source.format == "harmony":
        return read_conversation(record)
    for field in fields_of(source):
        if field not in record:
            return None, f"no field '{field}'"
    if source.template is None:
        return record[source.text_field], None
    for field in fields_of(source):
        reason = why_unusable(record[field])
        if reason is not None:
            return None, f"field '{field}': {reason}"
    return source.template.format_map(record), None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A file for reading, decompressed on the way; a cut-off one raises OSError."""
    if not compressed(path):
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


def _read_jsonl(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[tuple[Any, Place]]:
    (path,) = unit.paths
    with _open(path) as file:
        for number, line in _lines(file, path, unit, tally):
            place = Place(str(path), number)
            record, reason = _parse_line(line)
            if reason is None:
                text, reason = _text_of(source, record)
            if reason is not None:
                cut_off = reason == "broken JSON" and not line.endswith(b"\n")
                tally.reject("last line cut off" if cut_off else reason, place)
            else:
                yield text, place


def _lines(file: IO[bytes], path: Path, unit: Unit, tally: Tally) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of each line of the unit that is neither blank nor too long."""
    stop = unit.stop if not compressed(path) else None
    position = unit.start
    if unit.start:
        # the line that the byte before the unit belongs to is the previous unit's
        file.seek(unit.start - 1)
        position = unit.start - 1
        while position < unit.stop:
            line = file.readline(_BUFFER_BYTES)
            position += len(line)
            if not line or line.endswith(b"\n"):
                break
    while (stop is None or position < stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
        at_start, too_long = position == 0, len(line) > MAX_LINE_BYTES
        position += len(line)
        tally.lines += 1
        if at_start and line.startswith(_BYTE_ORDER_MARK):
            tally.notes["byte order mark"] += 1
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if too_long:
            while line and not line.endswith(b"\n") and (stop is None or position < stop):
                line = file.readline(_BUFFER_BYTES)
                position += len(line)
            tally.reject(f"line longer than {MAX_LINE_BYTES} bytes", Place(str(path), tally.lines))
        elif not line.isspace():
            yield tally.lines, line
        else:
            tally.notes["blank line"] += 1


def _parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(record, None), or ({}, reason)."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "invalid UTF-8"
    except (ValueError, RecursionError):
        return {}, "broken JSON"
    return (record, None) if isinstance(record, dict) else ({}, "not a JSON object")


def _read_parquet(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[tuple[Any, Place]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (path,) = unit.paths
    fields = fields_of(source)
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, fields)
            number = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
            groups = list(range(unit.start, unit.stop))
            for batch in file.iter_batches(
                batch_size=_PARQUET_ROWS, row_groups=groups, columns=list(fields)
            ):
                # as bytes: one invalid string must not cost the whole batch
                columns = [
                    batch.column(field).cast(pa.large_binary()).to_pylist() for field in fields
                ]
                for values in zip(*columns, strict=True):
                    number += 1
                    place = Place(f"{path}: row {number}")
                    decoded = [_decode(value, place, tally) for value in values]
                    if _REJECTED not in decoded:
                        text, reason = _text_of(source, dict(zip(fields, decoded, strict=True)))
                        if reason is None:
                            yield text, place
                        else:
                            tally.reject(reason, place)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error


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


def _read_text(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[tuple[Any, Place]]:
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
        text = _decode(content, place, tally)
        if text is not _REJECTED:
            yield text, place


def _read_dataset(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[tuple[Any, Place]]:
    name = unit.paths[0] if unit.paths else source.dataset
    rows = read_dataset(source, unit.start, unit.stop, fields_of(source))
    for number, record in enumerate(rows, unit.start + 1):
        place = Place(f"{name}: row {number}")
        text, reason = _text_of(source, record)
        if reason is None:
            yield text, place
        else:
            tally.reject(reason, place)


def _read_build(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[tuple[Any, Place]]:
    for number, content in enumerate(read_build(source, unit.start, unit.stop), unit.start + 1):
        place = Place(f"{unit.paths[0]}: document {number}")
        text = _decode(content, place, tally)
        if text is not _REJECTED:
            yield text, place


_REJECTED = object()
"""Stands for a value that was counted as a reject already."""


def _decode(value: bytes | None, place: Place, tally: Tally) -> Any:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        tally.reject("invalid UTF-8", place)
        return _REJECTED


def invent_documents(
    source: SourceConfig, key: int, start: int = 0, stop: int | None = None
) -> Iterator[Tokens]:
    """Random text tokens, END_OF_TEXT not included; lengths spread evenly over half to one and a
    half of the mean.
    """
    assert source.num_documents is not None and source.mean_tokens is not None
    documents = np.arange(start, source.num_documents if stop is None else stop, dtype=np.uint64)
    numbers = splitmix64(documents ^ np.uint64(key))
    lengths = source.mean_tokens // 2 + numbers % np.uint64(source.mean_tokens + 1)
    for number, length in zip(numbers, lengths.tolist(), strict=True):
        scattered = splitmix64(np.arange(length, dtype=np.uint64) + number)
        yield (scattered % np.uint64(NUM_TEXT_TOKENS)).astype(np.uint32)
