"""Units of a source -> documents.

    unit -> lines, rows or files -> text field or template -> normalized -> usable? -> Document
                                                                               |
                                            counted by reason, file and line <-+

Decisions
    Files are read in the order given, and the files of a glob by name, so the order of the
    documents depends on nothing else.
    JSONL is read as bytes, one line at a time, so a broken line costs only that line. A line longer
    than MAX_LINE_BYTES is rejected without being held in memory, and so is a text file.
    A record that gives a key twice is rejected if the key decides its text: JSON does not say which
    value is meant.
    A file that is empty, cut off or unreadable stops the build: it is more often a failed download
    than intended. A text file that is no text is one document, so it is counted as a reject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_pipeline.config.source_config import SourceConfig, fill_template
from data_pipeline.errors import DataError
from data_pipeline.reading.clusters import NO_CLUSTER, cluster_of
from data_pipeline.reading.document import Document, hash_of
from data_pipeline.reading.hooks import DROPPED, run_hook
from data_pipeline.reading.json_records import parse_record
from data_pipeline.reading.kept_fields import kept_values
from data_pipeline.reading.mock_documents import invent_documents
from data_pipeline.reading.parquet_files import parquet_batches
from data_pipeline.reading.record_fields import text_fields, value_fields, why_filtered
from data_pipeline.reading.stored_rows import (
    holds_conversations,
    read_build_conversations,
    read_build_texts,
    read_dataset_rows,
)
from data_pipeline.reading.table_columns import table_records
from data_pipeline.reading.units import Unit, split_into_units
from data_pipeline.reading.unreadable_files import unreadable, why_no_text
from data_pipeline.store.provenance import place_of
from data_pipeline.store.text_files import open_text, text_layers
from data_pipeline.text.cleaning import (
    MAX_DOCUMENT_BYTES,
    Place,
    Tally,
    normalize,
    why_not_cleanable,
    why_unusable,
)
from data_pipeline.text.conversation_reader import read_conversations
from data_pipeline.text.harmony import Conversation
from data_pipeline.text.record_keys import ABSENT, find_field
from data_pipeline.text.record_shapes import keys_read

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LINE_BYTES = MAX_DOCUMENT_BYTES
"""Length of the longest JSONL line or text file that is read."""
TOO_LONG = "conversation longer than a row"
"""Beginning of the reason why a conversation is left out."""
_LONG_BYTES_PER_TOKEN = 4
"""UTF-8 bytes for each token of a row from which on a conversation looks too long."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20


def read_texts(source: SourceConfig, tally: Tally) -> Iterator[str]:
    """Yield the usable texts of a source in order, and count everything in `tally`.

    Raises:
        DataError: a file is missing, empty, unreadable or not of its format, or a table lacks the
            column.
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


def read_documents(
    source: SourceConfig, unit: Unit, tally: Tally, seq_len: int | None = None
) -> Iterator[Document]:
    """Yield the usable documents of one unit; lines are counted from the start of the unit.

    Args:
        source: The source.
        unit: Stretch of its input.
        tally: Counts of the documents, by what became of them; raised.
        seq_len: Tokens of a row. With `turns: each` the turns from the first one on that no row has
            room for are counted and not made.

    Raises:
        DataError: a file is missing or unreadable, or a table lacks the column.
    """
    try:
        for piece in unit.pieces():
            yield from _READERS[unit.format](source, piece, tally, seq_len)
    except OSError as error:
        raise unreadable(unit.paths[0] if unit.paths else source.name, error) from error


def why_too_long(seq_len: int) -> str:
    """Return the reason why a conversation that fits no row is left out."""
    return f"{TOO_LONG} of {seq_len} tokens"


def _located(
    document: Document,
    source: SourceConfig,
    path: str,
    origin: int,
    record: Mapping[str, Any],
    tally: Tally,
) -> Document:
    """Return a document with its origin, the fields to keep, and the cluster that it belongs to.

    A document without the key of its cluster is counted.
    """
    cluster = NO_CLUSTER
    if source.cluster_by is not None:
        cluster = cluster_of(source.cluster_by, path, record)
        if cluster == NO_CLUSTER:
            tally.notes[f"document without '{source.cluster_by:.40}' (cluster_by)"] += 1
    kept = kept_values(source.keep, record) if source.keep else ()
    return document.located(origin, cluster, kept)


def _accept_record(
    source: SourceConfig,
    record: dict[str, Any],
    place: Place,
    tally: Tally,
    seq_len: int | None,
) -> Iterable[Document]:
    """Return the documents of a record, and count why it, or a part of it, cannot be used."""
    filtered = why_filtered(source, record)
    if filtered is not None:
        tally.filter(filtered)
        return ()
    if source.format == "harmony":
        return _accept_conversations(source, record, place, tally, seq_len)
    text, reason = _record_text(source, record)
    if reason is not None:
        tally.reject(reason, place)
        return ()
    document = _accept_text(source, text, place, tally, record)
    return () if document is None else (document,)


def _accept_conversations(
    source: SourceConfig,
    record: dict[str, Any],
    place: Place,
    tally: Tally,
    seq_len: int | None,
) -> Iterator[Document]:
    reading = read_conversations(_without_own_fields(source, record), source)
    for reason in reading.rejects:
        tally.reject(reason, place)
    tally.notes.update(reading.notes)
    record_hash = 0
    if source.turns == "each" and reading.whole is not None:
        record_hash = hash_of(reading.whole.as_seen())
    for number, conversation in enumerate(reading.conversations()):
        if source.turns == "each" and seq_len is not None and _outgrows(conversation, seq_len):
            for _ in reading.turns[number:]:
                tally.reject(why_too_long(seq_len), place)
            return
        tally.accepted += 1
        if source.loss == "all":
            yield Document.from_conversation(conversation, place)
        else:
            yield Document.from_turn(conversation, record_hash, place)


def _outgrows(conversation: Conversation, seq_len: int) -> bool:
    """Return whether neither this turn nor a later one of its record fits a row.

    It costs as much as to tokenize the turn, so it is asked of those that look too long.
    """
    if conversation.num_bytes <= _LONG_BYTES_PER_TOKEN * seq_len:
        return False
    return conversation.num_lasting_tokens() > seq_len


def _without_own_fields(source: SourceConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation without the keys of filters and of `keep`, which it would not know."""
    if not (source.filters or source.keep):
        return record
    read = {*source.keep, *(rule.field for rule in source.filters)}
    read |= {field.partition(".")[0] for field in read}
    read -= keys_read(record, source.shape, source.template)
    return {key: value for key, value in record.items() if key not in read}


