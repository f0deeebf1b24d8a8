"""An array that is written in pieces is the file that NumPy writes of all of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.reading.content_hashes import HASH_DTYPE
from data_pipeline.store.array_writer import ArrayWriter

ARRAYS: dict[str, npt.NDArray[Any]] = {
    "numbers": np.arange(12_345, dtype="<u8"),
    "hashes": np.arange(246, dtype="<u8").view(HASH_DTYPE),
    "rows": np.arange(600, dtype="<u4").reshape(-1, 6),
    "nothing": np.zeros((0, 6), "<u4"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_pieces_make_the_bytes_that_numpy_saves(name: str, tmp_path: Path) -> None:
    values = ARRAYS[name]
    expected = io.BytesIO()
    np.save(expected, values)
    path = tmp_path / "written.npy"
    with path.open("wb") as file:
        writer = ArrayWriter(file, values.dtype, values.shape[1:])
        for piece in np.array_split(values, 7):
            writer.append(piece)
        writer.finish()
    assert path.read_bytes() == expected.getvalue()
