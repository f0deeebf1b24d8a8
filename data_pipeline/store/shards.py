"""Token shards: the documents of a source as one file each, read by position or through a map.

    bytes 0..7      magic
    bytes 8..11     version, uint32: 2 if the documents have loss masks, else 1
    bytes 12..15    length of the JSON header in bytes, uint32
    bytes 16..4095  JSON header, padded with spaces: dtype, num_tokens, num_documents,
                    num_control_tokens if the documents are conversations, and loss_bits (true) if
                    they have loss masks
    4096            tokens, uint32 each, padded to a multiple of 8 bytes; every document ends with
                    END_OF_TEXT, a conversation with <|return|>
    then            offset of each document in tokens, uint64, num_documents + 1 of them
    then            UTF-8 bytes of each document, uint64
    then            if there are loss masks: UTF-8 bytes of what is learned of each document, uint64

Decisions
    A loss mask says of each token whether it bears loss as a label. It is bit 31 of the token: an
    id needs 18 bits. Readers give ids without it, so that nothing that hashes or compares tokens
    sees the mask. The first token of a document is nobody's label and bears none; at least one
    other token does.
    All numbers are little-endian. The size of the file follows from the header, so a cut-off file
    is always noticed.
    The reader trusts nothing: what does not add up is a DataError that names the file.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import functools
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.bounded.files import open_regular
from data_pipeline.bounded.json_text import parse_json
from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write
from data_pipeline.store.open_files import OpenFiles
from data_pipeline.text.harmony import CALL, RETURN
from data_pipeline.text.tokenizer import END_OF_TEXT, NUM_TEXT_TOKENS, VOCAB_SIZE, Tokens

MAGIC = b"CPTSHARD"
VERSION = 1
MASKED_VERSION = 2
"""Version of a shard whose documents have loss masks."""
HEADER_BYTES = 4096
SUFFIX = ".tokens"
Integers = npt.NDArray[np.int64]
LossMask = npt.NDArray[np.bool_]
"""Whether each token of a document bears loss as a label."""
_DTYPE = "uint32"
_LOSS_BIT = 1 << 31
_ID_BITS = np.uint32(_LOSS_BIT - 1)
_SCAN_TOKENS = 1 << 24
_FILES_OF_A_SOURCE = 16
_TWO_OFFSETS = struct.Struct("<2Q")


class ShardWriter:
    """Appends documents to an open shard; `write_shard` makes one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets = array.array("Q", [0])
        self._document_bytes = array.array("Q")
        self._learned_bytes = array.array("Q")
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

    def add(
        self,
        tokens: Tokens,
        num_bytes: int,
        chat: bool = False,
        loss: LossMask | None = None,
        learned_bytes: int = 0,
    ) -> None:
        """Append one document.

        Args:
            tokens: Its tokens, at least one. END_OF_TEXT is added to text; a conversation has an
                end of its own.
            num_bytes: UTF-8 bytes of the document.
            chat: Whether it is a conversation; a shard holds conversations or text, never both.
            loss: Whether each token bears loss as a label, [tokens]; a text's END_OF_TEXT does. At
                least one after the first must. None if all do; a shard holds documents with masks
                or without, never both.
            learned_bytes: UTF-8 bytes of what the mask lets the model learn.
        """
        assert tokens.dtype == np.uint32
        assert len(tokens) > 0
        assert chat or not self._chat
        assert (loss is not None) == self._is_masked or not self.num_documents
        num_tokens = len(tokens)
        written = tokens
        if loss is not None:
            written = _marked(tokens, loss)
            self._learned_bytes.append(learned_bytes)
        self._file.write(written.astype("<u4", copy=False).tobytes())
        if chat:
            self._chat = True
            self._num_control_tokens += int(np.count_nonzero(tokens >= NUM_TEXT_TOKENS))
        else:
            end = END_OF_TEXT if loss is None else END_OF_TEXT | _LOSS_BIT
            self._file.write(struct.pack("<I", end))
            num_tokens += 1
        self._offsets.append(self._offsets[-1] + num_tokens)
        self._document_bytes.append(num_bytes)

    @property
    def _is_masked(self) -> bool:
        """Whether the documents written so far have loss masks."""
        return len(self._learned_bytes) > 0

    def finish(self) -> None:
        """Write what follows the tokens, and the header."""
        self._file.write(bytes(_padding_bytes(self.num_tokens)))
        self._file.write(np.asarray(self._offsets, dtype="<u8").data)
        self._file.write(np.asarray(self._document_bytes, dtype="<u8").data)
        self._file.write(np.asarray(self._learned_bytes, dtype="<u8").data)
        content: dict[str, Any] = {
            "dtype": _DTYPE,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
        }
        if self._chat:
            content["num_control_tokens"] = self._num_control_tokens
        version = VERSION
        if self._is_masked:
            content["loss_bits"] = True
            version = MASKED_VERSION
        header = json.dumps(content).encode("ascii")
        self._file.seek(0)
        self._file.write(MAGIC)
        self._file.write(struct.pack("<II", version, len(header)))
        self._file.write(header.ljust(HEADER_BYTES - 16))


