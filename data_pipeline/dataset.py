"""A finished build, open for reading: rows for training and rows that are held out.

Decisions
    `BuiltData.open` refuses a build that is not complete; after that a row is a few reads of byte
    ranges. Nothing is held for a document or a row but the predicted tokens of each training row,
    which the ranks of a node share, and the sizes of the held-out documents.
    Each reading of a row checks where it reads, so that a build that was damaged since it was
    verified is an error, and never a row of other tokens than those of its documents.
    The open files are bounded, whatever the number of shards.
    Labels and guard domains are no part of the tokens, so those of the current mix replace those
    from build time.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.errors import DataError
from data_pipeline.fates.guard_sets import check_guard_sets
from data_pipeline.store.manifest import (
    BuildManifest,
    SourceEntry,
    StageEntry,
    read_manifest,
)
from data_pipeline.store.open_files import OpenFiles
from data_pipeline.store.packing import (
    CLUSTERS_FILE,
    Integers,
    RowPieces,
    Segments,
    load_array,
    pack,
)
from data_pipeline.store.row_files import (
    DOCUMENT_BYTES_FILE,
    DOCUMENT_TOKENS_FILE,
    SHARD_DOCUMENTS_FILE,
    RowFiles,
    RowTokens,
)
from data_pipeline.store.shards import LossMask, Shards
from data_pipeline.store.verification import check_files, check_stored_rows, unverified_rows
from data_pipeline.text.tokenizer import END_OF_TEXT, Tokens

IGNORED_LABEL = -100
"""Label of a slot whose next token bears no loss, or that has none."""
_WHOLE_ROW = slice(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One row as the model sees it, or T of its seq_len slots."""

    input_ids: Integers
    """[T] inputs; END_OF_TEXT in the padding and nowhere else."""
    labels: Integers
    """[T] token after each input; IGNORED_LABEL in the padding, and where that token bears no
    loss.
    """
    position_ids: Integers
    """[T] positions, counted from 0 in every document piece and in the padding."""
    bounds: list[int]
    """Borders of the pieces of the whole row: 0, the end of each, and seq_len if there is
    padding.
    """
    documents: Integers
    """[pieces] number of the document that each piece belongs to."""


class _Rows:
    """The rows of one split of one source."""

    def __init__(self, folder: Path, shards: Shards, seq_len: int, files: OpenFiles) -> None:
        self.files = RowFiles(folder, files)
        self.shards = shards
        self.seq_len = seq_len
        self.num_rows = self.files.num_rows

    def read(self, row: int, slots: slice = _WHOLE_ROW) -> PackedRow:
        """Read one row; its documents have the numbers of `shards`."""
        pieces = self.files.pieces(row)
        return read_row(pieces, self.seq_len, self.shards.tokens_and_loss, slots)

    def labels_before(self, row: int, slot: int) -> int:
        """Return how many labels the slots [0, slot) of a row have."""
        if not self.files.has_loss:
            return min(slot, int(self.files.pieces(row).pairs.sum()))
        return int(np.count_nonzero(self.read(row, slice(slot)).labels != IGNORED_LABEL))


class _HeldOutRows(_Rows):
    """The held-out rows of one source, and the sizes of their documents."""

    def __init__(self, folder: Path, shards: Shards, seq_len: int, files: OpenFiles) -> None:
        super().__init__(folder, shards, seq_len, files)
        self._folder = folder
        self.documents: Integers = np.unique(self.files.load().piece_document)
        """Numbers of the documents in `shards`, ascending."""
        self.document_tokens = self._sizes(DOCUMENT_TOKENS_FILE, "document_tokens")
        """Tokens of each document, END_OF_TEXT included."""
        self.document_bytes = self._sizes(DOCUMENT_BYTES_FILE, "learned_bytes")
        """UTF-8 bytes of each document; with a loss mask, of what bears loss."""

    def _sizes(self, file_name: str, of_shards: str) -> Integers:
        """Return sizes of the documents; from the shards if the build has no file of them.

        Raises:
            DataError: the file does not fit the documents.
        """
        path = self._folder / file_name
        if path.exists():
            sizes = np.array(load_array(path))
            if len(sizes) != len(self.documents) or (sizes < 0).any():
                raise self._misfit(path)
            return sizes
        if not len(self.documents):
            return self.documents
        if self.documents[0] < 0 or self.documents[-1] >= self.shards.num_documents:
            raise self.files.misfit()
        of_all: Integers = getattr(self.shards, of_shards)
        return of_all[self.documents]

    def clusters(self) -> Integers:
        """Return for each document the position of the first one of its cluster.

        Raises:
            DataError: the file with the clusters does not fit the documents.
        """
        path = self._folder / CLUSTERS_FILE
        positions = np.arange(len(self.documents))
        if not path.exists():
            return positions
        clusters = np.array(load_array(path))
        fits = len(clusters) == len(positions)
        if not fits or (clusters < 0).any() or (clusters > positions).any():
            raise self._misfit(path)
        return clusters

    def _misfit(self, path: Path) -> DataError:
        return DataError(
            f"{path}: does not fit the {len(self.documents)} held-out documents. Delete the build "
            "and build it again."
        )


