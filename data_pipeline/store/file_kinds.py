"""What a file is, decided by its first bytes and never by its name.

Decisions
    One table holds every kind with its words in messages and what to do about it, so the reader of
    texts, the reader of tables and the reader of weights say the same about the same file.
    A kind that nothing here recognizes is TEXT: only reading can tell whether it is UTF-8.
    Some kinds begin with letters alone. Where text is expected, a zero byte must follow for them:
    each of these formats has one near its beginning, and a text that begins with PARENTS has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from data_pipeline.bounded.files import open_regular

HEAD_BYTES = 4096
"""Number of bytes that decide the kind of a file."""

TEXT_KINDS_VERSION = 2
"""Version of the rules by which a file is taken for text.

It belongs to what a part of text files is known by, so a change of what is rejected must raise it.
"""


class FileKind(Enum):
    """A kind of file: its words in messages, and what a person does to make it readable."""

    TEXT = ("text", "")
    LFS_POINTER = (
        "a Git LFS pointer in place of the file",
        "Fetch the file itself: run `git lfs pull` in the checkout, or `hf download`.",
    )
    ANNEX_POINTER = (
        "a git-annex pointer in place of the file",
        "Fetch the file itself: run `git annex get` in the checkout.",
    )
    ZEROS = (
        "zero bytes where its content should begin",
        "A download or a copy did not finish, or a disk lost the content: fetch it again.",
    )
    HTML = (
        "an HTML page",
        "A server sent a page in place of the file, often one that asks to log in: fetch it again.",
    )
    XML = (
        "an XML document",
        "If a server sent it to report an error, fetch the file again; else convert it.",
    )
    GZIP = ("gzip data", "Decompress it: gzip -dc FILE > NEW.")
    ZSTD = ("zstd data", "Decompress it: zstd -dc --long=31 FILE > NEW.")
    XZ = ("xz data", "Decompress it: xz -dc FILE > NEW.")
    BZIP2 = ("bzip2 data", "Decompress it: bzip2 -dc FILE > NEW.")
    LZ4 = ("LZ4 data", "Decompress it: lz4 -dc FILE > NEW.")
    COMPRESS = ("data of the old program compress (.Z)", "Decompress it: gzip -dc FILE > NEW.")
    SNAPPY = ("framed Snappy data", "Decompress it.")
    ZIP = ("a ZIP archive (or PyTorch weights)", "Unpack it: unzip FILE.")
    TAR = ("a tar archive", "Unpack it: tar -xf FILE.")
    SEVEN_ZIP = ("a 7z archive", "Unpack it: 7z x FILE.")
    RAR = ("a RAR archive", "Unpack it.")
    PARQUET = ("a Parquet file", "Set format: parquet.")
    ENCRYPTED_PARQUET = ("an encrypted Parquet file", "Write it without encryption.")
    ARROW_FILE = (
        "an Arrow file (Feather)",
        "If it belongs to a saved dataset, name its folder and set format: huggingface; else write "
        "it as Parquet.",
    )
    ARROW_STREAM = (
        "an Arrow stream, as `datasets` keeps them",
        "Name the folder of the saved dataset and set format: huggingface, or write it as Parquet.",
    )
    ORC = ("an ORC file", "Write it as Parquet.")
    AVRO = ("an Avro file", "Write it as Parquet or JSONL.")
    SAFETENSORS = ("a safetensors file (weights)", "Name the file with the text.")
    GGUF = ("a GGUF file (quantized weights of llama.cpp)", "Name the file with the text.")
    PICKLE = (
        "a Python pickle",
        "It can run code and is not read: save weights as safetensors, texts as JSONL.",
    )
    NUMPY = ("a NumPy array", "Write the texts as JSONL or Parquet.")
    HDF5 = ("an HDF5 file", "Write it as Parquet or JSONL; weights as safetensors.")
    SQLITE = ("an SQLite database", "Export it as JSONL.")
    PDF = ("a PDF document", "Extract its text first.")

    def __init__(self, words: str, cure: str) -> None:
        self.words = words
        """What the file is, to stand behind "is"."""
        self.cure = cure
        """One or two sentences on what to do; empty for text."""


COMPRESSED = (FileKind.GZIP, FileKind.ZSTD, FileKind.XZ, FileKind.BZIP2)
"""Kinds that are decompressed on the way."""
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": FileKind.LFS_POINTER,
    b"version https://hawser.github.com/spec/": FileKind.LFS_POINTER,
    b"/annex/objects/": FileKind.ANNEX_POINTER,
}
_MAGIC = {
    b"\x1f\x8b": FileKind.GZIP,
    b"\x28\xb5\x2f\xfd": FileKind.ZSTD,
    b"\xfd7zXZ\x00": FileKind.XZ,
    b"\x04\x22\x4d\x18": FileKind.LZ4,
    b"\x1f\x9d": FileKind.COMPRESS,
    b"\xff\x06\x00\x00sNaPpY": FileKind.SNAPPY,
    b"PK\x03\x04": FileKind.ZIP,
    b"PK\x05\x06": FileKind.ZIP,
    b"7z\xbc\xaf\x27\x1c": FileKind.SEVEN_ZIP,
    b"Rar!\x1a\x07": FileKind.RAR,
    b"PAR1": FileKind.PARQUET,
    b"PARE": FileKind.ENCRYPTED_PARQUET,
    b"ARROW1\x00\x00": FileKind.ARROW_FILE,
    b"FEA1": FileKind.ARROW_FILE,
    b"ORC\x0a": FileKind.ORC,
    b"Obj\x01": FileKind.AVRO,
    b"\x93NUMPY": FileKind.NUMPY,
    b"\x89HDF\r\n\x1a\n": FileKind.HDF5,
    b"SQLite format 3\x00": FileKind.SQLITE,
    b"%PDF-": FileKind.PDF,
    b"GGUF": FileKind.GGUF,
    **_POINTERS,
}
"""Kinds by the bytes that a file of the kind begins with."""
_LETTERED = frozenset(
    (
        FileKind.PARQUET,
        FileKind.ENCRYPTED_PARQUET,
        FileKind.ARROW_FILE,
        FileKind.ORC,
        FileKind.GGUF,
    )
)
"""Kinds that a text can begin like."""
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x8a\x95}\]c(]")
_HTML = re.compile(rb"(?i)(\xef\xbb\xbf)?\s{0,64}<(!doctype\s+html|html|head|body)[\s>]")
_XML = re.compile(rb"(?i)(\xef\xbb\xbf)?\s{0,64}<\?xml\s")
_PATTERNS: tuple[tuple[re.Pattern[bytes], FileKind], ...] = (
    (_BZIP2, FileKind.BZIP2),
    (_ZSTD_SKIPPABLE, FileKind.ZSTD),
    (_PICKLE, FileKind.PICKLE),
    (_HTML, FileKind.HTML),
    (_XML, FileKind.XML),
)
_TAR_AT = 257
_MAX_TENSOR_HEADER = 100 * 2**20
"""Bytes of the longest header that safetensors allows."""


def kind_of(head: bytes) -> FileKind:
    """Return the kind of a file that begins with `head`; TEXT if it is no kind that is known.

    Args:
        head: The first `HEAD_BYTES` of the file, or all of a shorter one.
    """
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    for pattern, kind in _PATTERNS:
        if pattern.match(head):
            return kind
    for test, kind in _TESTS:
        if test(head):
            return kind
    return FileKind.TEXT


def kind_of_text(head: bytes) -> FileKind:
    """Return the kind of a file that is to hold text, perhaps compressed; see `kind_of`."""
    kind = kind_of(head)
    if kind in _LETTERED and b"\0" not in head:
        return FileKind.TEXT
    return kind


def kind_of_file(path: Path) -> FileKind:
    """Return the kind of a file.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return kind_of(file.read(HEAD_BYTES))


