"""Where the documents of a build come from, beside the files that training reads.

    _provenance/SOURCE/places.npy            number of the file and of the record, [documents]
    _provenance/SOURCE/files.json            names of the files, and what a record of each is
    _provenance/SOURCE/kept-00000.parquet    fields that the source keeps, one file for each part
    _provenance/SOURCE/records.npy           hashes of whole records, if their turns are documents

Decisions
    No source can be called `_provenance`: names begin with a letter or a digit.
    A document takes 8 bytes: 24 bits for the file, 40 for the record within it.
    Names are relative to the folder that all files of a source share, so that equal corpora give
    equal builds wherever they lie.
    Training opens none of this. It is part of the build, and so of what its manifest lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import read_json
from data_pipeline.errors import DataError
from data_pipeline.store.array_writer import ArrayWriter
from data_pipeline.store.files import atomic_write, make_folder, write_json
from data_pipeline.store.manifest import BuildManifest
from data_pipeline.store.packing import ARRAY_ERRORS, CLUSTERS_FILE, why_no_array

FOLDER = "_provenance"
PLACES_FILE = "places.npy"
RECORDS_FILE = "records.npy"
FILES_FILE = "files.json"
RECORD_BITS = 40
MAX_KEPT_CHARACTERS = 2000
"""Characters of a kept value; the rest is cut off."""
_MAX_FILES_BYTES = 512 * 2**20

Places = npt.NDArray[np.uint64]
Records = npt.NDArray[np.void]
"""128-bit hashes: fields `high` and `low`, 64 bits each."""
_RECORD_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])
InputName = tuple[str, str]
"""Name of a file, and what a record of it is: line, row, document or file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentOrigin:
    """Where one document comes from."""

    file: str
    """File, relative to the folder that the files of its source share."""
    file_number: int
    """Number of the file among those of the source, from 0."""
    kind: str
    """What the record is: line, row, document or file."""
    record: int
    """Number of the record, from 1."""
    kept: Mapping[str, str | None]
    """Fields that its source keeps, null as None."""


def place_of(file: int, record: int) -> int:
    """Return a place as one number.

    Args:
        file: Number of the file, from 0.
        record: Number of the record in it, from 1.
    """
    return file << RECORD_BITS | record


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the names of files, relative to the folder that they share."""
    if not paths:
        return []
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def write_places(folder: Path, places: Iterable[Places]) -> None:
    """Write the places of the documents of a source, part by part.

    Args:
        folder: That of the source in FOLDER.
        places: Places of the documents of each part, in order.
    """
    _write_array(folder / PLACES_FILE, "<u8", places)


def write_records(folder: Path, records: Iterable[Records]) -> None:
    """Write the hash of the whole record of each document of a source, part by part."""
    _write_array(folder / RECORDS_FILE, _RECORD_DTYPE, records)


def _write_array(path: Path, dtype: npt.DTypeLike, parts: Iterable[npt.NDArray[Any]]) -> None:
    """Write an array that comes part by part."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        writer = ArrayWriter(file, dtype)
        for part in parts:
            writer.append(part.astype(dtype, copy=False))
        writer.finish()


def read_records(build: Path, source: str, count: int) -> Records | None:
    """Return the hash of the whole record of each document, or None if documents are whole records.

    Args:
        build: The build.
        source: Name of one of its sources.
        count: Number of its documents.

    Raises:
        DataError: the file is damaged.
    """
    path = build / FOLDER / source / RECORDS_FILE
    if not path.exists():
        return None
    try:
        records: Records = np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise DataError(f"{path}: damaged ({why_no_array(error)}). Build it again.") from error
    if records.dtype != _RECORD_DTYPE or records.shape != (count,):
        raise DataError(f"{path}: does not hold a hash for each document. Build it again.")
    return records


