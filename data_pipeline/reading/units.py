"""A source -> units: stretches of its input that are read, cleaned and tokenized on their own.

Decisions
    Units follow from the input alone, never from the number of workers: the same input gives the
    same units, in the same order, wherever it is built.
    A JSONL file is cut by bytes, and a line belongs to the unit that its first byte lies in. A
    Parquet file is cut by row groups, a dataset or an earlier build by rows. Text files are
    gathered until they make a unit. A file that is compressed, in UTF-16 or UTF-32, or has CR line
    ends cannot be cut.
    Every file is looked at before the first one is read: what it is decides, not what it is called.
    A source of many files or bytes is cut by rules of its own, because a unit that stays as it is
    is found in the cache: the size of its units has few steps, and its small files, of any format,
    are gathered to groups whose ends follow from the name and size of one file. So a file that is
    added or changed leaves the groups before and after its own as they are. These rules are named
    in the fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.objects.object_paths import ObjectPath
from data_pipeline.objects.s3_store import REQUESTS_AT_ONCE
from data_pipeline.reading.document import BYTES_PER_INVENTED_TOKEN
from data_pipeline.reading.parquet_files import row_group_bytes
from data_pipeline.reading.stored_rows import count_rows
from data_pipeline.reading.unreadable_files import (
    check_jsonl,
    check_not_empty,
    check_parquet,
    unreadable,
)
from data_pipeline.store.file_kinds import FileKind
from data_pipeline.store.text_files import TextLayers, text_layers

MIN_UNIT_BYTES = 16 * 2**20
"""Bytes of input that make a unit: some seconds of work, which is what a kill costs at most."""
MAX_UNITS = 1024
"""Files of a source, or units of MIN_UNIT_BYTES in it, beyond which it is cut as a large one; and
the number of units of a dataset or earlier build, about.
"""
LARGE_UNITS = 4096
"""Number of units that the bytes of a large source make at most; every unit becomes a shard."""
LARGE_RULES = 1
"""Version of the rules by which a large source is cut."""
_STEP = 4
"""Ratio between the sizes that units of large sources have."""
_LARGEST_GROUP = 4
"""Units that a group of small files has at most, by its bytes."""


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
    file_number: int = 0
    """Number of the file within the group that this is a piece of, from 0."""

    def pieces(self) -> tuple[Unit, ...]:
        """Return a unit for each file of a group; this unit if it is none.

        Raises:
            OSError: a file cannot be read.
        """
        if self.format == "text" or len(self.paths) < 2:
            return (self,)
        pieces = []
        for number, path in enumerate(self.paths):
            pieces.append(_whole_file(path, self.format, number))
        return tuple(pieces)


def split_into_units(source: SourceConfig, files: Sequence[Path] | None = None) -> list[Unit]:
    """Return the units of a source, in order; the time is in proportion to the number of files.

    Args:
        source: The source.
        files: Its input files, as they were found before; None looks for them now.

    Raises:
        DataError: a file is missing, empty or unreadable.
    """
    if source.format == "mock":
        return list(_mock_units(source))
    if source.format in ("huggingface", "build"):
        return list(_row_units(source, *count_rows(source)))
    return list(_files_units(source, source.files() if files is None else files))


def is_large(sizes: Sequence[int]) -> bool:
    """Return whether files of these sizes in bytes are cut by the rules of large sources."""
    return len(sizes) > MAX_UNITS or sum(sizes) > MAX_UNITS * MIN_UNIT_BYTES


def _files_units(source: SourceConfig, files: Sequence[Path]) -> Iterator[Unit]:
    sizes = [_size_bytes(path, source) for path in files]
    if is_large(sizes):
        waiting: _SmallFiles = _Groups(_large_unit_bytes(sum(sizes)))
    else:
        waiting = _SmallFiles(MIN_UNIT_BYTES)
    all_layers = _all_layers(files)
    for path, size_bytes, layers in zip(files, sizes, all_layers, strict=True):
        kind = _format_of(path, source, layers)
        if waiting.takes(kind, size_bytes, layers):
            yield from waiting.add(path, kind, size_bytes)
        else:
            yield from waiting.take()  # documents stay in the order of the files
            yield from _file_units(path, kind, size_bytes, waiting.unit_bytes, layers)
    yield from waiting.take()


def _large_unit_bytes(total_bytes: int) -> int:
    unit_bytes = MIN_UNIT_BYTES
    while total_bytes > LARGE_UNITS * unit_bytes:
        unit_bytes *= _STEP
    return unit_bytes


def _all_layers(files: Sequence[Path]) -> Iterator[TextLayers]:
    """Yield the layers of each file; objects are looked at many at a time."""
    if not any(isinstance(path, ObjectPath) for path in files):
        yield from map(_layers, files)
        return
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        yield from pool.map(_layers, files)


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


class _SmallFiles:
    """Plain text files that wait to become one unit: until they are large enough."""

    def __init__(self, unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self._paths: list[Path] = []
        self._size_bytes = 0
        self._format = ""

    def takes(self, kind: str, size_bytes: int, layers: TextLayers) -> bool:
        """Return whether a file may wait here."""
        del size_bytes
        return kind == "text" and layers.is_plain

    def add(self, path: Path, kind: str, size_bytes: int) -> Iterator[Unit]:
        """Let one more file wait, and yield the unit that is complete, if one is."""
        if kind != self._format:
            yield from self.take()
        self._format = kind
        self._paths.append(path)
        self._size_bytes += size_bytes
        if self._is_end(path, size_bytes):
            yield from self.take()

    def take(self) -> Iterator[Unit]:
        """Yield the waiting files as a unit, if there are any, and start anew."""
        paths = tuple(self._paths)
        size_bytes = self._size_bytes
        self._paths = []
        self._size_bytes = 0
        if len(paths) > 1 or (paths and self._format == "text"):
            yield Unit(paths=paths, format=self._format, size_bytes=size_bytes)
        elif paths:
            yield _whole_file(paths[0], self._format)

    def _is_end(self, path: Path, size_bytes: int) -> bool:
        del path, size_bytes
        return self._size_bytes >= self.unit_bytes


class _Groups(_SmallFiles):
    """Small files of a large source, of any format, that wait to become one unit.

    A file ends its group with a probability of its share in a unit, by a hash of its name, so a
    group has about the bytes of a unit. What stands before and after a group does not touch it.
    """

    def takes(self, kind: str, size_bytes: int, layers: TextLayers) -> bool:
        """Return whether a file may wait here."""
        del kind, layers
        return size_bytes < self.unit_bytes

    def _is_end(self, path: Path, size_bytes: int) -> bool:
        drawn = xxhash.xxh3_64_intdigest(path.name.encode("utf-8", "surrogatepass"))
        is_drawn = drawn * self.unit_bytes < size_bytes * 2**64
        return is_drawn or self._size_bytes >= _LARGEST_GROUP * self.unit_bytes


def _whole_file(path: Path, kind: str, number: int = 0) -> Unit:
    """Return the unit that is one file, whole."""
    size_bytes = path.stat().st_size
    stop = len(row_group_bytes(path)) if kind == "parquet" else size_bytes
    return Unit(paths=(path,), format=kind, stop=stop, size_bytes=size_bytes, file_number=number)


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