_TokensOf: TypeAlias = Callable[[int, int, int], tuple[Tokens, LossMask | None]]


def read_row(pieces: RowPieces, seq_len: int, tokens_of: _TokensOf, slots: slice) -> PackedRow:
    """Fill slots of one row with the tokens of its documents.

    Args:
        pieces: The pieces of documents that make up the row.
        seq_len: Slots of the row.
        tokens_of: Returns the tokens of a document from a first to before a last one, and which of
            them bear loss; None if all do.
        slots: Which slots; of the other ones no token is read.
    """
    first, stop, _ = slots.indices(seq_len)
    input_ids = np.full(stop - first, END_OF_TEXT, dtype=np.int64)
    labels = np.full(stop - first, IGNORED_LABEL, dtype=np.int64)
    starts = pieces.start.tolist()
    pairs = pieces.pairs.tolist()
    bounds = [0]
    for document, start, count in zip(pieces.document.tolist(), starts, pairs, strict=True):
        begin = bounds[-1]
        bounds.append(begin + count)
        before = max(first - begin, 0)
        after = min(stop - begin, count)
        if before < after:
            tokens, loss = tokens_of(document, start + before, start + after + 1)
            span = slice(begin + before - first, begin + after - first)
            input_ids[span] = tokens[:-1]
            labels[span] = tokens[1:]
            if loss is not None:
                labels[span][~loss[1:]] = IGNORED_LABEL
    if bounds[-1] < seq_len:
        bounds.append(seq_len)
    position_ids = np.arange(seq_len) - np.repeat(bounds[:-1], np.diff(bounds))
    return PackedRow(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids[first:stop],
        bounds=bounds,
        documents=np.array(pieces.document),
    )


class PackedDocuments:
    """Some documents of a held-out set in rows of their own."""

    def __init__(self, domain: HeldOutSet, documents: Integers) -> None:
        """Pack the documents by best fit; nothing is read yet."""
        self._domain = domain
        self._documents = documents
        tokens = domain.document_tokens[documents]
        segments = Segments.whole(np.arange(len(documents)), tokens)
        self._packed = pack(segments, domain.seq_len)

    @property
    def num_rows(self) -> int:
        """Number of packed rows."""
        return self._packed.num_rows

    def read_row(self, row: int) -> PackedRow:
        """Read one row; its `documents` are positions in the list of documents."""
        pieces = self._packed.pieces(row)
        return read_row(pieces, self._domain.seq_len, self._tokens, _WHOLE_ROW)

    def _tokens(self, position: int, start: int, stop: int) -> tuple[Tokens, LossMask | None]:
        return self._domain.tokens_and_loss(int(self._documents[position]), start, stop)


