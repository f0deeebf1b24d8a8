"""Too little room is said before anything is written, and a failed write names its cause."""

from __future__ import annotations

import errno
import resource
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from cpt.checkpoint import staging
from cpt.checkpoint.flat_planner import FlatRange
from cpt.checkpoint.staging import Staging, available_bytes, check_host_memory
from cpt.errors import ConfigError, StorageError
from cpt.storage import space

Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(0, 0, 1_100_000))
    space.check_checkpoint_space(tmp_path, 900_000)
    with pytest.raises(
        StorageError, match=r"needs 3\.6 MB \(1\.2 times its size\), 1\.1 MB are free at"
    ) as caught:
        space.check_checkpoint_space(tmp_path, 3_000_000)
    assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 74


def test_limit_on_file_sizes_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space.resource, "getrlimit", lambda which: (1_000_000, 1_000_000))
    space.check_checkpoint_space(tmp_path, 100, largest_file_bytes=999_999)
    with pytest.raises(
        StorageError,
        match=r"files of 2\.0 MB, this process may write 1\.0 MB per file \(ulimit -f\)",
    ):
        space.check_checkpoint_space(tmp_path, 100, largest_file_bytes=2_000_000)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EFBIG, "limit of"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_cause_is_found_in_the_chain_of_errors(tmp_path: Path, number: int, words: str) -> None:
    try:
        try:
            raise OSError(number, "deep inside")
        except OSError as inner:
            raise RuntimeError("stream failed") from inner
    except RuntimeError as outer:
        text = str(space.write_error(outer, tmp_path))
    assert words in text and str(tmp_path) in text


def test_unknown_cause_is_told_with_the_free_space(tmp_path: Path) -> None:
    text = str(space.write_error(RuntimeError("PytorchStreamWriter failed"), tmp_path))
    assert "RuntimeError: PytorchStreamWriter failed" in text and "MB free" in text


def test_no_limit_on_file_sizes_is_no_limit(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    space.check_checkpoint_space(tmp_path, 1, largest_file_bytes=2**60)


def test_host_memory_that_is_missing_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (available_bytes() or 0) > 0
    monkeypatch.setattr(staging, "available_bytes", lambda: 3 * 10**9)
    check_host_memory(10**9, 2 * 10**9)
    with pytest.raises(
        ConfigError,
        match=r"1\.0 GB of each rank .* 4\.0 GB on this node; 3\.0 GB .*async_save=false",
    ):
        check_host_memory(10**9, 4 * 10**9)


def test_staged_copy_does_not_change_with_its_source_and_its_buffer_is_used_again() -> None:
    source = torch.arange(10.0)
    area = Staging()
    ranges = {"master/a": FlatRange(tensor=source, offset=5, global_numel=20)}
    copy = area.copy(ranges)["master/a"]
    source.add_(1)
    assert torch.equal(copy.tensor, torch.arange(10.0))
    assert (copy.offset, copy.global_numel) == (5, 20)
    assert area.copy(ranges)["master/a"].tensor.data_ptr() == copy.tensor.data_ptr()
