"""The archives in which torch.distributed.checkpoint stores a range: where their values lie.

Each range is what `torch.save` makes of a 1-D fp32 tensor: a zip archive, not compressed, whose
record `data/0` holds the values as they are in memory. Its record `data.pkl` is a pickle, which
only describes the tensor; it is never read.
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import IO, cast

from cpt.errors import CheckpointError
from cpt.storage.state_bytes import FP32_BYTES

_MOST_READ_BYTES = 2**16
"""The directory of an archive of one tensor takes less than a kilobyte."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"


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