def _is_tar(head: bytes) -> bool:
    return head[_TAR_AT : _TAR_AT + 5] == b"ustar"


def _is_arrow_stream(head: bytes) -> bool:
    """Return whether there is a continuation mark and the length of a small schema."""
    if len(head) < 16 or not head.startswith(b"\xff\xff\xff\xff"):
        return False
    length = int.from_bytes(head[4:8], "little")
    return length % 8 == 0 and 0 < length < 2**24 and head[8:12] == b"\x10\x00\x00\x00"


def _is_safetensors(head: bytes) -> bool:
    """Return whether there is a length and the JSON object that it is the length of."""
    if len(head) < 10:
        return False
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= _MAX_TENSOR_HEADER and head[8:9] == b"{"


def _is_zeros(head: bytes) -> bool:
    return len(head) >= 16 and not head.strip(b"\0")


_TESTS: tuple[tuple[Callable[[bytes], bool], FileKind], ...] = (
    (_is_tar, FileKind.TAR),
    (_is_arrow_stream, FileKind.ARROW_STREAM),
    (_is_safetensors, FileKind.SAFETENSORS),
    (_is_zeros, FileKind.ZEROS),
)


def describe_head(path: Path) -> str:
    """Return what a file is, or how it begins, to stand behind "is"; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    kind = kind_of(head)
    if kind is not FileKind.TEXT:
        return kind.words
    if not head:
        return "empty"
    return f"something that begins with {head[:24]!r}"