def _record_text(source: SourceConfig, record: dict[str, Any]) -> tuple[Any, str | None]:
    """Return (value of the text field or filled template, None), or (None, reason)."""
    values = {}
    for field in text_fields(source):
        values[field] = find_field(record, field)
        if values[field] is ABSENT:
            return None, f"no field '{field}'"
    if source.template is None:
        return values[source.text_field], None
    for field, value in values.items():
        reason = why_not_cleanable(value, source.normalise)
        if reason is not None:
            return None, f"field '{field}': {reason}"
    return fill_template(source.template, values), None


def _accept_text(
    source: SourceConfig, text: Any, place: Place, tally: Tally, record: Mapping[str, Any]
) -> Document | None:
    """Normalize a text and return its document, or count why it cannot be used and return None."""
    if source.normalise:
        reason = why_not_cleanable(text, source.normalise)
        if reason is not None:
            tally.reject(reason, place)
            return None
        text = normalize(text, source.normalise, tally.notes)
    if source.hook is not None and why_unusable(text) is None:
        text, reason = run_hook(source, text, record)
        if reason is not None:
            tally.reject(reason, place)
            return None
        if text is None:
            tally.filter(DROPPED)
            return None
    if not tally.take(text, place):
        return None
    if source.min_characters is not None and len(text) < source.min_characters:
        tally.withdraw_filtered(f"fewer than {source.min_characters} characters", 0)
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
    return _accept_text(source, text, place, tally, {})


def _read_jsonl(
    source: SourceConfig, unit: Unit, tally: Tally, seq_len: int | None
) -> Iterator[Document]:
    (path,) = unit.paths
    layers = text_layers(path)
    stop = unit.stop if layers.is_plain else math.inf
    if not unit.start:
        tally.notes.update(layers.notes())
    with open_text(path, layers) as file:
        for number, line in _lines(file, path, unit, stop, tally):
            place = Place(str(path), number)
            record, reason = parse_record(source, line, tally)
            if reason is not None:
                tally.reject(reason, place)
                continue
            for document in _accept_record(source, record, place, tally, seq_len):
                origin = place_of(unit.file_number, number)
                yield _located(document, source, str(path), origin, record, tally)


