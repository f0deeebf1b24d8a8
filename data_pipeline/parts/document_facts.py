"""What the end of a build needs to know of the documents of a part, written as they are read.

    document, its tokens -> content hash, place, ... -> side files, 8 or 16 bytes a document each
                         -> MinHash signature        -> a side file, 512 bytes a document

Decisions
    A unit may be one compressed file with millions of documents, so no fact of a document stays in
    memory: it goes to its file with those of some other documents.
    The files appear under their names when all facts are written.
"""

from __future__ import annotations

import array
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.parts.near_duplicates import NUM_HASHES, minhash_signatures
from data_pipeline.reading.content_hashes import HASH_DTYPE
from data_pipeline.reading.document import Document, hash_of_body
from data_pipeline.store.array_writer import ArrayWriter
from data_pipeline.store.files import atomic_write
from data_pipeline.store.shards import LossMask
from data_pipeline.text.harmony import own_tokens
from data_pipeline.text.tokenizer import Tokens

HASHES = "hashes"
"""Name of the side file with content hashes; those of the others follow."""
PLACES = "places"
CLUSTERS = "clusters"
RECORDS = "records"
BODIES = "bodies"
SIGNATURES = "minhash"
MAX_SEEN = 1 << 20
"""Number of content hashes kept to find copies within a unit.

Copies that are further apart are found at the end of the build.
"""
SIGNATURE_TOKENS = 1 << 17
"""Number of tokens whose signatures are computed at once."""
_DTYPES: dict[str, np.dtype[Any]] = {
    HASHES: HASH_DTYPE,
    PLACES: np.dtype("<u8"),
    CLUSTERS: np.dtype("<u8"),
    RECORDS: HASH_DTYPE,
    BODIES: HASH_DTYPE,
}
_WAITING_NUMBERS = 1 << 13
"""Numbers of 64 bits that are written to a side file at once."""


@contextlib.contextmanager
def write_facts(paths: Mapping[str, Path]) -> Iterator[DocumentFacts]:
    """Yield what writes the facts of documents; the files appear at the end without an error.

    Args:
        paths: Side files by name; a fact whose name is missing is not needed. Other names are
            passed over.
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for name, path in paths.items():
            if name in _DTYPES or name == SIGNATURES:
                files[name] = stack.enter_context(atomic_write(path))
        facts = DocumentFacts(files)
        yield facts
        facts.finish()


def _identity(document: Document) -> int:
    """Return what tells a document from all others of its unit."""
    return document.record << 128 | document.content_hash


class DocumentFacts:
    """Facts about the documents of one unit; `write_facts` makes one."""

    def __init__(self, files: Mapping[str, IO[bytes]]) -> None:
        self._columns: dict[str, _Column] = {}
        self._signatures: _SignatureFile | None = None
        for name, file in files.items():
            if name == SIGNATURES:
                self._signatures = _SignatureFile(file)
            else:
                self._columns[name] = _Column(file, _DTYPES[name])
        self._tokens_of_seen: dict[int, int] = {}
        self.num_documents = 0
        self.num_tokens = 0
        self.num_duplicates = 0
        self.num_duplicate_tokens = 0
        self.longest_conversation = 0

    def without_copies(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Yield each document whose content was not noted before, and count the others.

        Turns that two records have in common stay: either record may be held out.
        """
        for document in documents:
            num_tokens = self._tokens_of_seen.get(_identity(document))
            if num_tokens is None:
                yield document
            else:
                self.num_duplicates += 1
                self.num_duplicate_tokens += num_tokens

    def note(self, document: Document, tokens: Tokens, loss: LossMask | None) -> None:
        """Add one document of the shard."""
        self.num_documents += 1
        self._write_columns(document, tokens)
        num_tokens = len(tokens)
        if document.is_conversation:
            self.longest_conversation = max(self.longest_conversation, num_tokens - 1)
        else:
            num_tokens += 1  # END_OF_TEXT
        self.num_tokens += num_tokens
        if len(self._tokens_of_seen) >= MAX_SEEN:
            self._tokens_of_seen.clear()
        self._tokens_of_seen[_identity(document)] = num_tokens
        if self._signatures is not None:
            compared = tokens
            if document.is_conversation:
                compared = own_tokens(tokens, has_mask=loss is not None)
            self._signatures.add(compared, len(tokens))

    def finish(self) -> None:
        """Write what waits, and the number of documents."""
        for column in self._columns.values():
            column.finish()
        if self._signatures is not None:
            self._signatures.finish()

    def _write_columns(self, document: Document, tokens: Tokens) -> None:
        columns = self._columns
        columns[HASHES].add_hash(document.content_hash)
        columns[PLACES].add_number(document.origin)
        if CLUSTERS in columns:
            columns[CLUSTERS].add_number(document.cluster)
        if RECORDS in columns:
            columns[RECORDS].add_hash(document.record or document.content_hash)
        if BODIES in columns:
            columns[BODIES].add_hash(hash_of_body(tokens))


class _Column:
    """A side file with one number, or one hash, for each document."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        self._writer = ArrayWriter(file, dtype)
        self._dtype = dtype
        self._waiting = array.array("Q")

    def add_number(self, value: int) -> None:
        """Add a number of 64 bits."""
        self._waiting.append(value)
        if len(self._waiting) >= _WAITING_NUMBERS:
            self._write()

    def add_hash(self, value: int) -> None:
        """Add a hash of 128 bits."""
        self._waiting.append(value >> 64)
        self.add_number(value & 2**64 - 1)

    def finish(self) -> None:
        """Write what waits, and the end of the file."""
        self._write()
        self._writer.finish()

    def _write(self) -> None:
        values: npt.NDArray[np.uint64] = np.array(self._waiting, np.dtype("<u8"))
        self._writer.append(values.view(self._dtype))
        self._waiting = array.array("Q")


class _SignatureFile:
    """The side file with the MinHash signature of each document."""

    def __init__(self, file: IO[bytes]) -> None:
        self._writer = ArrayWriter(file, np.dtype("<u4"), (NUM_HASHES,))
        self._waiting: list[Tokens] = []
        self._num_waiting_tokens = 0

    def add(self, compared: Tokens, num_tokens: int) -> None:
        """Add a document.

        Args:
            compared: Those of its tokens by which near copies are found.
            num_tokens: Number of all of its tokens.
        """
        self._waiting.append(compared)
        self._num_waiting_tokens += num_tokens
        if self._num_waiting_tokens >= SIGNATURE_TOKENS:
            self._write()

    def finish(self) -> None:
        """Write what waits, and the end of the file."""
        self._write()
        self._writer.finish()

    def _write(self) -> None:
        self._writer.append(minhash_signatures(self._waiting))
        self._waiting = []
        self._num_waiting_tokens = 0
