"""One unit of a source -> one part of the build: a token shard and facts about its documents.

    documents of a unit -> seen in this unit? -> tokens -> shard
                                                   |
                                                   +-> MinHash signatures

A unit is a stretch of the input; a part is what the build makes of it. Besides the shard it has
other files: the content hashes, the signatures, what else the end of the build needs, and the
account, which says what became of the unit.

Decisions
    A part is complete if and only if its account is there: it is written last. A rerun makes only
    what is missing.
    The files of the unit are as they were hashed, before it is read and after: so the part is that
    of the fingerprint.
    A conversation that is longer than a row is left out, and counted as a reject; so is a document
    whose loss mask leaves nothing to learn.
    Nothing here depends on other units, so parts may be made in any order, by any number of
    processes or machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.parts.document_facts import (
    BODIES,
    CLUSTERS,
    HASHES,
    PLACES,
    RECORDS,
    SIGNATURES,
    DocumentFacts,
    write_facts,
)
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.reading.document import Document
from data_pipeline.reading.input_files import InputFile, check_unchanged
from data_pipeline.reading.kept_fields import KeptWriter
from data_pipeline.reading.sources import TOO_LONG, read_documents, why_too_long
from data_pipeline.reading.stored_rows import holds_turns
from data_pipeline.reading.units import Unit
from data_pipeline.store.files import atomic_write, make_folder, sha256_of, write_json
from data_pipeline.store.hashing import Hashes64
from data_pipeline.store.packing import ARRAY_ERRORS, why_no_array
from data_pipeline.store.provenance import Places
from data_pipeline.store.shards import SUFFIX, LossMask, write_shard
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.tokenizer import Tokens

VERSION = 1
"""Raised when a unit gives other files than before under the same settings.