def _lines(
    file: IO[bytes], path: Path, unit: Unit, stop: float, tally: Tally
) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) for the lines of a unit that are neither blank nor too long.

    A line belongs to the unit if it begins before `stop`.
    """
    position = _seek_first_line(file, unit)
    lines_before = tally.lines  # of other files of a group
    while position < stop:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        position += len(line)
        tally.lines += 1
        too_long = len(line) > MAX_LINE_BYTES
        if line.startswith(_BYTE_ORDER_MARK):  # of the file, or of one that was appended to it
            tally.notes["byte order mark"] += 1
            line = _without_marks(line)
        if too_long:
            while line and not line.endswith(b"\n") and position < stop:
                line = file.readline(_BUFFER_BYTES)
                position += len(line)
            place = Place(str(path), tally.lines - lines_before)
            tally.reject(f"line longer than {MAX_LINE_BYTES} bytes", place)
        elif not line.strip():
            tally.notes["blank line"] += 1
        else:
            yield tally.lines - lines_before, line


def _without_marks(content: bytes) -> bytes:
    while content.startswith(_BYTE_ORDER_MARK):
        content = content.removeprefix(_BYTE_ORDER_MARK)
    return content


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


def _read_parquet(
    source: SourceConfig, unit: Unit, tally: Tally, seq_len: int | None
) -> Iterator[Document]:
    (path,) = unit.paths
    groups = range(unit.start, unit.stop)
    fields = (text_fields(source), value_fields(source))
    for rows_before, batch in parquet_batches(path, groups, *fields):
        yield from _table_documents(
            source, batch, str(path), rows_before, tally, seq_len, unit.file_number
        )


def _table_documents(
    source: SourceConfig,
    table: pa.RecordBatch | pa.Table,
    name: str,
    rows_before: int,
    tally: Tally,
    seq_len: int | None,
    file_number: int = 0,
) -> Iterator[Document]:
    """Yield the usable documents of a batch or table of rows."""
    records = table_records(name, table, (*text_fields(source), *value_fields(source)))
    for number, (record, reason) in enumerate(records, rows_before + 1):
        place = Place(f"{name}: row {number}")
        if reason is not None:
            tally.reject(reason, place)
            continue
        for document in _accept_record(source, record, place, tally, seq_len):
            origin = place_of(file_number, number)
            yield _located(document, source, name, origin, record, tally)


def _read_text_files(
    source: SourceConfig, unit: Unit, tally: Tally, _: int | None
) -> Iterator[Document]:
    for file_number, path in enumerate(unit.paths):
        place = Place(str(path))
        layers = text_layers(path)
        reason = why_no_text(path, layers)
        if reason is not None:
            tally.reject(reason, place)
            continue
        tally.notes.update(layers.notes())
        with open_text(path, layers) as file:
            content = file.read(MAX_LINE_BYTES + 1)
        if len(content) > MAX_LINE_BYTES:
            tally.reject(f"text file longer than {MAX_LINE_BYTES} bytes", place)
            continue
        document = _accept_bytes(source, _unify_text_file(content, tally), place, tally)
        if document is not None:
            origin = place_of(file_number, 1)
            yield _located(document, source, str(path), origin, {}, tally)


def _unify_text_file(content: bytes, tally: Tally) -> bytes:
    """Return a text file without byte order marks and with LF as its line ends."""
    if content.startswith(_BYTE_ORDER_MARK):
        tally.notes["byte order mark"] += 1
        content = _without_marks(content)
    if b"\r\n" in content:
        tally.notes["file with CRLF line ends, read as LF"] += 1
        content = content.replace(b"\r\n", b"\n")
    if b"\n" + _BYTE_ORDER_MARK in content:  # files with marks were joined to one
        tally.notes["byte order mark inside a file"] += 1
        content = content.replace(b"\n" + _BYTE_ORDER_MARK, b"\n")
    return content


def _read_dataset(
    source: SourceConfig, unit: Unit, tally: Tally, seq_len: int | None
) -> Iterator[Document]:
    name = str(unit.paths[0] if unit.paths else source.dataset)
    number = unit.start
    fields = (text_fields(source), value_fields(source))
    for table in read_dataset_rows(source, unit.start, unit.stop, *fields):
        yield from _table_documents(source, table, name, number, tally, seq_len)
        number += table.num_rows


def _read_build(
    source: SourceConfig, unit: Unit, tally: Tally, _: int | None
) -> Iterator[Document]:
    if holds_conversations(source):
        yield from _read_build_conversations(source, unit, tally)
        return
    contents = read_build_texts(source, unit.start, unit.stop)
    for number, content in enumerate(contents, unit.start + 1):
        place = Place(f"{unit.paths[0]}: document {number}")
        document = _accept_bytes(source, content, place, tally)
        if document is not None:
            yield document.located(number)


def _read_build_conversations(source: SourceConfig, unit: Unit, tally: Tally) -> Iterator[Document]:
    if source.hook is not None or source.normalise or source.min_characters is not None:
        raise DataError(
            f"source '{source.name}': the build holds conversations, which have no plain text for "
            "hook, normalise or min_characters. Remove these keys."
        )
    stored = read_build_conversations(source, unit.start, unit.stop)
    for number, conversation in enumerate(stored, unit.start + 1):
        tally.accepted += 1
        place = Place(f"{unit.paths[0]}: document {number}")
        yield Document.from_stored_conversation(conversation, place).located(number)


def _read_mock(source: SourceConfig, unit: Unit, tally: Tally, _: int | None) -> Iterator[Document]:
    invented = invent_documents(source, unit.start, unit.stop)
    for number, tokens in enumerate(invented, unit.start + 1):
        tally.accepted += 1
        yield Document.from_invented_tokens(tokens).located(number)


_READERS: dict[str, Callable[[SourceConfig, Unit, Tally, int | None], Iterator[Document]]] = {
    "jsonl": _read_jsonl,
    "harmony": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text_files,
    "huggingface": _read_dataset,
    "build": _read_build,
    "mock": _read_mock,
}
"""Readers by the format of a unit."""
