"""Safetensors files read by byte ranges: a rank reads only what it keeps.

Nothing is mapped into memory. The format is a length (8 bytes, little endian), a JSON header with
the byte range of every tensor, and the bytes. The `safetensors` library validates a file when it is
opened; ranges of flattened tensors are then read here, because the library can only cut along axes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from cpt.errors import StorageError
from cpt.model.weights.hf_layout import open_tensors

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I32": torch.int32,
}


class TensorFile:
    """One safetensors file, open for reading; `bytes_read` counts what was read of its tensors."""

    def __init__(self, file: Path) -> None:
        """Open and validate the file.

        Raises:
            ConfigError: It is not a whole safetensors file.
        """
        with open_tensors(file):
            pass  # the header is whole, its ranges are disjoint, and the file has all their bytes
        self.file = file
        self.bytes_read = 0
        self._opened = open(file, "rb", buffering=0)  # noqa: SIM115 - closed with the object
        self._descriptor = self._opened.fileno()
        header_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        self._header: dict[str, Any] = json.loads(os.pread(self._descriptor, header_bytes, 8))
        self._data_start = 8 + header_bytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._header[name]["shape"])

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a flattened tensor, 1-D, in the dtype of the file.

        Raises:
            StorageError: The file could not be read, or is shorter than it was when opened.
        """
        entry = self._header[name]
        dtype = TORCH_DTYPES[entry["dtype"]]
        assert 0 <= start <= stop <= math.prod(entry["shape"]), (
            f"{name}[{start}:{stop}] is outside {entry['shape']}"
        )
        first_byte = self._data_start + entry["data_offsets"][0] + start * dtype.itemsize
        buffer = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        self._read_into(buffer.numpy().data, first_byte, name)
        return buffer.view(dtype)

    def _read_into(self, target: memoryview, position: int, name: str) -> None:
        done = 0
        while done < len(target):  # one call reads at most 2 GiB
            try:
                count = os.preadv(self._descriptor, [target[done:]], position + done)
            except OSError as error:
                raise StorageError(
                    f"{self.file}: reading tensor '{name}' failed: {error.strerror}."
                ) from error
            if count == 0:
                raise StorageError(
                    f"{self.file}: ends inside tensor '{name}'; it was changed while being read."
                )
            done += count
        self.bytes_read += done
