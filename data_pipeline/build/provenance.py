"""The origins of documents, gathered from the parts of a source for the build.

    part: places (.places), kept fields (.kept)  ->  build: _provenance/SOURCE

Decisions
    A part counts files and lines from the start of its unit, so that it depends on no other unit.
    The build adds what lies before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.config.source_config import FILE_FORMATS, SourceConfig
from data_pipeline.parts.part import read_places, read_records
from data_pipeline.parts.part_cache import link_or_copy
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.store.files import make_folder
from data_pipeline.store.provenance import (
    FOLDER,
    RECORD_BITS,
    InputName,
    Places,
    kept_name,
    names_of,
    write_files,
    write_places,
    write_records,
)

_KINDS = {
    "jsonl": "line",
    "harmony": "line",
    "parquet": "row",
    "huggingface": "row",
    "text": "file",
    "build": "document",
    "mock": "document",
}
"""Name of a record, by the format of its unit."""


def write_provenance(directory: Path, source: SourceParts) -> None:
    """Write where the documents of a source come from.

    Args:
        directory: The build.
        source: The source, whose parts are made.

    Raises:
        DataError: a file of a part is damaged.
    """
    folder = directory / FOLDER / source.source.name
    make_folder(folder)
    write_places(folder, _places(source))
    if source.parts and source.parts[0].by_record:
        # a memory map keeps a descriptor, so they come one after the other
        write_records(folder, map(read_records, source.parts))
    kept_rows = []
    if source.source.keep:
        for number, part in enumerate(source.parts):
            target = folder / kept_name(number)
            target.unlink(missing_ok=True)  # left by a build that was killed
            link_or_copy(part.kept_path, target)
            kept_rows.append(source.accounts[number].num_documents)
    write_files(folder, _file_names(source), kept_rows)


def _places(source: SourceParts) -> Iterator[Places]:
    """Yield the places of the documents of each part, counted through the source."""
    numbers = {path: number for number, path in enumerate(_kinds_by_path(source))}
    for part, lines_before in zip(source.parts, source.lines_before, strict=True):
        first_file = numbers[part.unit.paths[0]] if part.unit.paths else 0
        before = (first_file << RECORD_BITS) + lines_before
        yield read_places(part) + np.uint64(before)


def input_paths(source: SourceConfig) -> list[Path]:
    """Return the files of a source by number; the folder of a dataset or earlier build."""
    if source.format in FILE_FORMATS:
        return source.files()
    return [Path(folder) for folder in source.patterns()]


def _kinds_by_path(source: SourceParts) -> dict[Path, str]:
    """Return the name of a record in each file that was read, in the order of `input_paths`.

    The files are those of the parts: a folder may have got others since the build began.
    """
    kinds: dict[Path, str] = {}
    for part in source.parts:
        for path in part.unit.paths:
            kinds[path] = _KINDS[part.unit.format]
    return kinds


def _file_names(source: SourceParts) -> list[InputName]:
    kinds = _kinds_by_path(source)
    if not kinds:  # a dataset of the hub, or invented documents
        name = source.source.dataset or source.source.format
        return [(name, _KINDS[source.source.format])]
    return list(zip(names_of(list(kinds)), kinds.values(), strict=True))