def unjoined_turns(manifest: BuildManifest) -> list[str]:
    """Return the sources whose held-out documents are turns that the build does not join.

    Builds hold the cluster of each held-out turn since turns of one record are a cluster. Those of
    before tell at most that documents are turns.

    Args:
        manifest: BuildManifest of the build.
    """
    by_turn = set()
    for rules in manifest.rules.get("sources", []):
        if rules.get("turns") == "each":
            by_turn.add(rules.get("name"))
    unjoined = []
    for source in manifest.sources:
        is_by_turn = f"{FOLDER}/{source.name}/{RECORDS_FILE}" in manifest.files
        is_joined = f"{source.name}/held_out/{CLUSTERS_FILE}" in manifest.files
        if source.held_out_documents and not is_joined and (is_by_turn or source.name in by_turn):
            unjoined.append(source.name)
    return unjoined


def write_files(folder: Path, files: Sequence[InputName], kept_rows: Sequence[int]) -> None:
    """Write the names of the files of a source.

    Args:
        folder: That of the source in FOLDER.
        files: The files by number.
        kept_rows: Rows of each file of kept fields; empty if the source keeps none.
    """
    write_json(folder / FILES_FILE, {"files": files, "kept_rows": kept_rows})


def kept_name(number: int) -> str:
    """Return the name of a file of kept fields."""
    return f"kept-{number:05d}.parquet"


class Provenance:
    """The origins of the documents of one source of a build."""

    def __init__(self, build: Path, source: str) -> None:
        """Open the files.

        Raises:
            DataError: the build has none, or they are damaged.
        """
        self._folder = build / FOLDER / source
        if not self._folder.is_dir():
            raise DataError(
                f"{build}: does not say where the documents of source '{source}' come from. An "
                "earlier version of this package made it: build it again."
            )
        path = self._folder / PLACES_FILE
        try:
            self._places: Places = np.load(path, mmap_mode="r", allow_pickle=False)
            listed = read_json(self._folder / FILES_FILE, _MAX_FILES_BYTES, lone_surrogates=True)
            self._files = [(str(name), str(kind)) for name, kind in listed["files"]]
            self._kept_ends = np.cumsum(np.array(listed["kept_rows"], np.int64))
        except ARRAY_ERRORS as error:
            raise self._damaged(why_no_array(error)) from error
        except (MalformedInput, KeyError, TypeError, ValueError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._folder}: not what the build wrote ({reason}). Build it again.")

    @property
    def num_files(self) -> int:
        """Number of files of the source."""
        return len(self._files)

    def of(self, document: int) -> DocumentOrigin:
        """Return the origin of a document.

        Args:
            document: Its number in the shards of the source.

        Raises:
            DataError: there is no such document, or the files are damaged.
        """
        if not 0 <= document < len(self._places):
            raise DataError(
                f"{self._folder}: has {len(self._places):,} documents, numbered from 0, and no "
                f"document {document}."
            )
        place = int(self._places[document])
        try:
            name, kind = self._files[place >> RECORD_BITS]
        except IndexError as error:
            raise self._damaged("a file number is too high") from error
        record = place & (1 << RECORD_BITS) - 1
        return DocumentOrigin(
            file=name,
            file_number=place >> RECORD_BITS,
            kind=kind,
            record=record,
            kept=self._kept(document),
        )

    def _kept(self, document: int) -> dict[str, str | None]:
        """Return the kept fields of a document: one row group is read."""
        if not len(self._kept_ends):
            return {}
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = int(np.searchsorted(self._kept_ends, document, side="right"))
        row = document - (int(self._kept_ends[number - 1]) if number else 0)
        try:
            with pq.ParquetFile(self._folder / kept_name(number)) as file:
                for group in range(file.metadata.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if row < num_rows:
                        return _first_row(file.read_row_group(group).slice(row, 1).to_pylist())
                    row -= num_rows
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(str(error)) from error
        raise self._damaged("a document has no kept fields")


def _first_row(rows: list[dict[str, Any]]) -> dict[str, str | None]:
    return rows[0]