def _marked(tokens: Tokens, loss: LossMask) -> Tokens:
    """Return tokens with the bit of those that bear loss."""
    assert loss.dtype == np.bool_
    assert len(loss) == len(tokens)
    bits = loss.astype(np.uint32) << np.uint32(31)
    bits[0] = 0  # nobody's label
    return tokens | bits


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """Where everything lies in a shard, by its header."""

    num_tokens: int
    """Tokens of all documents."""
    num_documents: int
    """Number of documents."""
    num_control_tokens: int | None
    """Control tokens of conversations; None if the documents are text."""
    has_loss: bool
    """Whether the documents have loss masks."""

    @property
    def offsets_at(self) -> int:
        """Position of the offsets in the file."""
        return HEADER_BYTES + 4 * self.num_tokens + _padding_bytes(self.num_tokens)

    @property
    def bytes_at(self) -> int:
        """Position of the UTF-8 bytes of each document in the file."""
        return self.offsets_at + 8 * (self.num_documents + 1)

    @property
    def learned_bytes_at(self) -> int:
        """Position of the UTF-8 bytes of what is learned of each document, with loss masks."""
        return self.bytes_at + 8 * self.num_documents

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.learned_bytes_at + (8 * self.num_documents if self.has_loss else 0)


def read_layout(path: Path) -> ShardLayout:
    """Read the header of a shard, and compare it with the size of the file.

    Raises:
        DataError: The file is missing, cut off, or of another format.
    """
    try:
        with open_regular(path) as file:
            block = os.pread(file.fileno(), HEADER_BYTES, 0)
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    header = _header(path, block)
    num_control_tokens = None
    if "num_control_tokens" in header:
        num_control_tokens = _count(path, header, "num_control_tokens")
    layout = ShardLayout(
        num_tokens=_count(path, header, "num_tokens"),
        num_documents=_count(path, header, "num_documents"),
        num_control_tokens=num_control_tokens,
        has_loss="loss_bits" in header,
    )
    if found != layout.file_bytes:
        raise _damaged(path, f"{found} bytes, its header says {layout.file_bytes}")
    return layout


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: {problem}. The token shard is damaged: delete the build and build it again."
    )


def _header(path: Path, block: bytes) -> dict[str, Any]:
    """Return the JSON in the first bytes of a shard."""
    if block[:8] != MAGIC:
        raise _damaged(path, f"starts with {block[:8]!r}, must start with {MAGIC!r}")
    if len(block) < HEADER_BYTES:
        raise _damaged(path, f"{len(block)} bytes, too short for its header of {HEADER_BYTES}")
    version, length = struct.unpack("<II", block[8:16])
    if version not in (VERSION, MASKED_VERSION):
        raise _damaged(
            path,
            f"has format version {version}, this code reads {VERSION} and {MASKED_VERSION}",
        )
    try:
        header = parse_json(block[16 : 16 + min(length, HEADER_BYTES - 16)])
    except ValueError as error:
        raise _damaged(path, "has a header that is not JSON") from error
    if not isinstance(header, dict) or header.get("dtype") != _DTYPE:
        raise _damaged(path, f"has a header without dtype {_DTYPE}: {header!r:.100}")
    if header.get("loss_bits") is not (True if version == MASKED_VERSION else None):
        raise _damaged(
            path, f"has format version {version} and loss_bits {header.get('loss_bits')!r:.40}"
        )
    return header


