"""Saved datasets whose record batches would be decompressed when they are opened, found before.

`datasets` maps the Arrow streams of a folder into memory, and writes them without compression. A
batch whose buffers are compressed is decompressed as a whole, with all others, when the folder is
opened; some kilobytes may stand for gigabytes. pyarrow shows the header of a message as bytes only,
so the one field that matters is looked up here.

Source: the Arrow format, Message.fbs (Message, RecordBatch, DictionaryBatch), and the internals of
    FlatBuffers (tables and vtables).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import read_json

_MAX_STATE_BYTES = 2**24
"""Bytes of state.json, which names each file of data."""
_HEADER_TYPE, _HEADER = 1, 2
"""Fields of Message."""
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
"""Values of the field for the type of header."""
_DATA = 1
"""The field of DictionaryBatch with its RecordBatch."""
_COMPRESSION = 3
"""Field of RecordBatch."""


def check_saved_dataset(folder: Path) -> None:
    """Refuse a folder of `datasets.save_to_disk` with compressed record batches.

    Raises:
        OSError: a file cannot be read.
        ValueError: it has some, or its JSON is beyond the limits; the message says so.
    """
    import pyarrow as pa

    for path in _data_files(folder):
        with pa.memory_map(str(path)) as file:
            for message in pa.ipc.MessageReader.open_stream(file):
                if _is_compressed(message.metadata.to_pybytes()):
                    raise ValueError(
                        f"{path} has compressed record batches, which would be decompressed all "
                        "at once. `save_to_disk` writes none: load it with `datasets` on a machine "
                        "with enough memory and save it again"
                    )


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the files that `datasets.load_from_disk` opens for a folder."""
    folders = [folder]
    splits = _json_object(folder / "dataset_dict.json").get("splits")
    for split in splits if isinstance(splits, list) else []:
        folders.append(folder / str(split))
    for place in folders:
        entries = _json_object(place / "state.json").get("_data_files")
        for entry in entries if isinstance(entries, list) else []:
            path = place / str(entry.get("filename") if isinstance(entry, dict) else "")
            if path.is_file():
                yield path


def _json_object(path: Path) -> dict[str, object]:
    """Return a JSON object; an empty one if there is no file, or another value."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path, _MAX_STATE_BYTES)
    except MalformedInput as error:
        raise ValueError(f"{path}: {error}") from error
    return value if isinstance(value, dict) else {}


def _is_compressed(header: bytes) -> bool:
    """Return whether a message is a batch with compressed buffers.

    Raises:
        ValueError: the header is cut off.
    """
    try:
        (root,) = struct.unpack_from("<I", header, 0)
        at = _field(header, root, _HEADER_TYPE)
        kind = header[at] if at else 0
        if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
            return False
        batch = _table(header, root, _HEADER)
        if kind == _DICTIONARY_BATCH:
            batch = _table(header, batch, _DATA)
        return _field(header, batch, _COMPRESSION) != 0
    except (struct.error, IndexError):
        raise ValueError("a record batch has a header that is cut off") from None


def _field(header: bytes, table: int, number: int) -> int:
    """Return the position of a field of a table, 0 if the table lacks it."""
    (back,) = struct.unpack_from("<i", header, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", header, vtable)
    place = 4 + 2 * number
    if place + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", header, vtable + place)
    return table + int(offset) if offset else 0


def _table(header: bytes, table: int, number: int) -> int:
    """Return the position of the table that a field of a table refers to."""
    at = _field(header, table, number)
    (offset,) = struct.unpack_from("<I", header, at)
    return at + int(offset)
