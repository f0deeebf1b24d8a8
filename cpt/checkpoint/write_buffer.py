"""The way of values from where the state lies into a file: in pieces, hashed on the way.

fp32 values in host memory are written as they lie. All others pass through a buffer of a set size,
which is the only memory that a write takes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
import xxhash

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import FileRecord
from cpt.storage.state_bytes import BF16_BYTES, FP32_BYTES, MOMENT_BLOCK

DEFAULT_BUFFER_BYTES = 64 * 2**20
_PIECE_NUMEL = 2**22
"""Elements that are hashed and written at once."""


class HashedFile:
    """Hashes what is written to a file; without a file it does nothing else."""

    def __init__(self, file: io.FileIO | None) -> None:
        self._file = file
        self._digest = xxhash.xxh3_128()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the bytes.

        Raises:
            OSError: they could not be written.
        """
        view = memoryview(data).cast("B")
        self._digest.update(view)
        if self._file is not None:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: no bytes are kept back."""

    def record(self, name: str) -> FileRecord:
        """Return size and hash of what was written, as those of a file of this name."""
        return FileRecord(name=name, bytes=self.num_bytes, xxh3_128=self._digest.hexdigest())


class WriteBuffer:
    """Turns tensors anywhere into the bytes of fp32 values in host memory, piece by piece."""

    def __init__(self, num_bytes: int = DEFAULT_BUFFER_BYTES) -> None:
        """Prepare to pass values through `num_bytes` of host memory, which is taken when needed."""
        self._num_bytes = num_bytes
        self._buffer: torch.Tensor | None = None

    def pieces(self, part: FlatRange) -> Iterator[memoryview]:
        """Yield the fp32 values of a range in order; each piece is valid until the next."""
        values = part.tensor.detach()
        if values.device.type == "cpu" and values.dtype == torch.float32:
            for piece in values.split(_PIECE_NUMEL):
                yield piece.numpy().data
            return
        buffer = self._buffer_of(values)
        for first in range(0, values.numel(), len(buffer)):
            passing = buffer[: values.numel() - first]
            _pass(part, first, passing)
            yield passing.numpy().data

    def _buffer_of(self, values: torch.Tensor) -> torch.Tensor:
        if self._buffer is None:
            # a piece of the working dtype on a device is in host memory twice for a moment
            numel = self._num_bytes // (FP32_BYTES + BF16_BYTES)
            numel = max(1, numel // MOMENT_BLOCK) * MOMENT_BLOCK
            self._buffer = torch.empty(numel, pin_memory=values.is_cuda)
        return self._buffer


def _pass(part: FlatRange, first: int, passing: torch.Tensor) -> None:
    """Copy the fp32 values of a range from one of its elements on.

    Only what is held travels: a copy that changes device and dtype would take memory of the device.
    """
    blocks = part.blocks
    if blocks is not None:
        blocks.narrow(first, len(passing)).on_host().decode(passing)
        return
    piece = part.tensor.detach()[first : first + len(passing)]
    passing.copy_(piece if piece.dtype == torch.float32 else piece.cpu())
