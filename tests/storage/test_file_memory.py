"""Memory that is a file: reserved at once, handed out piece by piece, and gone with the process."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import pytest
import torch

from cpt.errors import StorageError
from cpt.storage.file_memory import FileMemory
from tests.support.mapped_files import mapped_files


def test_tensors_lie_in_a_file_without_a_name_one_after_another(tmp_path: Path) -> None:
    memory = FileMemory(tmp_path / "made", 4 * 10_000)
    first, second = memory.zeros(9_000, torch.float32), memory.zeros_like(torch.empty(1_000))
    assert first.shape == (9_000,) and not first.any() and not second.any()
    first.fill_(1)
    assert not second.any()
    ((start, size),) = mapped_files(tmp_path)
    assert size >= 40_000 and (first.data_ptr(), second.data_ptr()) == (start, start + 36_000)
    assert list((tmp_path / "made").iterdir()) == []


def test_file_goes_with_its_last_tensor(tmp_path: Path) -> None:
    tensor = FileMemory(tmp_path, 4).zeros(1, torch.float32)
    assert len(mapped_files(tmp_path)) == 1 and tensor.item() == 0
    del tensor
    gc.collect()
    assert mapped_files(tmp_path) == []


def test_copies_keep_values_and_dtype(tmp_path: Path) -> None:
    tensors = [
        torch.randn(3, 2, dtype=torch.bfloat16),
        torch.randn(0, dtype=torch.bfloat16),
        torch.ones(1).bfloat16(),
    ]
    copies = FileMemory(tmp_path, 14).copies(tensors)
    assert all(
        torch.equal(copy, tensor.view(-1)) for copy, tensor in zip(copies, tensors, strict=True)
    )
    assert FileMemory(tmp_path, 0).copies([]) == []


def test_no_more_is_handed_out_than_was_reserved(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="12 of 8 bytes"):
        FileMemory(tmp_path, 8).zeros(3, torch.float32)


def test_disk_without_room_is_refused_at_once_with_the_size(tmp_path: Path) -> None:
    """The limit of a file's size stands for a full disk: the same call fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(
            StorageError,
            match=r"0\.002 GB for offloaded state could not be reserved in .*nvme_path",
        ):
            FileMemory(tmp_path, 2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        FileMemory(tmp_path / "inside", 8)


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="File exists"):
        FileMemory(tmp_path / "taken", 8)
