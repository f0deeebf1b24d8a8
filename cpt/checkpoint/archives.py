"""The archives in which torch.distributed.checkpoint stores a range: where their values lie.

Each range is what `torch.save` makes of a 1-D fp32 tensor: a zip archive, not compressed, whose
record `data/0` holds the values as they are in memory. Its record `data.pkl` is a pickle, which
only describes the tensor; it is never read.

The archives are written here piece by piece. `torch.save` needs all values of a range in host
memory, in a tensor of their own. What is written depends on the values alone, so equal values make
equal bytes.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable
from typing import IO, Protocol, cast

from cpt.errors import CheckpointError
from cpt.storage.state_bytes import FP32_BYTES

_MOST_READ_BYTES = 2**16
"""The directory of an archive of one tensor takes less than a kilobyte."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_BEFORE_STORAGE = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
)
"""The pickle of a 1-D fp32 tensor until the number of elements of its storage (torch 2.13)."""
_BEFORE_SIZE = b"tQK\x00"
_BEHIND_SIZE = b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR."


class Sink(Protocol):
    """Takes bytes in order and counts them."""

    @property
    def num_bytes(self) -> int:
        """Bytes taken so far."""

    def write(self, data: bytes | memoryview) -> int:
        """Take all of the bytes, and return how many they were."""

    def flush(self) -> None:
        """Do what `zipfile` asks of a file."""


def write_archive(sink: Sink, numel: int, pieces: Iterable[memoryview]) -> int:
    """Write the archive of a 1-D fp32 tensor.

    Args:
        sink: Where it goes.
        numel: Elements of the tensor.
        pieces: Their values in order; each is used up before the next one is asked for.

    Returns:
        The first byte of the values, counted in the sink.
    """
    with zipfile.ZipFile(cast(IO[bytes], sink), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_record("data.pkl"), _description(numel))
        archive.writestr(_record("byteorder"), b"little")
        record = _record("data/0")
        record.file_size = numel * FP32_BYTES  # whether the sizes need 64 bits is decided by it
        with archive.open(record, "w") as values:
            first = sink.num_bytes
            for piece in pieces:
                values.write(piece)
        archive.writestr(_record("version"), b"3\n")
    return first


def _record(name: str) -> zipfile.ZipInfo:
    """Return a record without a date, which is what torch writes."""
    return zipfile.ZipInfo(f"archive/{name}")


def _description(numel: int) -> bytes:
    """Return the pickle that describes the tensor, with sizes as whole numbers of 8 bytes."""
    size = b"\x8a\x08" + struct.pack("<q", numel)
    return _BEFORE_STORAGE + size + _BEFORE_SIZE + size + _BEHIND_SIZE


class _ArchiveView:
    """A part of an open file, as much of a file as `zipfile` needs to read a directory."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._length = length
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if not 0 <= base + offset <= self._length:
            raise OSError("it points outside itself")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._position
        wanted = left if size < 0 else min(size, left)
        if wanted > _MOST_READ_BYTES:
            raise OSError(f"its directory is larger than {_MOST_READ_BYTES:,} bytes")
        content = os.pread(self._descriptor, wanted, self._offset + self._position)
        self._position += len(content)
        return content


def values_offset(descriptor: int, offset: int, length: int, numel: int) -> int:
    """Return the first byte of the values of an archived 1-D fp32 tensor, counted in the file.

    Args:
        descriptor: The file, open for reading.
        offset: First byte of the archive.
        length: Bytes of the archive.
        numel: Elements that it must hold.

    Raises:
        CheckpointError: there is no archive of that many elements. The message names neither file
            nor tensor.
    """
    view = _ArchiveView(descriptor, offset, length)
    wanted = numel * FP32_BYTES
    try:
        with zipfile.ZipFile(cast(IO[bytes], view)) as archive:
            records = archive.infolist()
        values = [record for record in records if record.filename.endswith("/data/0")]
        if len(values) != 1 or values[0].compress_type != zipfile.ZIP_STORED:
            raise ValueError("it does not hold one tensor, uncompressed")
        if values[0].file_size != wanted:
            raise ValueError(f"it holds {values[0].file_size} bytes of values, not {wanted}")
        view.seek(values[0].header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(view.read(_LOCAL_HEADER.size))
        first = view.tell() + name_bytes + extra_bytes
        if signature != _LOCAL_SIGNATURE or first + wanted > length:
            raise ValueError("its values do not lie inside it")
    except Exception as error:  # damaged archives fail in every way there is
        raise CheckpointError(f"not an archive of {numel} elements ({error})") from error
    return offset + first
