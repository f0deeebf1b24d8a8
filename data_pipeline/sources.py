"""Input files -> texts, and invented documents for speed tests.

    file -> lines, rows or the whole -> text field -> usable? -> text
                                                         |
                                                         +-> counted by reason, with file and line

Decisions
    Files are read in the order given, a glob's files by name, so the order of documents depends on nothing else.
    JSONL is read as bytes, one line at a time: a broken line costs that line.  A line longer than MAX_LINE_BYTES is
    rejected without being held in memory.
    A file that is empty or unreadable stops the build: it is more often a failed download than a wish.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.clean import Tally
from data_pipeline.errors import DataError
from data_pipeline.schema import SourceConfig
from data_pipeline.tokenizer import NUM_TEXT_TOKENS, Tokens

MAX_LINE_BYTES = 64 * 2**20
"""Bytes; the longest JSONL line that is read."""
MOCK_BYTES_PER_TOKEN = 4
"""Bytes; what an invented token is said to stand for."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1024


def read_texts(source: SourceConfig, tally: Tally) -> Iterator[str]:
    """Usable texts of a source in order; everything else is counted in `tally`.

    Raises:
        DataError: a file is missing, empty or unreadable, or a Parquet file lacks the column.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    for path in source.files():
        kind = source.format_of(path)
        assert kind in readers, f"{path}: load_mix lets no unknown suffix through"
        try:
            if path.stat().st_size == 0:
                raise DataError(f"{path}: empty file (source '{source.name}'). Remove it or fetch it again.")
            yield from readers[kind](path, source.text_field, tally)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path, text_field: str, tally: Tally) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in _lines(file, path, tally):
            text, reason = _parse_line(line, text_field)
            if reason is not None:
                cut_off = reason == "broken JSON" and not line.endswith(b"\n")
                tally.reject("last line cut off" if cut_off else reason, f"{path}:{number}")
            elif tally.take(text, f"{path}:{number}"):
                yield text


def _lines(file: IO[bytes], path: Path, tally: Tally) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of each line that is neither blank nor too long."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1 and line.startswith(_BYTE_ORDER_MARK):
            tally.notes["byte order mark"] += 1
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            tally.reject(f"line longer than {MAX_LINE_BYTES} bytes", f"{path}:{number}")
        elif line.strip():
            yield number, line
        else:
            tally.notes["blank line"] += 1


def _parse_line(line: bytes, text_field: str) -> tuple[Any, str | None]:
    """(value of the text field, None) or (None, reason)."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "broken JSON"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    if text_field not in record:
        return None, f"no field '{text_field}'"
    return record[text_field], None


def _read_parquet(path: Path, text_field: str, tally: Tally) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if text_field not in schema.names:
            raise DataError(f"{path}: no column '{text_field}'. It has: {', '.join(schema.names)}. Set text_field.")
        is_text = pa.types.is_string(schema.field(text_field).type) or pa.types.is_large_string(
            schema.field(text_field).type
        )
        if not is_text:
            kind = schema.field(text_field).type
            raise DataError(f"{path}: column '{text_field}' holds {kind}, must hold strings. Set text_field.")
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
            # as bytes: one invalid string must not cost the whole batch
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                number += 1
                yield from _decode(value, f"{path}: row {number}", tally)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error


def _read_text(path: Path, text_field: str, tally: Tally) -> Iterator[str]:
    del text_field
    content = path.read_bytes()
    if content.startswith(_BYTE_ORDER_MARK):
        tally.notes["byte order mark"] += 1
        content = content.removeprefix(_BYTE_ORDER_MARK)
    if b"\r\n" in content:
        tally.notes["file with CRLF line ends, read as LF"] += 1
        content = content.replace(b"\r\n", b"\n")
    yield from _decode(content, str(path), tally)


def _decode(value: bytes | None, place: str, tally: Tally) -> Iterator[str]:
    try:
        text = None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        tally.reject("invalid UTF-8", place)
        return
    if tally.take(text, place):
        assert text is not None
        yield text


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele et al. 2014): a fixed bijection that scatters 64-bit integers.

    The same in every numpy version, which numpy's own generators do not promise for shuffles.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def invent_documents(source: SourceConfig, key: int) -> Iterator[Tokens]:
    """Random text tokens, END_OF_TEXT not included; lengths spread evenly over half to one and a half of the mean."""
    assert source.num_documents is not None and source.mean_tokens is not None
    start = np.uint64(key)
    numbers = splitmix64(np.arange(source.num_documents, dtype=np.uint64) ^ start)
    lengths = source.mean_tokens // 2 + numbers % np.uint64(source.mean_tokens + 1)
    for number, length in zip(numbers, lengths.tolist(), strict=True):
        scattered = splitmix64(np.arange(length, dtype=np.uint64) + number)
        yield (scattered % np.uint64(NUM_TEXT_TOKENS)).astype(np.uint32)
