"""Files of text as UTF-8 with LF, whatever they are stored as.

    bytes -> decompressed -> UTF-16 and UTF-32 become UTF-8 -> CR line ends become LF

Decisions
    What has to be done is found from the first bytes, once more after each layer.
    UTF-16 and UTF-32 are told by their byte order mark, or without one by the zero bytes of a first
    character below U+0100 (as RFC 4627 does for JSON) or of most characters. Shift-JIS and other
    encodings are not guessed.
    What is no valid character becomes invalid UTF-8, so the reader rejects that line alone.
    Line ends are CR if there is a CR and no LF at all in the first 64 KiB, or, if there is neither,
    if the first line end is a CR.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from data_pipeline.store.compressed import BUFFER_BYTES, open_decompressed
from data_pipeline.store.file_kinds import COMPRESSED, HEAD_BYTES, FileKind, kind_of_text
from data_pipeline.store.files import cached_per_file

_LINE_HEAD_BYTES = 1 << 16
_KEPT_BYTES = 256
_MAX_FIRST_LINE_BYTES = 64 * 2**20
"""Bytes in which the first line end is looked for."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks; that of UTF-32 comes first, because it begins with that of UTF-16."""
_FIRST_CHARACTERS = (
    (re.compile(rb"[^\0]\0\0\0"), "utf-32-le"),
    (re.compile(rb"\0\0\0[^\0]"), "utf-32-be"),
    (re.compile(rb"[^\0]\0[^\0]\0"), "utf-16-le"),
    (re.compile(rb"\0[^\0]\0[^\0]"), "utf-16-be"),
)
"""First one or two characters, below U+0100."""
_FIRST_BYTES = 16
"""Bytes that must be text, too, if the first characters look like it."""
_INVALID = "cpt-invalid"
"""Name of the error handler that makes invalid UTF-8 of what is no valid character."""


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ud800", error.end


codecs.register_error(_INVALID, _mark_invalid)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLayers:
    """What lies between the bytes of a file and its text."""

    kind: FileKind
    """Kind of the file itself: one of COMPRESSED, or that of the content."""
    content: FileKind
    """Kind of what is inside, decompressed; TEXT if it can be read."""
    encoding: str | None = None
    """UTF-16 or UTF-32 in the words of `codecs`; None for UTF-8."""
    has_cr_lines: bool = False
    """Whether lines end with CR alone."""
    head: bytes
    """First bytes of the text, in UTF-8; empty if there is none."""

    @property
    def is_plain(self) -> bool:
        """Whether the bytes of the file are the bytes of the text, so it can be cut anywhere."""
        is_compressed = self.kind in COMPRESSED
        return not is_compressed and self.encoding is None and not self.has_cr_lines

    def notes(self) -> Iterator[str]:
        """Yield what the manifest counts about the file."""
        if self.encoding is not None:
            yield f"file in {self.encoding[:6].upper()}, read as UTF-8"
        if self.has_cr_lines:
            yield "file with CR line ends, read as LF"


@cached_per_file(max_files=2**14)
def text_layers(path: Path) -> TextLayers:
    """Return the layers of a file.

    Raises:
        OSError: It cannot be read, or its compressed data is damaged.
    """
    with path.open("rb") as file:
        kind = kind_of_text(file.read(HEAD_BYTES))
    with open_decompressed(path, kind) as file:
        head = file.read(HEAD_BYTES)
    content = kind_of_text(head) if kind in COMPRESSED else kind
    if content is not FileKind.TEXT:
        return TextLayers(kind=kind, content=content, head=head[:_KEPT_BYTES])
    encoding = _encoding_of(head)
    layers = TextLayers(kind=kind, content=content, encoding=encoding, head=head)
    with open_text(path, layers) as file:
        head = file.read(_LINE_HEAD_BYTES)
        has_cr_lines = _has_cr_lines(file, head)
    return TextLayers(
        kind=kind,
        content=kind_of_text(head[:HEAD_BYTES]),
        encoding=encoding,
        has_cr_lines=has_cr_lines,
        head=head[:_KEPT_BYTES],
    )


