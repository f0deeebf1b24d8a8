"""Sources that are stored by row: Hugging Face datasets, and earlier builds of this package.

Decisions
    A dataset from the hub is named with a commit, so its text cannot change under a run; one on
    disk is a folder that `datasets.save_to_disk` made.
    An earlier build gives its training documents, decoded; what it held out stays out. Decoding is
    exact, so cleaning, hashing and cutting work as for any other text. Of a document that lost a
    stretch each side is a document of its own, without the characters that the cut goes through.
    Conversations are taken as they stand there, tokens and loss masks, since their text alone would
    not say who speaks. Of several sources either all hold conversations or none.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipeline.config.links import dangling_link
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import CptError, DataError
from data_pipeline.reading.table_columns import check_columns, column_path
from data_pipeline.reading.training_segments import TrainingSegments
from data_pipeline.store.arrow_streams import check_saved_dataset
from data_pipeline.store.file_kinds import FileKind, describe_head, kind_of_file
from data_pipeline.store.manifest import read_manifest
from data_pipeline.store.provenance import Records, read_records
from data_pipeline.store.shards import LossMask, Shards
from data_pipeline.store.verification import check_files
from data_pipeline.text.tokenizer import Tokens, decode_bytes

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class _BuiltSource:
    """A source of an earlier build."""

    folder: Path
    """Folder of the source in the build."""
    shards: Shards
    train: TrainingSegments
    """What the build trains on."""
    records: Records | None
    """Hash of the whole record of each document; None if documents are whole records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredConversation:
    """A conversation of an earlier build, as it stands there."""

    tokens: Tokens
    """Ids, up to the one that ends it."""
    loss: LossMask | None
    """Whether each of them bears loss as a label; None if all do, and in all others, too."""
    num_bytes: int
    """UTF-8 bytes of its contents."""
    learned_bytes: int
    """UTF-8 bytes of the contents that bear loss."""
    record: int
    """Hash of the whole record that it is a turn of; 0 if it is all of it."""


def count_rows(source: SourceConfig) -> tuple[int, int]:
    """Return (rows, documents or stretches of them, bytes) of a source.

    Raises:
        DataError: the dataset or build cannot be read.
    """
    if source.format == "huggingface":
        dataset = _dataset(source)
        return len(dataset), int(dataset.data.nbytes)
    _check_build(Path(source.patterns()[0]))
    num_documents = 0
    num_bytes = 0
    for built in _built_sources(source):
        num_documents += len(built.train)
        num_bytes += _num_bytes(built)
    return num_documents, num_bytes


def hub_files(source: SourceConfig) -> list[Path]:
    """Return the files in which `datasets` keeps a dataset of the Hub on this machine.

    Raises:
        DataError: it cannot be fetched or read.
    """
    return [Path(file["filename"]) for file in _dataset(source).cache_files]


def read_dataset_rows(
    source: SourceConfig, start: int, stop: int, fields: tuple[str, ...], values: tuple[str, ...]
) -> Iterator[pa.Table]:
    """Yield the rows [start, stop) of a dataset as tables that have the columns to read.

    Args:
        source: The source.
        start: The first row.
        stop: One past the last row.
        fields: Columns, or fields inside them, that must hold text.
        values: Those that may hold numbers.

    Raises:
        DataError: the dataset lacks a column, or holds something else in it.
    """
    dataset = _dataset(source)
    schema = dataset.data.schema
    place = f"source '{source.name}': the dataset"
    check_columns(place, schema, fields, values, "Set text_field or template.")
    columns: dict[str, None] = {}
    for field in (*fields, *values):
        path = column_path(schema, field)
        assert path is not None, "check_columns has found it"
        columns[path[0]] = None
    chosen = dataset.select_columns(list(columns))
    for first in range(start, stop, _BATCH_ROWS):
        yield chosen[first : min(first + _BATCH_ROWS, stop)]


def read_build_texts(source: SourceConfig, start: int, stop: int) -> Iterator[bytes]:
    """Yield the UTF-8 texts of the segments [start, stop) of an earlier build.

    Segments are counted through all sources that are taken from the build.
    """
    for built, segment in _segments_between(_built_sources(source), start, stop):
        yield _segment_text(built, segment)


