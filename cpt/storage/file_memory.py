"""File-backed memory: tensors whose pages the kernel reads from a disk and writes back (mmap(2)).

Decisions
    All of a file is reserved at once (posix_fallocate), so that a disk that is too small is refused
    at the start. A page that found no block later would end the process with SIGBUS, without a
    message.
    The file has no name. Its space is free again when the process ends, however it ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from cpt.errors import StorageError


class FileMemory:
    """A nameless file, mapped into memory and handed out piece by piece."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """Reserve `num_bytes` in `folder`, which is made if it is missing.

        Raises:
            StorageError: the folder cannot be used or has too little space.
        """
        self._folder = folder
        self._num_bytes = num_bytes
        self._used_bytes = 0
        self._memory: mmap.mmap | None = None
        if num_bytes == 0:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                self._memory = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            raise StorageError(
                f"{num_bytes / 1e9:.3f} GB for offloaded state could not be reserved in {folder} "
                f"({error.strerror}). Give a folder with that much free space for every rank of "
                "the node in nvme_path."
            ) from error

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the next piece: (numel,), zero as fresh files are. It keeps the file alive.

        Pieces follow each other but for the bytes to the next multiple of the dtype's size.
        """
        size = numel * dtype.itemsize
        start = -(-self._used_bytes // dtype.itemsize) * dtype.itemsize
        self._used_bytes = start + size
        assert self._used_bytes <= self._num_bytes, (
            f"{self._used_bytes} of {self._num_bytes} bytes in {self._folder}"
        )
        if self._memory is None or numel == 0:
            return torch.zeros(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=start)

    def zeros_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the next piece, of the size and dtype of a flat tensor."""
        return self.zeros(tensor.numel(), tensor.dtype)

    def copies(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the next pieces, one for each tensor, flat and with its values."""
        return [self.zeros_like(tensor).copy_(tensor.view(-1)) for tensor in tensors]
