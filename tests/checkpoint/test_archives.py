"""The values of an archived tensor are found without reading its pickle."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.checkpoint.archives import values_offset
from cpt.errors import CheckpointError


def archive_of(values: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def find(path: Path, content: bytes, numel: int, before: int = 0) -> int:
    """Put an archive into a file behind some bytes, and return where its values are."""
    path.write_bytes(b"\xaa" * before + content + b"\xaa" * 100)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return values_offset(descriptor, before, len(content), numel)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("numel", [1, 2, 255, 256, 65_536, 100_000])
@pytest.mark.parametrize("before", [0, 12_345])
def test_values_are_where_torch_put_them(tmp_path: Path, numel: int, before: int) -> None:
    values = torch.randn(numel)
    found = find(tmp_path / "file", archive_of(values), numel, before)
    stored = (tmp_path / "file").read_bytes()[found : found + numel * 4]
    assert torch.equal(torch.frombuffer(bytearray(stored), dtype=torch.float32), values)


@pytest.mark.parametrize("numel", [0, 9, 11, 2**61])
def test_another_number_of_elements_is_refused(tmp_path: Path, numel: int) -> None:
    with pytest.raises(CheckpointError, match=rf"not an archive of {numel} elements"):
        find(tmp_path / "file", archive_of(torch.zeros(10)), numel)


def zipped(records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return buffer.getvalue()


BAD = {
    "nothing": b"",
    "no archive": b"\x00" * 2000,
    "no values": zipped([("archive/data.pkl", b"\x00" * 40)]),
    "two tensors": zipped([("archive/data/0", b"\x00" * 40), ("b/data/0", b"\x00" * 40)]),
    "compressed": zipped([("archive/data/0", b"\x00" * 40)], zipfile.ZIP_DEFLATED),
    "a directory of many records": zipped([(f"archive/{i}", b"") for i in range(3000)]),
    "the end is missing": archive_of(torch.zeros(10))[:-30],
    "the beginning is missing": archive_of(torch.zeros(10))[700:],
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
@pytest.mark.case("X1", "crafted archives in a shard: refused")
def test_what_is_no_archive_of_a_tensor_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="not an archive of 10 elements"):
        find(tmp_path / "file", content, 10)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_changed_archive_gives_values_inside_it_or_is_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(archive_of(torch.zeros(10)))
    start = data.draw(st.sampled_from([0, 600, len(content) - 600]))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(start, min(start + 599, len(content) - 1)))
        content[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        found = find(tmp_path / "file", bytes(content), 10)
        assert 0 <= found <= len(content) - 40