def holds_conversations(source: SourceConfig) -> bool:
    """Return whether the documents of an earlier build are conversations."""
    return any(built.shards.chat for built in _built_sources(source))


def holds_turns(source: SourceConfig) -> bool:
    """Return whether documents of an earlier build are turns of records that have several."""
    return any(built.records is not None for built in _built_sources(source))


def may_hold_conversations(source: SourceConfig) -> bool | None:
    """Return `holds_conversations` from one header, without a look at the rest of the build.

    Returns:
        None if the build cannot be read, which whoever takes documents from it is told.
    """
    directory = Path(source.patterns()[0])
    try:
        manifest = read_manifest(directory)
        for name in source.build_sources or [entry.name for entry in manifest.sources]:
            shards = manifest.shard_names(name)
            if shards:
                return Shards(directory / name, shards[:1], verify=False).chat
    except (CptError, OSError):  # not there, damaged, or not this user's alone
        return None
    return False


def read_build_conversations(
    source: SourceConfig, start: int, stop: int
) -> Iterator[StoredConversation]:
    """Yield the conversations [start, stop) of an earlier build, as `read_build_texts` counts.

    If only some sources of the build have loss masks, the others get masks in which all tokens bear
    loss: so they are learned as they were there.
    """
    sources = _built_sources(source)
    has_loss = any(built.shards.has_loss for built in sources)
    for built, segment in _segments_between(sources, start, stop):
        yield _stored_conversation(built, segment, has_loss)


class _Segment(NamedTuple):
    """A document, or a stretch of one, that an earlier build trains on."""

    document: int
    start: int
    """Tokens of the document before it."""
    tokens: int
    """Tokens of it, END_OF_TEXT included if the document ends there."""


def _segments_between(
    sources: Sequence[_BuiltSource], start: int, stop: int
) -> Iterator[tuple[_BuiltSource, _Segment]]:
    """Yield source and segment of the segments [start, stop), counted through all sources."""
    num_before = 0
    for built in sources:
        if num_before >= stop:
            return
        first = max(start - num_before, 0)
        for some in built.train.between(first, stop - num_before):
            for number in range(len(some)):
                yield (
                    built,
                    _Segment(
                        document=int(some.document[number]),
                        start=int(some.start[number]),
                        tokens=int(some.tokens[number]),
                    ),
                )
        num_before += len(built.train)


def _stored_conversation(
    built: _BuiltSource, segment: _Segment, has_loss: bool
) -> StoredConversation:
    document = segment.document
    shards = built.shards
    assert segment.start == 0, "a conversation is never cut"
    tokens, loss = shards.tokens_and_loss(document, 0, segment.tokens)
    if has_loss and loss is None:
        loss = np.ones(len(tokens), np.bool_)
    record = 0
    if built.records is not None:
        record = int(built.records["high"][document]) << 64 | int(built.records["low"][document])
    return StoredConversation(
        tokens=tokens.astype(np.uint32),
        loss=loss,
        num_bytes=int(shards.bytes_of(document, document + 1)[0]),
        learned_bytes=int(shards.learned_bytes_of(document, document + 1)[0]),
        record=record,
    )


