"""A source -> units: stretches of its input that are read, cleaned and tokenised on their own.

Decisions
    Units follow from the input alone, never from the number of workers: the same input gives the
    same units, in the same order, wherever it is built.
    A JSONL file is cut by bytes, a line belonging to the unit that its first byte lies in; a
    Parquet file by row groups; a dataset or an earlier build by rows; text files are gathered.  A
    compressed file cannot be cut. Units are large enough that no source has many more than
    MAX_UNITS of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.config.source_config import COMPRESSIONS, SourceConfig
from data_pipeline.errors import DataError

MIN_UNIT_BYTES = 16 * 2**20
"""Bytes of input; some seconds of work, which is what a kill costs at most."""
MAX_UNITS = 1024
"""Units per source, about; every one becomes a token shard."""
MOCK_BYTES_PER_TOKEN = 4
"""Bytes; what an invented token is said to stand for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One stretch of a source."""

    paths: tuple[Path, ...] = ()
    """One file, or several text files; a folder for datasets and builds."""
    format: str
    """How to read it: jsonl, parquet, text, harmony, huggingface, build, mock."""
    start: int = 0
    """First byte (JSONL), row group (Parquet), row or document."""
    stop: int = 0
    """One past the last."""
    size_bytes: int
    """Bytes of input, for the progress bar."""


def split(source: SourceConfig) -> list[Unit]:
    """The units of a source, in order.

    Raises:
        DataError: a file is missing, empty or unreadable.
    """
    if source.format == "mock":
        return list(_mock_units(source))
    if source.format in ("huggingface", "build"):
        from data_pipeline.build.stored_rows import count_rows

        return list(_row_units(source, *count_rows(source)))
    files = source.files()
    sizes = [_size(path, source) for path in files]
    unit_bytes = max(MIN_UNIT_BYTES, sum(sizes) // MAX_UNITS)
    units: list[Unit] = []
    texts: list[tuple[Path, int]] = []
    for path, size in zip(files, sizes, strict=True):
        kind = source.format_of(path)
        assert kind is not None, f"{path}: load_mix lets no unknown suffix through"
        if kind == "text" and not compressed(path):
            texts.append((path, size))
            if sum(size for _, size in texts) >= unit_bytes:
                units.append(_text_unit(texts))
                texts = []
            continue
        if texts:
            units.append(_text_unit(texts))
            texts = []
        units.extend(_file_units(path, kind, size, unit_bytes))
    return [*units, _text_unit(texts)] if texts else units


def compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.name.lower().endswith(COMPRESSIONS)


def _size(path: Path, source: SourceConfig) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if size == 0:
        raise DataError(
            f"{path}: empty file (source '{source.name}'). Remove it or fetch it again."
        )
    return size


def _text_unit(texts: Sequence[tuple[Path, int]]) -> Unit:
    return Unit(
        paths=tuple(path for path, _ in texts),
        format="text",
        size_bytes=sum(size for _, size in texts),
    )


def _file_units(path: Path, kind: str, size: int, unit_bytes: int) -> Iterator[Unit]:
    if kind == "parquet":
        yield from _parquet_units(path, unit_bytes)
    elif kind in ("jsonl", "harmony") and not compressed(path):
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Unit(paths=(path,), format=kind, start=start, stop=stop, size_bytes=stop - start)
    else:
        yield Unit(paths=(path,), format=kind, stop=size, size_bytes=size)


def _parquet_units(path: Path, unit_bytes: int) -> Iterator[Unit]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            sizes = [
                file.metadata.row_group(number).total_byte_size
                for number in range(file.num_row_groups)
            ]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}.") from error
    start, gathered = 0, 0
    for number, size in enumerate(sizes):
        gathered += size
        if gathered >= unit_bytes or number == len(sizes) - 1:
            yield Unit(
                paths=(path,), format="parquet", start=start, stop=number + 1, size_bytes=gathered
            )
            start, gathered = number + 1, 0


def _row_units(source: SourceConfig, num_rows: int, size_bytes: int) -> Iterator[Unit]:
    """Stretches of rows of about equal size."""
    unit_bytes = max(MIN_UNIT_BYTES, size_bytes // MAX_UNITS)
    rows = max(1, -(-num_rows * unit_bytes // max(size_bytes, 1)))
    paths = tuple(map(Path, source.patterns()))
    for start in range(0, num_rows, rows):
        stop = min(start + rows, num_rows)
        share = size_bytes * (stop - start) // max(num_rows, 1)
        yield Unit(paths=paths, format=source.format, start=start, stop=stop, size_bytes=share)


def _mock_units(source: SourceConfig) -> Iterator[Unit]:
    assert source.num_documents is not None and source.mean_tokens is not None
    total = source.num_documents * source.mean_tokens * MOCK_BYTES_PER_TOKEN
    yield from _row_units(source, source.num_documents, total)