def _count(path: Path, header: dict[str, Any], key: str) -> int:
    value = header.get(key)
    if type(value) is not int or not 0 < value < 2**48:
        raise _damaged(path, f"has {key} {value!r:.40} in its header, must be above 0")
    return value


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
        layout = read_layout(path)
        self.num_tokens = layout.num_tokens
        self.num_documents = layout.num_documents
        self.chat = layout.num_control_tokens is not None
        """Whether the documents are conversations."""
        self.has_loss = layout.has_loss
        """Whether the documents have loss masks."""
        self._num_control_tokens = layout.num_documents
        if layout.num_control_tokens is not None:
            self._num_control_tokens = layout.num_control_tokens
        # one map: each keeps a descriptor
        file = np.memmap(path, np.uint8, "r")
        offsets_at = layout.offsets_at
        self._stored = file[HEADER_BYTES : HEADER_BYTES + 4 * self.num_tokens].view("<u4")
        self.offsets: npt.NDArray[np.int64] = file[offsets_at : layout.bytes_at].view("<i8")
        """Tokens before each document, and of all, [num_documents + 1]."""
        document_bytes = file[layout.bytes_at : layout.learned_bytes_at].view("<i8")
        self.document_bytes: npt.NDArray[np.int64] = document_bytes
        """UTF-8 bytes of each document, [num_documents]."""
        self._learned_bytes = file[layout.learned_bytes_at :].view("<i8")
        self._check_offsets()
        if verify:
            self._check_tokens()

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """Return the tokens [start, stop) of a document."""
        first = self.offsets[document]
        return _ids(self._stored[first + start : first + stop], self.has_loss)

    def loss(self, document: int, start: int, stop: int) -> LossMask | None:
        """Return whether the tokens [start, stop) of a document bear loss; None if all do."""
        if not self.has_loss:
            return None
        first = self.offsets[document]
        return _loss_bits(self._stored[first + start : first + stop])

    def count_loss(self, first: Integers, stop: Integers) -> Integers:
        """Return how many of some ranges of all tokens bear loss.

        Args:
            first: Number of the first token of each range, counted through the shard, [ranges].
            stop: Number of the token after the last one of each range, [ranges].
        """
        before = np.zeros(self.num_tokens + 1, np.int64)
        np.cumsum(_loss_bits(self._stored), out=before[1:])
        return np.asarray(before[stop] - before[first])

    @functools.cached_property
    def all_tokens(self) -> npt.NDArray[np.uint32]:
        """Tokens of all documents, one after the other, [num_tokens]; a copy if they have masks."""
        return _ids(self._stored, self.has_loss)

    @property
    def document_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, END_OF_TEXT included, [num_documents]."""
        return np.diff(self.offsets)

    def _error(self, problem: str) -> DataError:
        return _damaged(self.path, problem)

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
        if (self.document_bytes < 0).any() or (self._learned_bytes < 0).any():
            raise self._error("has a document of negative size")

    def _check_tokens(self) -> None:
        """Check the end of each document, every id and mask, and the number of control tokens."""
        self._check_ends()
        if self.has_loss:
            self._check_masks()
        num_control = 0
        for start in range(0, self.num_tokens, _SCAN_TOKENS):
            block = _ids(self._stored[start : start + _SCAN_TOKENS], self.has_loss)
            if block.max() >= VOCAB_SIZE:
                bad = int(np.argmax(block >= VOCAB_SIZE))
                raise self._error(
                    f"token {start + bad} has id {block[bad]}, must be below {VOCAB_SIZE}"
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
        ends = {END_OF_TEXT: "END_OF_TEXT"}
        if self.chat:
            ends = {RETURN: "<|return|>", CALL: "<|call|>"}
        last = _ids(self._stored[self.offsets[1:] - 1], self.has_loss)
        differs = ~np.isin(last, list(ends))
        if differs.any():
            bad = int(np.argmax(differs))
            names = " or ".join(f"{name} ({token})" for token, name in ends.items())
            raise self._error(f"document {bad} does not end with {names}")

    def _check_masks(self) -> None:
        """Check that each document has a token that bears loss, and that its first one does not."""
        if _loss_bits(self._stored[self.offsets[:-1]]).any():
            raise self._error("has a document whose first token bears loss")
        places = [np.zeros(0, np.int64)]
        for start in range(0, self.num_tokens, _SCAN_TOKENS):
            bits = _loss_bits(self._stored[start : start + _SCAN_TOKENS])
            # one place of each document is enough
            documents = np.searchsorted(self.offsets, start + np.flatnonzero(bits), side="right")
            places.append(np.unique(documents) - 1)
        missing = np.setdiff1d(np.arange(self.num_documents), np.concatenate(places))
        if len(missing):
            raise self._error(f"document {missing[0]} has no token that bears loss")


def _ids(stored: npt.NDArray[np.uint32], has_loss: bool) -> npt.NDArray[np.uint32]:
    """Return the ids of tokens as they stand in a shard."""
    return stored & _ID_BITS if has_loss else stored


def _loss_bits(stored: npt.NDArray[np.uint32]) -> LossMask:
    """Return the loss mask of tokens as they stand in a shard that has masks."""
    return stored >= _LOSS_BIT


class Shards:
    """The documents of a source, numbered through all its shards in order."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        *,
        verify: bool = True,
        num_documents: Integers | None = None,
        files: OpenFiles | None = None,
    ) -> None:
        """Take the shards `names` in `directory`.

        Args:
            directory: Folder of the source in the build.
            names: Names of its shards, in order.
            verify: Whether to check every token; see `Shard`.
            num_documents: Documents of each shard, [shards], if they are known: then nothing is
                read before it is asked for. Otherwise the header of every shard is.
            files: What reads the shards; None keeps a few of them open.

        Raises:
            DataError: There is no shard, or one is damaged.
        """
        if not names:
            raise DataError(
                f"{directory}: holds no token shard. Delete the build and build it again."
            )
        self._paths = [f"{directory}/{name}" for name in names]
        self._files = files or OpenFiles(_FILES_OF_A_SOURCE)
        self._layouts: dict[int, ShardLayout] = {}
        if verify:
            for path in self._paths:
                Shard(Path(path))
        if num_documents is None:
            counts = []
            for number in range(len(names)):
                counts.append(self._layout(number).num_documents)
            num_documents = np.array(counts, np.int64)
        if len(num_documents) != len(names):
            raise DataError(
                f"{directory}: has {len(names)} token shards, and numbers of documents for "
                f"{len(num_documents)}. Delete the build and build it again."
            )
        # number of documents up to the end of each shard
        self._ends: list[int] = np.cumsum(num_documents).tolist()

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._ends[-1]

    @property
    def chat(self) -> bool:
        """Whether there are conversations among the documents; reads the headers."""
        return any(
            self._layout(number).num_control_tokens is not None
            for number in range(len(self._paths))
        )

    @functools.cached_property
    def has_loss(self) -> bool:
        """Whether documents have loss masks; reads the headers.

        Raises:
            DataError: Some have, and some have not.
        """
        found = {self._layout(number).has_loss for number in range(len(self._paths))}
        if len(found) > 1:
            raise self._error(0, "has other documents than its neighbors: only some have masks")
        return found == {True}

    @functools.cached_property
    def document_tokens(self) -> Integers:
        """Tokens of each document, END_OF_TEXT included, [num_documents]; reads all offsets."""
        return self.lengths(0, self.num_documents)

    @functools.cached_property
    def document_bytes(self) -> Integers:
        """UTF-8 bytes of each document, [num_documents]; reads all of them."""
        return self.bytes_of(0, self.num_documents)

    @functools.cached_property
    def learned_bytes(self) -> Integers:
        """UTF-8 bytes of what is learned of each document, [num_documents]: all without a mask."""
        if not self.has_loss:
            return self.document_bytes
        return self.learned_bytes_of(0, self.num_documents)

    def bytes_of(self, first: int, stop: int) -> Integers:
        """Return the UTF-8 bytes of the documents [first, stop)."""
        return self._numbers(first, stop, lambda layout: layout.bytes_at)

    def learned_bytes_of(self, first: int, stop: int) -> Integers:
        """Return the UTF-8 bytes of what is learned of the documents [first, stop)."""
        if not self.has_loss:
            return self.bytes_of(first, stop)
        return self._numbers(first, stop, lambda layout: layout.learned_bytes_at)

    def _numbers(
        self, first: int, stop: int, position_in: Callable[[ShardLayout], int]
    ) -> Integers:
        """Return a number of each of the documents [first, stop).

        Args:
            first: The first document.
            stop: One past the last document.
            position_in: Returns where the numbers of a shard begin in its file.
        """
        parts = [np.zeros(0, np.int64)]
        for number, place, last in self._stretches(first, stop):
            position = position_in(self._layout(number)) + 8 * place
            content = self._files.read(self._paths[number], 8 * (last - place), position)
            parts.append(np.frombuffer(content, "<i8"))
        return np.concatenate(parts)

    def lengths(self, first: int, stop: int) -> Integers:
        """Return the tokens of the documents [first, stop), END_OF_TEXT included.

        Raises:
            DataError: A shard is damaged.
        """
        parts = [np.zeros(0, np.int64)]
        for number, place, last in self._stretches(first, stop):
            offsets_at = self._layout(number).offsets_at + 8 * place
            content = self._files.read(self._paths[number], 8 * (last - place + 1), offsets_at)
            lengths = np.diff(np.frombuffer(content, "<i8"))
            if (lengths < 2).any():
                bad = place + int(np.argmax(lengths < 2))
                raise self._error(number, f"has document offsets that do not rise (document {bad})")
            parts.append(lengths)
        return np.concatenate(parts)

    def _stretches(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the shards that hold the documents [first, stop), and which of its own they are.

        Raises:
            DataError: A shard has fewer documents than the build says.
        """
        document = first
        while document < stop:
            number, place = self._place(document)
            num_documents = self._layout(number).num_documents
            if place >= num_documents:
                raise self._error(number, f"holds {num_documents} documents, and the build more")
            last = min(num_documents, place + stop - document)
            yield number, place, last
            document += last - place

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """Return the tokens [start, stop) of a document.

        Raises:
            DataError: The document has no such tokens: its shard is damaged.
        """
        return self.tokens_and_loss(document, start, stop)[0]

    def loss(self, document: int, start: int, stop: int) -> LossMask | None:
        """Return whether the tokens [start, stop) of a document bear loss; None if all do.

        Raises:
            DataError: The document has no such tokens: its shard is damaged.
        """
        return self.tokens_and_loss(document, start, stop)[1]

    def tokens_and_loss(
        self, document: int, start: int, stop: int
    ) -> tuple[npt.NDArray[np.uint32], LossMask | None]:
        """Return the tokens [start, stop) of a document, and whether each bears loss.

        Returns:
            The ids, and the mask; None instead of a mask if all bear loss.

        Raises:
            DataError: The document has no such tokens: its shard is damaged.
        """
        number, place = self._place(document)
        layout = self._layout(number)
        path = self._paths[number]
        offsets = self._files.read(path, 16, layout.offsets_at + 8 * place)
        first, last = _TWO_OFFSETS.unpack(offsets)
        if not 0 <= start <= stop <= last - first or last > layout.num_tokens:
            raise self._error(
                number,
                f"document {place} has the tokens {first} to {last} of {layout.num_tokens}; "
                f"{start} to {stop} of them are asked for",
            )
        content = self._files.read(path, 4 * (stop - start), HEADER_BYTES + 4 * (first + start))
        stored = np.frombuffer(content, "<u4")
        if not layout.has_loss:
            return stored, None
        return _ids(stored, True), _loss_bits(stored)

    def count_learned(self, document: Integers, start: Integers, pairs: Integers) -> Integers:
        """Return how many labels of pieces of documents bear loss, [pieces].

        All tokens are read, one shard after the other.

        Args:
            document: Number of the document of each piece, [pieces].
            start: Tokens of the document before each piece, [pieces].
            pairs: Pairs of input and label of each piece, [pieces]; they lie in the document.

        Raises:
            DataError: A shard is damaged.
        """
        if not self.has_loss:
            return pairs
        counts = np.zeros(len(document), np.int64)
        order = np.argsort(document, kind="stable")
        borders = np.searchsorted(document[order], self._ends)
        first_document = 0
        first = 0
        for number, last in enumerate(borders.tolist()):
            chosen = order[first:last]
            if len(chosen):
                shard = Shard(Path(self._paths[number]), verify=False)
                first_label = shard.offsets[document[chosen] - first_document] + start[chosen] + 1
                counts[chosen] = shard.count_loss(first_label, first_label + pairs[chosen])
            first = last
            first_document = self._ends[number]
        return counts

    def _place(self, document: int) -> tuple[int, int]:
        """Return the shard of a document, and its number there."""
        number = bisect.bisect_right(self._ends, document)
        first = self._ends[number - 1] if number else 0
        return number, document - first

    def _layout(self, number: int) -> ShardLayout:
        layout = self._layouts.get(number)
        if layout is None:
            layout = read_layout(Path(self._paths[number]))
            self._layouts[number] = layout
        return layout

    def _error(self, number: int, problem: str) -> DataError:
        return _damaged(Path(self._paths[number]), problem)
