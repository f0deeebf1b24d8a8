"""Archives of tensors are what torch writes, and their values are found without their pickle."""

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

from cpt.checkpoint.archives import values_offset, write_archive
from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.write_buffer import HashedFile, WriteBuffer
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


def written_archive(path: Path, values: torch.Tensor) -> int:
    """Write an archive into a file, and return where its values are."""
    with open(path, "wb", buffering=0) as file:
        part = FlatRange(tensor=values, offset=0, global_numel=values.numel())
        return write_archive(HashedFile(file), values.numel(), WriteBuffer().pieces(part))


@pytest.mark.parametrize("numel", [1, 255, 256, 65_536, 100_000])
def test_torch_reads_the_archive_that_was_written_piece_by_piece(
    tmp_path: Path, numel: int
) -> None:
    values = torch.randn(numel)
    first = written_archive(tmp_path / "file", values)
    content = (tmp_path / "file").read_bytes()
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert torch.equal(loaded, values) and loaded.dtype == torch.float32
    assert find(tmp_path / "other", content, numel) == first
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None, "checksums"


def test_description_of_the_tensor_means_what_torch_writes(tmp_path: Path) -> None:
    values = torch.randn(70_000)
    written_archive(tmp_path / "file", values)
    ours = torch.load(tmp_path / "file", weights_only=True)
    of_torch = torch.load(io.BytesIO(archive_of(values)), weights_only=True)
    for one in (ours, of_torch):
        assert one.untyped_storage().nbytes() == 280_000
        assert (one.stride(), one.storage_offset(), one.requires_grad) == ((1,), 0, False)


def test_archive_of_more_than_two_gigabytes_is_read_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit from which on sizes take 64 bits is set to a kilobyte."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    values = torch.randn(1000)
    first = written_archive(tmp_path / "file", values)
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True), values)
    assert find(tmp_path / "other", (tmp_path / "file").read_bytes(), 1000) == first


def test_equal_values_make_equal_bytes(tmp_path: Path) -> None:
    values = torch.randn(1000)
    written_archive(tmp_path / "one", values)
    written_archive(tmp_path / "two", values.clone())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