It belongs to what a part is known by in a cache, beside the versions of cleaning and conversations.
"""
SHARD = f"documents{SUFFIX}"
"""Name of the shard among the files of a part."""
NOTHING_LEARNED = "no token bears loss"
"""The reason why a document with a loss mask is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The files of one part, and the unit that they are made of."""

    source: SourceConfig
    unit: Unit
    number: int
    """Number of the unit within its source."""
    work_dir: Path
    """Folder with `build`, which becomes the build, and `parts`, the other files of all parts."""
    near_duplicates: bool
    """Whether signatures are needed."""
    seq_len: int
    """Tokens: input slots of a packed row."""
    inputs: tuple[InputFile, ...] = ()
    """Files that the unit is read from, as they were hashed; all of a dataset or earlier build."""
    cache_dir: Path | None = None
    """Folder of the parts that builds share; None for none."""

    @property
    def shard_path(self) -> Path:
        """The token shard; absent if the unit has no document."""
        return self.work_dir / "build" / self.source.name / f"documents-{self.number:05d}{SUFFIX}"

    @property
    def account_path(self) -> Path:
        """File with the counts of the unit, as JSON."""
        return self._side_path("json")

    @property
    def hashes_path(self) -> Path:
        """Content hashes of the documents in the shard."""
        return self._side_path(HASHES)

    @property
    def records_path(self) -> Path:
        """Content hashes of the records that the documents are turns of; absent if none are."""
        return self._side_path(RECORDS)

    @property
    def by_record(self) -> bool:
        """Whether a record may give several documents, its turns: they are held out, or none."""
        source = self.source
        return source.turns == "each" or (source.format == "build" and holds_turns(source))

    @property
    def has_bodies(self) -> bool:
        """Whether copies are told by other hashes than what is held out.

        Messages decide what is held out of conversations. An earlier build has none, but tokens.
        """
        return self.source.format == "harmony"

    @property
    def bodies_path(self) -> Path:
        """Hashes of the tokens of the conversations in the shard; absent if `has_bodies` is not."""
        return self._side_path(BODIES)

    @property
    def clusters_path(self) -> Path:
        """Clusters of the documents in the shard; absent if the source names none."""
        return self._side_path(CLUSTERS)

    @property
    def signatures_path(self) -> Path:
        """MinHash signatures of the documents in the shard; absent if they are not needed."""
        return self._side_path(SIGNATURES)

    @property
    def places_path(self) -> Path:
        """Origins of the documents in the shard, counted from the start of the unit."""
        return self._side_path(PLACES)

    @property
    def kept_path(self) -> Path:
        """Fields that the source keeps, as Parquet; absent if it keeps none."""
        return self._side_path("kept")

    def file_paths(self) -> dict[str, Path]:
        """Return the files of the part but for the account, by names without source and number."""
        paths = {
            SHARD: self.shard_path,
            HASHES: self.hashes_path,
            PLACES: self.places_path,
        }
        if self.source.cluster_by is not None:
            paths[CLUSTERS] = self.clusters_path
        if self.source.keep:
            paths["kept"] = self.kept_path
        if self.by_record:
            paths[RECORDS] = self.records_path
        if self.has_bodies:
            paths[BODIES] = self.bodies_path
        if self.near_duplicates:
            paths[SIGNATURES] = self.signatures_path
        return paths

    def _side_path(self, suffix: str) -> Path:
        return self.work_dir / "parts" / self.source.name / f"{self.number:05d}.{suffix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Counts of the documents of one unit, by what became of them."""

    tally: Tally
    num_documents: int
    """Documents in the shard, each content once."""
    num_tokens: int
    """Tokens of those documents, END_OF_TEXT included."""
    num_duplicates: int
    """Documents left out because the unit has the same content before."""
    num_duplicate_tokens: int
    """Tokens of those documents, counted as those of the first."""
    shard_bytes: int
    """Size of the shard; 0 if there is none."""
    shard_sha256: str
    """Hex digest of the shard; empty if there is none."""
    longest_conversation: int = 0
    """Pairs of input and label of the longest conversation in the shard; 0 if there is none."""

    @property
    def left_out_conversations(self) -> bool:
        """Whether a conversation was longer than a row, so that the part is that of a seq_len."""
        return any(reason.startswith(TOO_LONG) for reason in self.tally.rejects)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Account:
        """Return the account that `to_json` made the values of.

        Raises:
            ValueError, KeyError, TypeError or AttributeError: they are of something else.
        """
        return cls(**{**value, "tally": Tally.from_json(value["tally"])})

    def to_json(self) -> dict[str, Any]:
        """Return the account as JSON values."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return value | {"tally": self.tally.to_json()}


def read_account(part: Part) -> Account | None:
    """Return the account of a part that is complete, or None if the part is still to be made."""
    try:
        # it names input files, whose names may be no Unicode
        value = read_json(part.account_path, LARGE_BYTES, lone_surrogates=True)
        account = Account.from_json(value)
        if account.num_documents and part.shard_path.stat().st_size != account.shard_bytes:
            return None
        part.places_path.stat()  # an earlier version wrote none
        if part.has_bodies:
            part.bodies_path.stat()  # nor these
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return account


def read_hashes(part: Part) -> Hashes:
    """Return the content hashes of the documents in a part's shard, as a memory map."""
    return read_side_file(part.hashes_path, part.work_dir)


def read_copy_hashes(part: Part) -> Hashes:
    """Return the hashes by which exact copies of a part's documents are found, as a memory map."""
    return read_side_file(part.bodies_path if part.has_bodies else part.hashes_path, part.work_dir)


def read_records(part: Part) -> Hashes:
    """Return the content hash of the record of each document in a part's shard."""
    return read_side_file(part.records_path, part.work_dir)


def read_clusters(part: Part) -> Hashes64:
    """Return the clusters of the documents in a part's shard, as a memory map."""
    return read_side_file(part.clusters_path, part.work_dir)


def read_places(part: Part) -> Places:
    """Return the origins of the documents in a part's shard, as a memory map."""
    return read_side_file(part.places_path, part.work_dir)