class HeldOutSet:
    """The held-out documents of one guard domain, over all its sources."""

    def __init__(self, domain: GuardDomain, parts: Sequence[_HeldOutRows]) -> None:
        self.name = domain.name
        self.language = domain.language
        self.sources = domain.sources
        self._parts = parts
        self._row_ends = np.cumsum([part.num_rows for part in parts])
        # Documents are numbered through the domain in ascending order of (source, document).
        self._stored_numbers: list[Integers] = []
        self._first_numbers: list[int] = []
        self.seq_len = parts[0].seq_len
        """Slots of a packed row."""
        sizes: list[Integers] = []
        lengths: list[Integers] = []
        clusters: list[Integers] = []
        num_documents = 0
        for part in parts:
            clusters.append(num_documents + part.clusters())
            self._stored_numbers.append(part.documents)
            self._first_numbers.append(num_documents)
            sizes.append(part.document_bytes)
            lengths.append(part.document_tokens)
            num_documents += len(part.documents)
        self.document_bytes: Integers = np.concatenate(sizes)
        """UTF-8 bytes of each document; with a loss mask, of what bears loss."""
        self.document_tokens: Integers = np.concatenate(lengths)
        """Tokens of each document, END_OF_TEXT included."""
        self.document_clusters: Integers = np.concatenate(clusters)
        """Cluster of each document; documents of the same one are not independent."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_bytes)

    @property
    def num_rows(self) -> int:
        """Number of packed rows; a row holds documents of one source."""
        return int(self._row_ends[-1])

    def read_row(self, row: int) -> PackedRow:
        """Read one row; its `documents` are indices into `document_bytes`.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(
                f"held-out set '{self.name}' has {self.num_rows} rows, asked for row {row}"
            )
        part = int(np.searchsorted(self._row_ends, row, side="right"))
        rows = self._parts[part]
        first_row = int(self._row_ends[part]) - rows.num_rows
        packed = rows.read(row - first_row)
        within_source = np.searchsorted(self._stored_numbers[part], packed.documents)
        return replace(packed, documents=within_source + self._first_numbers[part])

    def tokens_and_loss(
        self, document: int, start: int, stop: int
    ) -> tuple[Tokens, LossMask | None]:
        """Return the tokens [start, stop) of a document, and which bear loss; None if all do."""
        part = bisect.bisect_right(self._first_numbers, document) - 1
        stored = self._stored_numbers[part][document - self._first_numbers[part]]
        return self._parts[part].shards.tokens_and_loss(int(stored), start, stop)

    def pack(self, documents: Integers) -> PackedDocuments:
        """Pack some of the documents into rows of their own."""
        return PackedDocuments(self, documents)


