"""An array that is written to a file piece by piece, so that nobody holds all of it.

    header for no rows -> rows, as they come -> header for all rows, in the place of the first one

Decisions
    The bytes are those of `numpy.save`. NumPy pads a header so that every number of rows fits it.
"""

from __future__ import annotations

from typing import IO, Any

import numpy as np
import numpy.typing as npt


class ArrayWriter:
    """Appends rows to an open file."""

    def __init__(
        self, file: IO[bytes], dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()
    ) -> None:
        """Begin an array.

        Args:
            file: A file that is empty and open for writing.
            dtype: Type of the numbers, in little endian.
            row_shape: Shape of a row; that of a number by itself is empty.
        """
        self._file = file
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._num_rows = 0
        self._write_header()
        self._header_bytes = file.tell()

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write some more rows, [rows, *row_shape]."""
        assert rows.dtype == self._dtype
        assert rows.shape[1:] == self._row_shape
        self._file.write(np.ascontiguousarray(rows).view(np.uint8).data)
        self._num_rows += len(rows)

    def finish(self) -> None:
        """Write how many rows there are."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "NumPy pads headers for any number of rows"

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