def _num_bytes(built: _BuiltSource) -> int:
    """Return the UTF-8 bytes of all segments; of cut documents in proportion to their tokens."""
    total = 0
    for train in built.train.between(0, len(built.train)):
        first = int(train.document[0])
        last = int(train.document[-1]) + 1
        document_bytes = built.shards.bytes_of(first, last)[train.document - first]
        document_tokens = built.shards.lengths(first, last)[train.document - first]
        total += int((document_bytes * train.tokens // document_tokens).sum())
    return total


def _segment_text(built: _BuiltSource, segment: _Segment) -> bytes:
    """Return the UTF-8 text of a segment, without END_OF_TEXT."""
    document, start, num_tokens = segment
    stop = start + num_tokens
    is_end = stop == int(built.shards.lengths(document, document + 1)[0])
    if is_end:
        stop -= 1
    content = decode_bytes(built.shards.tokens(document, start, stop))
    if start == 0 and is_end:
        return content
    return _whole_characters(content)


def _whole_characters(content: bytes) -> bytes:
    """Return a stretch of UTF-8 text without the characters that its ends cut."""
    start = 0
    while start < len(content) and content[start] & 0xC0 == 0x80:
        start += 1
    # a decoder keeps back what needs more bytes
    return codecs.getincrementaldecoder("utf-8")().decode(content[start:]).encode()


def _built_sources(source: SourceConfig) -> list[_BuiltSource]:
    return _open_build(Path(source.patterns()[0]), source.build_sources)


def _check_build(directory: Path) -> None:
    """Refuse an earlier build that is damaged: its tokens would become another text, or none.

    Raises:
        DataError: a file is missing, not the one that the manifest lists, or no token shard.
    """
    check_files(directory, read_manifest(directory), verify=True)


@functools.lru_cache(maxsize=8)
def _open_build(directory: Path, names: tuple[str, ...]) -> list[_BuiltSource]:
    """Open the sources `names` of a build, or all of them if there are no names."""
    manifest = read_manifest(directory)
    known = {entry.name: entry for entry in manifest.sources}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"{directory}: has no source '{unknown[0]}'. It has: {', '.join(known)}. "
            "Set build_sources."
        )
    found = []
    for name in names or known:
        shards = Shards(directory / name, manifest.shard_names(name), verify=False)
        folders = [directory / name / folder for folder in known[name].train_folders]
        records = read_records(directory, name, shards.num_documents)
        train = TrainingSegments(folders, shards)
        found.append(_BuiltSource(directory / name, shards, train, records))
    _check_one_kind(directory, found)
    return found


def _check_one_kind(directory: Path, sources: Sequence[_BuiltSource]) -> None:
    """Refuse to take text and conversations as one source.

    Raises:
        DataError: some sources hold text and others conversations.
    """
    chats = [built.folder.name for built in sources if built.shards.chat]
    texts = [built.folder.name for built in sources if not built.shards.chat]
    if chats and texts:
        raise DataError(
            f"{directory}: source '{chats[0]}' holds conversations (format: harmony), and "
            f"'{texts[0]}' text. One source is either: write a source for each, and list in its "
            f"build_sources {', '.join(chats)}, or {', '.join(texts)}."
        )
    for built in sources:
        if built.shards.has_loss and not built.shards.chat:
            raise DataError(
                f"{built.folder}: its texts have loss masks, which would be lost when they are "
                "read as text. Take them from their own files."
            )


def _dataset(source: SourceConfig) -> Any:
    return _open_dataset(
        source.patterns() or None, source.dataset, source.revision, source.subset, source.split
    )


@functools.lru_cache(maxsize=8)
def _open_dataset(
    path: tuple[str, ...] | None,
    name: str | None,
    revision: str | None,
    subset: str | None,
    split: str,
) -> Any:
    import datasets

    place = path[0] if path else f"{name} at {revision}"
    try:
        if path:
            check_saved_dataset(Path(path[0]))
            loaded = datasets.load_from_disk(path[0])
        else:
            assert name is not None, "load_mix refuses a dataset without path and name"
            loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:
        # `datasets` raises whatever the hub, the file system or the builder of the dataset raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{place}: cannot be read as a Hugging Face dataset, split '{split}': "
            f"{reason.rstrip('.')}.{_odd_files(path)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{place}: has no split '{split}'. It has: {', '.join(loaded)}. Set split."
            )
        loaded = loaded[split]
    # a dataset may have been saved with a format of its own, such as torch
    return loaded.with_format("arrow")


def _odd_files(path: tuple[str, ...] | None) -> str:
    """Return a sentence on the first file of a folder that is not what its name says."""
    wanted = {".arrow": (FileKind.ARROW_STREAM, FileKind.ARROW_FILE), ".json": (FileKind.TEXT,)}
    for folder in path or ():
        for file in sorted(Path(folder).rglob("*")):
            if file.suffix not in wanted:
                continue
            link = dangling_link(file)
            if link:
                return f" {link}"
            kind = kind_of_file(file) if file.is_file() else FileKind.TEXT
            if kind not in wanted[file.suffix]:
                return f" {file} is {describe_head(file)}. {kind.cure}"
    return ""