@contextlib.contextmanager
def open_text(path: Path, layers: TextLayers) -> Iterator[IO[bytes]]:
    """Open a file as UTF-8 with LF; a plain file can be sought in.

    While it is read, damaged compressed data is an OSError that names the file and the reason.
    """
    with open_decompressed(path, layers.kind) as file:
        stream: Any = file
        if layers.encoding is not None:
            stream = io.BufferedReader(_Transcoder(stream, layers.encoding), BUFFER_BYTES)
        if layers.has_cr_lines:
            stream = io.BufferedReader(_LineEnds(stream), BUFFER_BYTES)
        yield cast("IO[bytes]", stream)


def _encoding_of(head: bytes) -> str | None:
    """Return the encoding of a text that begins with `head`; None if it is UTF-8 or unknown."""
    for mark, encoding in _MARKS:
        if head.startswith(mark) and len(head) > len(mark):
            return encoding
    if b"\0" not in head or not head.strip(b"\0"):
        return None
    for pattern, encoding in _FIRST_CHARACTERS:
        if pattern.match(head):
            return encoding if _decodes(head[:_FIRST_BYTES], encoding) else None
    return _encoding_of_pairs(head)


def _encoding_of_pairs(head: bytes) -> str | None:
    """Return UTF-16 in the order in which half of all pairs have their zero byte."""
    low = head[0::2]
    high = head[1::2]
    if 2 * high.count(0) >= len(high) and low.count(0) == 0 and _decodes(head, "utf-16-le"):
        return "utf-16-le"
    if 2 * low.count(0) >= len(low) and high.count(0) == 0 and _decodes(head, "utf-16-be"):
        return "utf-16-be"
    return None


def _decodes(head: bytes, encoding: str) -> bool:
    """Return whether `head` is text in `encoding`, its last character perhaps cut off."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return all(ch >= " " or ch in "\t\n\r\f" for ch in text)


def _has_cr_lines(file: IO[bytes], head: bytes) -> bool:
    """Return whether lines end with CR; `file` stands behind `head`."""
    num_read = len(head)
    while head and b"\n" not in head and b"\r" not in head and num_read < _MAX_FIRST_LINE_BYTES:
        head = file.read(_LINE_HEAD_BYTES)
        num_read += len(head)
    if b"\n" in head or b"\r" not in head:
        return False
    # the LF of a CRLF may stand behind the bytes that were looked at
    return not (head.endswith(b"\r") and file.read(1) == b"\n")


class _Filter(io.RawIOBase):
    """A stream that turns the pieces of another one into other bytes."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._waiting = b""
        self._at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._waiting and not self._at_end:
            piece = self._source.read(len(target))
            self._at_end = not piece
            self._waiting = self._turned(piece)
        count = min(len(target), len(self._waiting))
        target[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _turned(self, piece: bytes) -> bytes:
        """Return what becomes of a piece, or of the end if it is empty."""
        raise NotImplementedError


class _Transcoder(_Filter):
    """UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, source: IO[bytes], encoding: str) -> None:
        super().__init__(source)
        self._decoder = codecs.getincrementaldecoder(encoding)(_INVALID)

    def _turned(self, piece: bytes) -> bytes:
        text = self._decoder.decode(piece, final=not piece)
        return text.encode("utf-8", "surrogatepass")


class _LineEnds(_Filter):
    """CR and CRLF as LF."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__(source)
        self._held = b""
        """A CR at the end of a piece, whose LF may come with the next one."""

    def _turned(self, piece: bytes) -> bytes:
        at_end = not piece
        piece = self._held + piece
        self._held = b""
        if piece.endswith(b"\r") and not at_end:
            self._held = b"\r"
            piece = piece[:-1]
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
