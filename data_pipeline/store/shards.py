"""Token shards: the documents of a source as one file that is read through a memory map.

    bytes 0..7      magic
    bytes 8..11     version, uint32
    bytes 12..15    length of the JSON header in bytes, uint32
    bytes 16..4095  JSON header, padded with spaces: dtype, num_tokens, num_documents, and
                    num_control_tokens if the documents are conversations
    4096            tokens, uint32 each, padded to a multiple of 8 bytes; every document ends with
                    END_OF_TEXT, a conversation with <|return|>
    then            offset of each document in tokens, uint64, num_documents + 1 of them
    then            UTF-8 bytes of each document, uint64

Decisions
    All numbers are little-endian. The size of the file follows from the header, so a cut-off file
    is always noticed.
    The reader trusts nothing: what does not add up is a DataError that names the file.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.bounded.json_text import parse_json
from data_pipeline.errors import DataError
from data_pipeline.store.descriptors import reserve_descriptors
from data_pipeline.store.files import atomic_write
from data_pipeline.text.harmony import RETURN
from data_pipeline.text.tokenizer import END_OF_TEXT, NUM_TEXT_TOKENS, VOCAB_SIZE, Tokens

MAGIC = b"CPTSHARD"
VERSION = 1
HEADER_BYTES = 4096
SUFFIX = ".tokens"
_DTYPE = "uint32"
_SCAN_TOKENS = 1 << 24


class ShardWriter:
    """Appends documents to an open shard; `write_shard` makes one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets = array.array("Q", [0])
        self._document_bytes = array.array("Q")
        self._num_control_tokens = 0
        self._chat = False
        file.write(bytes(HEADER_BYTES))

    @property
    def num_documents(self) -> int:
        """Number of documents written so far."""
        return len(self._document_bytes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens written so far, END_OF_TEXT included."""
        return self._offsets[-1]

    def add(self, tokens: Tokens, num_bytes: int, chat: bool = False) -> None:
        """Append one document.

        Args:
            tokens: Its tokens, at least one. END_OF_TEXT is added to text; a conversation has an
                end of its own.
            num_bytes: UTF-8 bytes of the document.
            chat: Whether it is a conversation; a shard holds conversations or text, never both.
        """
        assert tokens.dtype == np.uint32
        assert len(tokens) > 0
        assert chat or not self._chat
        self._file.write(tokens.astype("<u4", copy=False).tobytes())
        num_tokens = len(tokens)
        if chat:
            self._chat = True
            self._num_control_tokens += int(np.count_nonzero(tokens >= NUM_TEXT_TOKENS))
        else:
            self._file.write(struct.pack("<I", END_OF_TEXT))
            num_tokens += 1
        self._offsets.append(self._offsets[-1] + num_tokens)
        self._document_bytes.append(num_bytes)

    def finish(self) -> None:
        """Write what follows the tokens, and the header."""
        self._file.write(bytes(_padding_bytes(self.num_tokens)))
        self._file.write(np.asarray(self._offsets, dtype="<u8").tobytes())
        self._file.write(np.asarray(self._document_bytes, dtype="<u8").tobytes())
        content = {
            "dtype": _DTYPE,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
        }
        if self._chat:
            content["num_control_tokens"] = self._num_control_tokens
        header = json.dumps(content).encode("ascii")
        self._file.seek(0)
        self._file.write(MAGIC)
        self._file.write(struct.pack("<II", VERSION, len(header)))
        self._file.write(header.ljust(HEADER_BYTES - 16))


@contextlib.contextmanager
def write_shard(path: Path) -> Iterator[ShardWriter]:
    """Yield a writer whose shard appears as `path` once the block has ended without an error."""
    with atomic_write(path) as file:
        writer = ShardWriter(file)
        yield writer
        writer.finish()


def _padding_bytes(num_tokens: int) -> int:
    """Return the bytes that pad the tokens to a multiple of 8 bytes."""
    return -4 * num_tokens % 8


class Shard:
    """The documents of one shard file, read through a memory map."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Open `path`.

        Args:
            path: A file that `write_shard` wrote.
            verify: Whether to check every token, not only the header, the size and the offsets.

        Raises:
            DataError: The file is missing, damaged, or of another format; the message names it.
        """
        self.path = path
        header = self._read_header()
        self.num_tokens = self._count(header, "num_tokens")
        self.num_documents = self._count(header, "num_documents")
        self.chat = "num_control_tokens" in header
        """Whether the documents are conversations."""
        self._num_control_tokens = self.num_documents
        if self.chat:
            self._num_control_tokens = self._count(header, "num_control_tokens")
        offsets_at = HEADER_BYTES + 4 * self.num_tokens + _padding_bytes(self.num_tokens)
        bytes_at = offsets_at + 8 * (self.num_documents + 1)
        expected = bytes_at + 8 * self.num_documents
        found = path.stat().st_size
        if found != expected:
            raise self._error(f"{found} bytes, its header says {expected}")
        self._tokens = np.memmap(path, "<u4", "r", HEADER_BYTES, (self.num_tokens,))
        self.offsets: npt.NDArray[np.int64] = self._read_array(offsets_at, self.num_documents + 1)
        self.document_bytes: npt.NDArray[np.int64] = self._read_array(bytes_at, self.num_documents)
        self._check_offsets()
        if verify:
            self._check_tokens()

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """Return the tokens [start, stop) of a document."""
        first = self.offsets[document]
        return self._tokens[first + start : first + stop]

    @property
    def all_tokens(self) -> npt.NDArray[np.uint32]:
        """Tokens of all documents, one after the other, [num_tokens]."""
        return self._tokens

    @property
    def document_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, END_OF_TEXT included, [num_documents]."""
        return np.diff(self.offsets)

    def _error(self, problem: str) -> DataError:
        return DataError(
            f"{self.path}: {problem}. "
            "The token shard is damaged: delete the build and build it again."
        )

    def _read_header(self) -> dict[str, Any]:
        try:
            with self.path.open("rb") as file:
                block = file.read(HEADER_BYTES)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        if block[:8] != MAGIC:
            raise self._error(f"starts with {block[:8]!r}, must start with {MAGIC!r}")
        if len(block) < HEADER_BYTES:
            raise self._error(f"{len(block)} bytes, too short for its header of {HEADER_BYTES}")
        version, length = struct.unpack("<II", block[8:16])
        if version != VERSION:
            raise self._error(f"has format version {version}, this code reads {VERSION}")
        try:
            header = parse_json(block[16 : 16 + min(length, HEADER_BYTES - 16)])
        except ValueError as error:
            raise self._error("has a header that is not JSON") from error
        if not isinstance(header, dict) or header.get("dtype") != _DTYPE:
            raise self._error(f"has a header without dtype {_DTYPE}: {header!r:.100}")
        return header

    def _count(self, header: dict[str, Any], key: str) -> int:
        value = header.get(key)
        if type(value) is not int or not 0 < value < 2**48:
            raise self._error(f"has {key} {value!r:.40} in its header, must be above 0")
        return value

    def _read_array(self, position: int, count: int) -> npt.NDArray[np.int64]:
        return np.fromfile(self.path, "<u8", count, offset=position).astype(np.int64)

    def _check_offsets(self) -> None:
        # numbers far outside could wrap around in the differences
        outside = (self.offsets < 0) | (self.offsets > self.num_tokens)
        too_short = (np.diff(self.offsets) < 2) | outside[1:]
        covers_all = self.offsets[0] == 0 and self.offsets[-1] == self.num_tokens
        if too_short.any() or not covers_all:
            bad = int(np.argmax(too_short))
            raise self._error(
                f"has document offsets that do not rise from 0 to {self.num_tokens} "
                f"(document {bad})"
            )
        if (self.document_bytes < 0).any():
            raise self._error("has a document of negative size")

    def _check_tokens(self) -> None:
        """Check the end of each document, every id, and the number of control tokens."""
        self._check_ends()
        num_control = 0
        for start in range(0, self.num_tokens, _SCAN_TOKENS):
            block = self._tokens[start : start + _SCAN_TOKENS]
            if block.max() >= VOCAB_SIZE:
                bad = start + int(np.argmax(block >= VOCAB_SIZE))
                raise self._error(
                    f"token {bad} has id {self._tokens[bad]}, must be below {VOCAB_SIZE}"
                )
            num_control += int(np.count_nonzero(block >= NUM_TEXT_TOKENS))
        if num_control != self._num_control_tokens:
            expected = "one each is right"
            if self.chat:
                expected = f"its header says {self._num_control_tokens}"
            raise self._error(
                f"holds {num_control} control tokens for {self.num_documents} documents, {expected}"
            )

    def _check_ends(self) -> None:
        last = END_OF_TEXT
        name = "END_OF_TEXT"
        if self.chat:
            last = RETURN
            name = "<|return|>"
        differs = self._tokens[self.offsets[1:] - 1] != last
        if differs.any():
            bad = int(np.argmax(differs))
            raise self._error(f"document {bad} does not end with {name} ({last})")


class Shards:
    """The documents of a source, numbered through all its shards in order."""

    def __init__(self, directory: Path, names: Sequence[str], *, verify: bool = True) -> None:
        """Open the shards `names` in `directory`.

        Args:
            directory: Folder of the source in the build.
            names: Names of its shards, in order.
            verify: See `Shard`.

        Raises:
            DataError: There is no shard, or one is damaged.
            StorageError: There are more shards than files that may be open.
        """
        reserve_descriptors(len(names), str(directory))
        if not names:
            raise DataError(
                f"{directory}: holds no token shard. Delete the build and build it again."
            )
        self._shards: list[Shard] = []
        self._ends: list[int] = []  # number of documents up to the end of each shard
        self.chat = False
        """Whether the documents are conversations."""
        document_tokens = []
        document_bytes = []
        num_documents = 0
        for name in names:
            shard = Shard(directory / name, verify=verify)
            num_documents += shard.num_documents
            self._shards.append(shard)
            self._ends.append(num_documents)
            self.chat |= shard.chat
            document_tokens.append(shard.document_tokens)
            document_bytes.append(shard.document_bytes)
        self.document_tokens = np.concatenate(document_tokens)
        """Tokens of each document, END_OF_TEXT included, [num_documents]."""
        self.document_bytes = np.concatenate(document_bytes)
        """UTF-8 bytes of each document, [num_documents]."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_tokens)

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """Return the tokens [start, stop) of a document."""
        number = bisect.bisect_right(self._ends, document)
        shard = self._shards[number]
        first_document = self._ends[number] - shard.num_documents
        return shard.tokens(document - first_document, start, stop)