class BuiltData:
    """A build that is open for reading; a `source` argument is a position in `source_names`.

    Training rows are those of one stage, the first one unless `of_stage` says otherwise. Held-out
    rows are the same in all stages.
    """

    def __init__(self, directory: Path, manifest: BuildManifest) -> None:
        """Open the files; callers use `BuiltData.open`, which checks them first."""
        self.directory = directory
        self.manifest = manifest
        self.stage = 0
        """Number of the stage that training rows are of."""
        self.seq_len = manifest.seq_len
        """Slots of a packed training row."""
        self.source_names = tuple(source.name for source in manifest.sources)
        self.languages = tuple(source.language for source in manifest.sources)
        self.domains = tuple(source.domain for source in manifest.sources)
        self._stages: list[list[_Rows]] = [[] for _ in manifest.row_lengths]
        held_out: dict[str, _HeldOutRows] = {}
        files = OpenFiles()
        for source in manifest.sources:
            folder = directory / source.name
            shards = _open_shards(folder, manifest.shard_names(source.name), files)
            splits = zip(source.train_folders, manifest.row_lengths, strict=True)
            for number, (split, seq_len) in enumerate(splits):
                self._stages[number].append(_Rows(folder / split, shards, seq_len, files))
            rows = _HeldOutRows(folder / "held_out", shards, self.seq_len, files)
            held_out[source.name] = rows
        self._use_rows(self._stages[0])
        self.held_out = tuple(
            HeldOutSet(domain, [held_out[name] for name in domain.sources])
            for domain in manifest.guard_domains
        )

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        verify: bool = True,
        mix: MixConfig | None = None,
        is_checked: bool = False,
    ) -> BuiltData:
        """Open a build.

        Args:
            directory: A directory that `build` made.
            verify: Whether to hash every file and check every token, unless the build's note says
                that this was done (`data_pipeline.store.verification`); otherwise names and sizes
                are checked, and the rows of what the note does not know.
            mix: Mix whose languages, domains and guard domains replace those from build time.
            is_checked: Another rank has just verified this build: nothing is checked.

        Raises:
            DataError: The build is missing, incomplete or damaged, or has other sources or another
                seq_len than `mix`.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, is_known=is_checked)
        if mix is not None:
            manifest = _relabel(directory, manifest, mix)
            check_guard_sets(manifest, mix)
        if not is_checked:
            found = check_files(directory, manifest, verify=verify)
            for source, split in unverified_rows(manifest, found.unverified):
                check_stored_rows(directory, manifest, source, split)
        return cls(directory, manifest)

    @property
    def num_stages(self) -> int:
        """Number of stages of sequence length; 1 without `stages` in the mix."""
        return len(self._stages)

    def of_stage(self, number: int) -> BuiltData:
        """Return the same build with the training rows of a stage; the files are not opened again.

        Args:
            number: Number of the stage, counted from 0.
        """
        other = copy.copy(self)
        other.stage = number
        other.seq_len = self.manifest.row_lengths[number]
        other._use_rows(self._stages[number])
        return other

    def _use_rows(self, train: list[_Rows]) -> None:
        """Take the training rows of a stage, by source."""
        self._train = train
        self._row_tokens = [rows.files.row_tokens() for rows in train]
        self._row_slots = []
        for rows, tokens in zip(train, self._row_tokens, strict=True):
            # without masks they are the same, and not read a second time
            self._row_slots.append(rows.files.row_slots() if rows.files.has_loss else tokens)

    def train_entry(self, source: int) -> SourceEntry | StageEntry:
        """Return what the manifest says of the training rows of a source, in this stage."""
        entry = self.manifest.sources[source]
        return entry.stages[self.stage] if entry.stages else entry

    def num_rows(self, source: int) -> int:
        """Return the number of training rows of a source."""
        return self._train[source].num_rows

    def row_tokens(self, source: int) -> RowTokens:
        """Return the predicted tokens of each training row, those that bear loss, [num_rows]."""
        return self._row_tokens[source]

    def row_slots(self, source: int) -> RowTokens:
        """Return the slots of each training row that hold a token of a document, [num_rows]."""
        return self._row_slots[source]

    def read_row(self, source: int, row: int, slots: slice = _WHOLE_ROW) -> PackedRow:
        """Read a training row; its `documents` are document numbers in the source's shards.

        Args:
            source: Position in `source_names`.
            row: Number of the row.
            slots: Which slots of the row to read; `bounds` and `documents` are those of all.

        Raises:
            DataError: The build was damaged since it was verified.
            IndexError: There is no such row.
        """
        if not 0 <= row < self.num_rows(source):
            name = self.source_names[source]
            raise IndexError(
                f"source '{name}' has {self.num_rows(source)} rows, asked for row {row}"
            )
        return self._train[source].read(row, slots)

    def labels_before(self, source: int, row: int, slot: int) -> int:
        """Return how many labels the slots [0, slot) of a training row have.

        With loss masks the tokens of these slots are read.
        """
        return self._train[source].labels_before(row, slot)


def _open_shards(folder: Path, names: Sequence[str], files: OpenFiles) -> Shards:
    """Open the shards of a source; their headers are read if the build has no list of documents."""
    path = folder / SHARD_DOCUMENTS_FILE
    num_documents = np.array(load_array(path)) if path.exists() else None
    return Shards(folder, names, verify=False, num_documents=num_documents, files=files)


def _list(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))


def _relabel(directory: Path, manifest: BuildManifest, mix: MixConfig) -> BuildManifest:
    """Return the manifest with the labels and guard domains of a mix over the same sources."""
    built = [source.name for source in manifest.sources]
    wanted = [source.name for source in mix.sources]
    lengths = tuple(stage.seq_len for stage in mix.stages) or (mix.seq_len,)
    if built != wanted or manifest.row_lengths != lengths:
        raise DataError(
            f"{directory}: built for seq_len {_list(manifest.row_lengths)} and sources "
            f"{', '.join(built)}; mix '{mix.name}' has seq_len {_list(lengths)} and sources "
            f"{', '.join(wanted)}. Build the mix again."
        )
    sources = tuple(
        replace(entry, language=source.language, domain=source.domain)
        for entry, source in zip(manifest.sources, mix.sources, strict=True)
    )
    return replace(manifest, sources=sources, guard_domains=mix.guard_domains())
