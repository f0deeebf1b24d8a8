"""A source -> units: stretches of its input that are read, cleaned and tokenized on their own.

Decisions
    Units follow from the input alone, never from the number of workers: the same input gives the
    same units, in the same order, wherever it is built.
    A JSONL file is cut by bytes, and a line belongs to the unit that its first byte lies in. A
    Parquet file is cut by row groups, a dataset or an earlier build by rows. Text files are
    gathered until they make a unit. A file that is compressed, in UTF-16 or UTF-32, or has CR line
    ends cannot be cut.
    Every file is looked at before the first one is read: what it is decides, not what it is called.
    Units are large enough that no source has many more than MAX_UNITS of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.build.document import BYTES_PER_INVENTED_TOKEN
from data_pipeline.build.parquet_files import row_group_bytes
from data_pipeline.build.stored_rows import count_rows
from data_pipeline.build.unreadable_files import (
    check_jsonl,
    check_not_empty,
    check_parquet,
    unreadable,
)
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.store.file_kinds import FileKind
from data_pipeline.store.text_files import TextLayers, text_layers

MIN_UNIT_BYTES = 16 * 2**20
"""Bytes of input that make a unit: some seconds of work, which is what a kill costs at most."""
MAX_UNITS = 1024
"""Number of units per source, about; every unit becomes a token shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One stretch of the input of a source."""

    paths: tuple[Path, ...] = ()
    """One file, several text files, or the folder of a dataset or build."""
    format: str
    """Way to read it: jsonl, parquet, text, harmony, huggingface, build or mock."""
    start: int = 0
    """First byte (JSONL), row group (Parquet), row or document."""
    stop: int = 0
    """One past the last byte, row group, row or document."""
    size_bytes: int
    """Bytes of input, for the progress bar."""


def split_into_units(source: SourceConfig) -> list[Unit]:
    """Return the units of a source, in order.

    Raises:
        DataError: a file is missing, empty or unreadable.
    """
    if source.format == "mock":
        return list(_mock_units(source))
    if source.format in ("huggingface", "build"):
        return list(_row_units(source, *count_rows(source)))
    return list(_files_units(source))


def _files_units(source: SourceConfig) -> Iterator[Unit]:
    files = source.files()
    sizes = [_size_bytes(path, source) for path in files]
    unit_bytes = max(MIN_UNIT_BYTES, sum(sizes) // MAX_UNITS)
    texts = _TextFiles()
    for path, size_bytes in zip(files, sizes, strict=True):
        layers = _layers(path)
        kind = _format_of(path, source, layers)
        if kind == "text" and layers.is_plain:
            texts.add(path, size_bytes)
            if texts.size_bytes >= unit_bytes:
                yield from texts.take()
        else:
            yield from texts.take()  # documents stay in the order of the files
            yield from _file_units(path, kind, size_bytes, unit_bytes, layers)
    yield from texts.take()


def _layers(path: Path) -> TextLayers:
    try:
        return text_layers(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _format_of(path: Path, source: SourceConfig, layers: TextLayers) -> str:
    """Return the format to read a file in, once its content is known to be of that format.

    Raises:
        DataError: it is something else.
    """
    kind = source.format_of(path)
    assert kind is not None, f"{path}: load_mix lets no unknown suffix through"
    if source.format == "auto" and layers.kind is FileKind.PARQUET:
        kind = "parquet"
    check_not_empty(path, source, layers)
    if kind == "parquet":
        check_parquet(path, source)
    elif kind in ("jsonl", "harmony"):
        check_jsonl(path, source, layers)
    return kind


class _TextFiles:
    """Text files that wait to become one unit."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self.size_bytes = 0

    def add(self, path: Path, size_bytes: int) -> None:
        """Let one more file wait."""
        self._paths.append(path)
        self.size_bytes += size_bytes

    def take(self) -> Iterator[Unit]:
        """Yield the waiting files as a unit, if there are any, and start anew."""
        if self._paths:
            yield Unit(paths=tuple(self._paths), format="text", size_bytes=self.size_bytes)
        self._paths = []
        self.size_bytes = 0


def _size_bytes(path: Path, source: SourceConfig) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error
    if size == 0:
        raise DataError(
            f"{path}: empty file (source '{source.name}'). Remove it or fetch it again."
        )
    return size


def _file_units(
    path: Path, kind: str, size_bytes: int, unit_bytes: int, layers: TextLayers
) -> Iterator[Unit]:
    if kind == "parquet":
        yield from _parquet_units(path, unit_bytes)
    elif kind in ("jsonl", "harmony") and layers.is_plain:
        for start in range(0, size_bytes, unit_bytes):
            stop = min(start + unit_bytes, size_bytes)
            yield Unit(paths=(path,), format=kind, start=start, stop=stop, size_bytes=stop - start)
    else:
        yield Unit(paths=(path,), format=kind, stop=size_bytes, size_bytes=size_bytes)


def _parquet_units(path: Path, unit_bytes: int) -> Iterator[Unit]:
    sizes = row_group_bytes(path)
    if not sizes:
        raise DataError(f"{path}: has no rows. Remove it or fetch it again.")
    start = 0
    gathered = 0
    for number, size in enumerate(sizes):
        gathered += size
        if gathered >= unit_bytes or number == len(sizes) - 1:
            yield Unit(
                paths=(path,), format="parquet", start=start, stop=number + 1, size_bytes=gathered
            )
            start = number + 1
            gathered = 0


def _row_units(source: SourceConfig, num_rows: int, size_bytes: int) -> Iterator[Unit]:
    """Yield stretches of rows of about equal size."""
    unit_bytes = max(MIN_UNIT_BYTES, size_bytes // MAX_UNITS)
    unit_rows = max(1, -(-num_rows * unit_bytes // max(size_bytes, 1)))
    paths = tuple(map(Path, source.patterns()))
    for start in range(0, num_rows, unit_rows):
        stop = min(start + unit_rows, num_rows)
        share_bytes = size_bytes * (stop - start) // max(num_rows, 1)
        yield Unit(
            paths=paths, format=source.format, start=start, stop=stop, size_bytes=share_bytes
        )


def _mock_units(source: SourceConfig) -> Iterator[Unit]:
    assert source.num_documents is not None and source.mean_tokens is not None
    size_bytes = source.num_documents * source.mean_tokens * BYTES_PER_INVENTED_TOKEN
    yield from _row_units(source, source.num_documents, size_bytes)
