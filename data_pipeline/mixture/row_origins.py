"""The origins of what stands in a packed row, for people and as JSON.

(source, row) -> documents of the row -> file, record and kept fields of each
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build.origin import is_absent
from data_pipeline.build.provenance import input_paths
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import IGNORED_LABEL, BuiltData
from data_pipeline.errors import DataError
from data_pipeline.escaping import escaped_line
from data_pipeline.reading.parquet_files import open_parquet
from data_pipeline.store.provenance import DocumentOrigin, Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceOrigin:
    """A document, or a piece of one, in a packed row."""

    source: str
    """Source of the mix."""
    document: int
    """Number of the document in the shards of the source."""
    first_slot: int
    """First slot of the row that it takes; 0 if no row was asked for."""
    slots: int
    """Slots of the row that it takes; 0 if no row was asked for."""
    predicted_tokens: int
    """Labels of it in the row that bear loss; 0 if no row was asked for."""
    origin: DocumentOrigin
    """Where it comes from."""
    path: Path | None
    """The file, if the mix is known and its files are here."""
    row_group: tuple[int, int] | None
    """Row group of a Parquet file that is here, and row within it, both from 0."""

    def describe(self) -> str:
        """Return one line for people, and one for each kept field."""
        origin = self.origin
        name = str(self.path or origin.file)
        place = f"{name}:{origin.record}" if origin.kind == "line" else name
        if origin.kind not in ("line", "file"):
            place += f", {origin.kind} {origin.record:,}"
        if self.row_group is not None:
            place += f" (row group {self.row_group[0]}, its row {self.row_group[1]} from 0)"
        line = f"source {self.source}, document {self.document}: {place}"
        if self.slots:
            stop = self.first_slot + self.slots
            line = f"slots {self.first_slot} to {stop - 1}: {line}"
        lines = [escaped_line(line, 4000)]
        for field, value in origin.kept.items():
            shown = "null" if value is None else escaped_line(value, 2000)
            lines.append(f"    {escaped_line(field)}: {shown}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        value = dataclasses.asdict(self)
        value["path"] = None if self.path is None else str(self.path)
        return value


def row_origins(data: BuiltData, source: int, row: int, mix: MixConfig | None) -> list[PieceOrigin]:
    """Return the origins of the documents in a training row, in their order.

    Args:
        data: The build.
        source: Position of the source in `data.source_names`.
        row: Number of the row within the source.
        mix: Mix of the build, to find the files themselves; None if it is not known.

    Raises:
        DataError: the build does not say where its documents come from.
    """
    packed = data.read_row(source, row)
    name = data.source_names[source]
    provenance = Provenance(data.directory, name)
    found = []
    for number, document in enumerate(packed.documents.tolist()):
        start, stop = packed.bounds[number : number + 2]
        num_labels = int(np.count_nonzero(packed.labels[start:stop] != IGNORED_LABEL))
        found.append(_piece(provenance, name, document, mix, (start, stop - start, num_labels)))
    return found


def document_origin(
    directory: Path, source: str, document: int, mix: MixConfig | None
) -> PieceOrigin:
    """Return the origin of a document of a build.

    Args:
        directory: The build.
        source: Name of the source.
        document: Number of the document in the source's shards.
        mix: Mix of the build, to find the file itself; None if it is not known.

    Raises:
        DataError: there is no such document, or the build does not say where it comes from.
    """
    return _piece(Provenance(directory, source), source, document, mix, (0, 0, 0))


def _piece(
    provenance: Provenance,
    source: str,
    document: int,
    mix: MixConfig | None,
    slots: tuple[int, int, int],
) -> PieceOrigin:
    origin = provenance.of(document)
    path = None if mix is None else _path_of(mix, source, origin, provenance.num_files)
    return PieceOrigin(
        source=source,
        document=document,
        first_slot=slots[0],
        slots=slots[1],
        predicted_tokens=slots[2],
        origin=origin,
        path=path,
        row_group=_row_group(path, origin),
    )


def _path_of(mix: MixConfig, source: str, origin: DocumentOrigin, num_files: int) -> Path | None:
    """Return the file of a document, if as many files are here as the build was made from."""
    for config in mix.sources:
        if config.name == source:
            paths = _paths_here(config)
            if len(paths) == num_files and paths[origin.file_number].name == Path(origin.file).name:
                return paths[origin.file_number]
    return None


@functools.lru_cache(maxsize=64)
def _paths_here(source: SourceConfig) -> tuple[Path, ...]:
    """Return the files of a source, looked for once; none if they cannot be reached from here."""
    return () if is_absent(source) else tuple(input_paths(source))


def _row_group(path: Path | None, origin: DocumentOrigin) -> tuple[int, int] | None:
    if path is None or origin.kind != "row" or not path.is_file():
        return None
    row = origin.record - 1
    try:
        with open_parquet(path) as file:
            for group in range(file.metadata.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row < num_rows:
                    return group, row
                row -= num_rows
    except DataError:
        return None
    return None
