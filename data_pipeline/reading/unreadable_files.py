"""Files that are not of the format that they are to be read in, each told with its cure.

Decisions
    A JSONL or Parquet file stands for many documents, so one that is something else stops the
    build. A text file is one document, so it is a reject.
    A text file may hold HTML if its name says so (.html) or says nothing; a `.txt` that is a page
    is a failed download.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.config.source_config import SourceConfig, suffix_format
from data_pipeline.errors import DataError
from data_pipeline.store.file_kinds import (
    COMPRESSED,
    FileKind,
    describe_head,
    kind_of_file,
)
from data_pipeline.store.text_files import TextLayers

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_ARRAY = re.compile(rb"\s*\[\s*(\{|\Z)")
_JSON_OVER_LINES = re.compile(rb"\s*\{\s*?\n\s+\"")


def parquet_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises on a damaged Parquet file: its own exceptions and many others."""
    import pyarrow as pa

    built_in = (OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError)
    return (pa.ArrowException, *built_in)


def unreadable(path: Path | str, error: OSError) -> DataError:
    """Return the error that says why a file of the input cannot be read, and what to do."""
    reason = error.strerror or str(error)
    hint = " Fetch it again." if "runcated" in reason or "damaged" in reason else ""
    return DataError(f"{error.filename or path}: cannot be read: {reason}.{hint}")


def unreadable_parquet(path: Path, error: Exception) -> DataError:
    """Return the error that says why a Parquet file cannot be read, and what to do."""
    reason = str(error).rstrip(".\n")
    return DataError(f"{path}: not a readable Parquet file: {reason}. Fetch it or write it again.")


def check_not_empty(path: Path, source: SourceConfig, layers: TextLayers) -> None:
    """Refuse a file without content: of a byte order mark alone, or of compressed nothing.

    Raises:
        DataError: it has none.
    """
    if layers.head.removeprefix(_BYTE_ORDER_MARK):
        return
    why = "holds nothing"
    if layers.kind in COMPRESSED:
        why = "holds nothing once it is decompressed"
    raise DataError(
        f"{path}: empty file: {why} (source '{source.name}'). Remove it or fetch it again."
    )


def check_jsonl(path: Path, source: SourceConfig, layers: TextLayers) -> None:
    """Refuse a file that is no JSONL, as far as its first bytes show.

    Raises:
        DataError: it is of another kind, or JSON that is not one record a line.
    """
    name = f"source '{source.name}'"
    if layers.content is not FileKind.TEXT:
        inside = f"{layers.kind.words} with " if layers.kind in COMPRESSED else ""
        cure = layers.content.cure
        if layers.content is FileKind.PARQUET and not inside:
            cure = "Set format: parquet, or leave format out."
        raise DataError(f"{path}: is {inside}{layers.content.words}, not JSONL ({name}). {cure}")
    head = layers.head.removeprefix(_BYTE_ORDER_MARK)
    if _JSON_ARRAY.match(head):
        raise DataError(
            f"{path}: is one JSON array, not JSONL, which has a record on each line ({name}). "
            "Convert it: jq -c '.[]' FILE > NEW."
        )
    if _JSON_OVER_LINES.match(head):
        raise DataError(
            f"{path}: is JSON with records over several lines, not JSONL, which has a record on "
            f"each line ({name}). Convert it: jq -c . FILE > NEW."
        )


def check_parquet(path: Path, source: SourceConfig) -> None:
    """Refuse a file that does not begin as Parquet does.

    Raises:
        DataError: it does not; the message says what it is.
    """
    kind = kind_of_file(path)
    if kind is FileKind.PARQUET:
        return
    cure = kind.cure
    if kind is FileKind.TEXT:
        cure = "Fetch it again, or set the format that it has."
    raise DataError(
        f"{path}: is {describe_head(path)}, not a Parquet file (source '{source.name}'). {cure}"
    )


def why_no_text(path: Path, layers: TextLayers) -> str | None:
    """Return the reason why a text file is no text, or None if it may be."""
    kind = layers.content
    if kind is FileKind.XML or kind is FileKind.TEXT:
        return None
    if kind is FileKind.HTML and suffix_format(path) is None:
        return None
    return f"is {kind.words}, not text"