def read_side_file(path: Path, work_dir: Path) -> npt.NDArray[Any]:
    """Return the array of a file that `make_part` wrote before the account, as a memory map.

    Args:
        path: The file.
        work_dir: Folder of the build in progress, which the message of an error names.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ARRAY_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # the file may be sound
        raise DataError(
            f"{path}: not what the build wrote ({why_no_array(error)}). Delete {work_dir}, "
            "which holds the work of an unfinished build, and build again."
        ) from error


def make_part(part: Part) -> Account:
    """Read, clean, hash and tokenize one unit, and write its part.

    Raises:
        DataError: the input cannot be used, or somebody writes to it.
    """
    check_unchanged(part.inputs, part.source.name)
    make_folder(part.shard_path.parent)
    make_folder(part.account_path.parent)
    tally = Tally()
    with write_facts(part.file_paths()) as facts:
        try:
            has_shard = _write_shard(part, tally, facts)
        except (DataError, OSError):
            check_unchanged(part.inputs, part.source.name)  # it may be what went wrong
            raise
        check_unchanged(part.inputs, part.source.name)
    account = Account(
        tally=tally,
        num_documents=facts.num_documents,
        num_tokens=facts.num_tokens,
        num_duplicates=facts.num_duplicates,
        num_duplicate_tokens=facts.num_duplicate_tokens,
        shard_bytes=part.shard_path.stat().st_size if has_shard else 0,
        shard_sha256=sha256_of(part.shard_path) if has_shard else "",
        longest_conversation=facts.longest_conversation,
    )
    write_json(part.account_path, account.to_json())
    return account


class _Encoded(NamedTuple):
    """A document and its tokens, without END_OF_TEXT."""

    document: Document
    tokens: Tokens
    loss: LossMask | None
    """Whether each token bears loss as a label; None if all do."""


def _write_shard(part: Part, tally: Tally, facts: DocumentFacts) -> bool:
    """Write the documents of the unit, each once, and return whether there are any."""
    documents = facts.without_copies(read_documents(part.source, part.unit, tally, part.seq_len))
    tokenized = _within_limits(_encode(documents, part.seq_len, tally), part.source, tally)
    with _kept_writer(part) as kept:
        first = next(tokenized, None)
        if first is None:
            return False
        _write_documents(part, itertools.chain([first], tokenized), facts, kept)
    return True


def _write_documents(
    part: Part, documents: Iterator[_Encoded], facts: DocumentFacts, kept: KeptWriter | None
) -> None:
    with write_shard(part.shard_path) as shard:
        for document, tokens, loss in documents:
            facts.note(document, tokens, loss)
            shard.add(
                tokens,
                document.num_bytes,
                document.is_conversation,
                loss,
                document.learned_bytes,
            )
            if kept is not None:
                kept.add(document.kept)


@contextlib.contextmanager
def _kept_writer(part: Part) -> Iterator[KeptWriter | None]:
    """Yield what writes the fields that a source keeps; None if it keeps none."""
    if not part.source.keep:
        yield None
        return
    with atomic_write(part.kept_path) as file:
        writer = KeptWriter(file, part.source.keep)
        yield writer
        writer.finish()


def _encode(documents: Iterator[Document], seq_len: int, tally: Tally) -> Iterator[_Encoded]:
    """Yield the documents with their tokens, but no conversation without a row or a loss.

    A text that is cut goes on as text. The rest of a conversation would lack what the model sees
    before every message, and be trained on all the same. One that no token of bears loss would
    take slots of a row for nothing.
    """
    for document in documents:
        tokens = document.tokenize()
        loss = None if document.loss is None else document.loss()
        if document.is_conversation and len(tokens) - 1 > seq_len:
            assert document.place is not None, "a conversation comes from a record"
            tally.withdraw(why_too_long(seq_len), document.place)
        elif document.is_conversation and loss is not None and not loss[1:].any():
            assert document.place is not None, "a conversation comes from a record"
            tally.withdraw(NOTHING_LEARNED, document.place)
        else:
            yield _Encoded(document, tokens, loss)


def _within_limits(
    documents: Iterator[_Encoded], source: SourceConfig, tally: Tally
) -> Iterator[_Encoded]:
    """Yield the documents that have as many tokens as the source wants, and count the others."""
    least = source.min_tokens or 0
    most = source.max_tokens or math.inf
    for encoded in documents:
        num_tokens = len(encoded.tokens)
        if num_tokens < least:
            tally.withdraw_filtered(f"fewer than {least} tokens", num_tokens)
        elif num_tokens > most:
            tally.withdraw_filtered(f"more than {most} tokens", num_tokens)
        else:
            yield encoded
