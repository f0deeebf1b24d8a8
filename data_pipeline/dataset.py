"""A finished build, opened for reading: rows for training and rows held out.

Decisions
    `open` refuses a build that is not complete; after that a row is two memory-map reads and no
    checks. Labels and guard domains are no part of the tokens, so those of the present mix replace
    the ones from build time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.build.guard_sets import check_guard_sets
from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.errors import DataError
from data_pipeline.store.manifest import Manifest, SourceEntry, check_files, read_manifest
from data_pipeline.store.packing import ARRAY_NAMES, Integers, PackedRows
from data_pipeline.store.shards import Shards
from data_pipeline.text.tokenizer import END_OF_TEXT

IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """What the model sees at once: T = seq_len slots."""

    input_ids: Integers
    """[T]; END_OF_TEXT in the padding and nowhere else."""
    labels: Integers
    """[T]; the token after each input, -100 in the padding."""
    position_ids: Integers
    """[T]; counted from 0 in every document piece and in the padding."""
    bounds: list[int]
    """0, the start of each further piece, the start of the padding if there is any, T."""
    documents: Integers
    """[pieces]; the document that each piece belongs to."""


class _Rows:
    """The rows of one split of one source."""

    def __init__(self, directory: Path, split: str, shard: Shards, seq_len: int) -> None:
        arrays = {name: _load_array(directory / split / f"{name}.npy") for name in ARRAY_NAMES}
        self.packed = PackedRows(**arrays)
        self.shard = shard
        self.seq_len = seq_len
        self._check(directory / split)

    def _check(self, folder: Path) -> None:
        """The arrays fit each other, the documents and seq_len, so that no read can leave its
        document.
        """
        packed, documents = self.packed, self.shard.num_documents
        pieces = len(packed.piece_document)
        starts, pairs, numbers = packed.piece_start, packed.piece_pairs, packed.piece_document
        sound = (
            len(starts) == len(pairs) == pieces
            and packed.num_rows >= 0
            and packed.row_offsets[0] == 0
        )
        sound = (
            sound
            and packed.row_offsets[-1] == pieces
            and bool((np.diff(packed.row_offsets) > 0).all())
        )
        if sound and pieces:
            sound = (
                numbers.min() >= 0
                and numbers.max() < documents
                and starts.min() >= 0
                and pairs.min() >= 1
            )
            sound = sound and bool((starts + pairs < self.shard.document_tokens[numbers]).all())
            sound = sound and packed.row_tokens().max() <= self.seq_len
        if not sound:
            raise DataError(
                f"{folder}: its row arrays do not fit the documents. Delete the build and build it again."
            )

    def read(self, row: int, first_document: int = 0) -> PackedRow:
        packed = self.packed
        first, last = packed.row_offsets[row : row + 2].tolist()
        documents = packed.piece_document[first:last]
        starts, pairs = (
            packed.piece_start[first:last].tolist(),
            packed.piece_pairs[first:last].tolist(),
        )
        input_ids = np.full(self.seq_len, END_OF_TEXT, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED_LABEL, dtype=np.int64)
        bounds = [0]
        for document, start, count in zip(documents.tolist(), starts, pairs, strict=True):
            begin, end = bounds[-1], bounds[-1] + count
            tokens = self.shard.tokens(document, start, start + count + 1)
            input_ids[begin:end] = tokens[:-1]
            labels[begin:end] = tokens[1:]
            bounds.append(end)
        if bounds[-1] < self.seq_len:
            bounds.append(self.seq_len)
        position_ids = np.arange(self.seq_len) - np.repeat(bounds[:-1], np.diff(bounds))
        return PackedRow(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            bounds=bounds,
            documents=documents + first_document,
        )


class HeldOutSet:
    """The held-out documents of one guard domain, over all its sources."""

    def __init__(self, domain: GuardDomain, parts: Sequence[_Rows]) -> None:
        self.name = domain.name
        self.language = domain.language
        self.sources = domain.sources
        self._parts = parts
        self._row_ends = np.cumsum([part.packed.num_rows for part in parts])
        # documents are numbered through the domain in ascending order of (source, document)
        self._stored = [np.unique(part.packed.piece_document) for part in parts]
        self._first_document = np.concatenate(
            [[0], np.cumsum([len(numbers) for numbers in self._stored])]
        )
        sizes = [
            part.shard.document_bytes[numbers]
            for part, numbers in zip(parts, self._stored, strict=True)
        ]
        self.document_bytes: Integers = np.concatenate(sizes)
        """UTF-8 bytes of each document."""

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_bytes)

    @property
    def num_rows(self) -> int:
        """Packed rows; a row holds documents of one source."""
        return int(self._row_ends[-1])

    def read_row(self, row: int) -> PackedRow:
        """Row `row`; its `documents` index `document_bytes`."""
        if not 0 <= row < self.num_rows:
            raise IndexError(
                f"held-out set '{self.name}' has {self.num_rows} rows, asked for row {row}"
            )
        part = int(np.searchsorted(self._row_ends, row, side="right"))
        begin = 0 if part == 0 else int(self._row_ends[part - 1])
        packed = self._parts[part].read(row - begin)
        numbers = np.searchsorted(self._stored[part], packed.documents) + self._first_document[part]
        return dataclasses.replace(packed, documents=numbers)


class BuiltData:
    """A build, open for reading; `source` arguments are positions in `source_names`."""

    def __init__(
        self, directory: Path, manifest: Manifest, sources: Sequence[SourceEntry], verify: bool
    ) -> None:
        """Use `open`."""
        self.directory = directory
        self.manifest = manifest
        self.seq_len = manifest.seq_len
        self.source_names = tuple(source.name for source in sources)
        self.languages = tuple(source.language for source in sources)
        self.domains = tuple(source.domain for source in sources)
        shards = [
            Shards(directory / name, manifest.shard_names(name), verify=verify)
            for name in self.source_names
        ]
        folders = [directory / name for name in self.source_names]
        self._train = [
            _Rows(folder, "train", s, self.seq_len)
            for folder, s in zip(folders, shards, strict=True)
        ]
        held_out = [
            _Rows(folder, "held_out", s, self.seq_len)
            for folder, s in zip(folders, shards, strict=True)
        ]
        self._row_tokens = [rows.packed.row_tokens() for rows in self._train]
        self.held_out = tuple(
            HeldOutSet(domain, [held_out[self.source_names.index(name)] for name in domain.sources])
            for domain in manifest.guard_domains
        )

    @classmethod
    def open(
        cls, directory: Path | str, *, verify: bool = True, mix: MixConfig | None = None
    ) -> BuiltData:
        """Open a build.

        Args:
            directory: what `build` made.
            verify: hash every file and check every token; else names, sizes, headers and row arrays
                only.
            mix: take languages, domains and guard domains from here instead of from build time.

        Raises:
            DataError: the build is missing, incomplete or damaged, or has other sources or another
                seq_len than `mix`.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if mix is not None:
            manifest = _relabel(directory, manifest, mix)
            check_guard_sets(manifest, mix)
        check_files(directory, manifest, verify=verify)
        return cls(directory, manifest, manifest.sources, verify)

    def num_rows(self, source: int) -> int:
        """Training rows of a source."""
        return self._train[source].packed.num_rows

    def row_tokens(self, source: int) -> Integers:
        """Predicted tokens of each training row of a source."""
        return self._row_tokens[source]

    def read_row(self, source: int, row: int) -> PackedRow:
        """A training row; its `documents` are document numbers in the source's shard."""
        if not 0 <= row < self.num_rows(source):
            name = self.source_names[source]
            raise IndexError(
                f"source '{name}' has {self.num_rows(source)} rows, asked for row {row}"
            )
        return self._train[source].read(row)


def _relabel(directory: Path, manifest: Manifest, mix: MixConfig) -> Manifest:
    built, wanted = (
        [source.name for source in manifest.sources],
        [source.name for source in mix.sources],
    )
    if built != wanted or manifest.seq_len != mix.seq_len:
        raise DataError(
            f"{directory}: built for seq_len {manifest.seq_len} and sources {', '.join(built)}; mix '{mix.name}' has "
            f"seq_len {mix.seq_len} and sources {', '.join(wanted)}. Build the mix again."
        )
    sources = tuple(
        dataclasses.replace(entry, language=source.language, domain=source.domain)
        for entry, source in zip(manifest.sources, mix.sources, strict=True)
    )
    return dataclasses.replace(manifest, sources=sources, guard_domains=mix.guard_domains())


def _load_array(path: Path) -> npt.NDArray[np.int64]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: not a readable array ({error}). Delete the build and build it again."
        ) from error
    if values.dtype != np.dtype("<i8") or values.ndim != 1:
        raise DataError(
            f"{path}: holds {values.ndim}-d {values.dtype}, must be 1-d int64. Build it again."
        )
    return np.asarray(values)
