"""Too little room is said before anything is written, and a failed write names its cause."""

from __future__ import annotations

import errno
import resource
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.checkpoint import staging
from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.staging import HostNeed, Staging, available_bytes, bytes_of_copy, choose_way
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


def test_sizes_of_real_models_are_told_in_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(0, 0, 78_265_500_000))
    with pytest.raises(StorageError, match=r"needs 1,682\.6 GB \(1\.2 .*, 78\.3 GB are free at"):
        space.check_checkpoint_space(tmp_path, 1_402_200_000_000)


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
    assert "RuntimeError: PytorchStreamWriter failed" in text and " free)" in text


def test_no_limit_on_file_sizes_is_no_limit(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    space.check_checkpoint_space(tmp_path, 1, largest_file_bytes=2**60)


GB = 10**9


def needs(*hosts: str, own: int = GB, available: int | None = 3 * GB) -> list[HostNeed]:
    """Return the need of one rank on each of the hosts."""
    return [HostNeed(host, own, available) for host in hosts]


def test_host_memory_that_is_missing_is_said_with_what_to_do() -> None:
    assert choose_way(True, needs("a", "a")) == ("copy", "")
    told = r"1\.0 GB of each rank, 4\.0 GB on a, where 3\.0 GB are available\. .*async_save=stream"
    with pytest.raises(ConfigError, match=told):
        choose_way(True, needs("a", "a", "a", "a"))


def test_node_without_room_for_a_copy_lets_all_ranks_stream() -> None:
    assert choose_way("auto", needs("a", "b", "a")) == ("copy", "")
    way, why = choose_way("auto", needs("a", "b", "b", "b"))
    assert way == "stream" and "3.0 GB on b, where 3.0 GB are available" in why
    assert choose_way("auto", needs(*"bbbbaaaa"))[1].endswith("(1 more nodes have too little)")


def test_copy_that_was_asked_for_may_take_all_that_is_available() -> None:
    assert choose_way(True, needs("b", "b", "b")) == ("copy", "")


def test_saves_that_make_no_copy_need_no_memory() -> None:
    assert choose_way(False, needs("a", own=100 * GB)) == ("wait", "")
    assert choose_way("stream", needs("a", own=100 * GB)) == ("stream", "")


def test_system_that_does_not_say_how_much_memory_is_left_gets_a_copy() -> None:
    assert choose_way("auto", needs("a", available=None)) == ("copy", "")


CGROUPS = {
    "version 1": ("4:memory:", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "version 2": ("0::", ".", "memory.max", "memory.current"),
}


@pytest.mark.parametrize(
    ("own", "limits", "left"),
    [
        ("/job", {"job": "5000"}, 2650),
        # as SLURM does: the job and the step are limited, the task is not
        ("/job/step/task", {"job": "9000", "job/step": "5000", "job/step/task": "max"}, 2650),
        ("/path/of/the/host", {"": "4000"}, 1650),  # in a container
    ],
)
@pytest.mark.parametrize("version", CGROUPS)
def test_memory_that_is_left_of_a_cgroup_and_of_those_above_it_is_known(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    own: str,
    limits: dict[str, str],
    left: int,
) -> None:
    line, root, limit_file, usage_file = CGROUPS[version]
    prefix = "total_" if version == "version 1" else ""
    for folder, limit in limits.items():
        where = tmp_path / "sys/fs/cgroup" / root / folder
        where.mkdir(parents=True, exist_ok=True)
        (where / limit_file).write_text(f"{limit}\n")
        (where / usage_file).write_text("3000\n")
        (where / "memory.stat").write_text(f"{prefix}inactive_file 600\n{prefix}active_file 50\n")
    cgroup = tmp_path / "proc/self/cgroup"
    cgroup.parent.mkdir(parents=True)
    cgroup.write_text(f"9:name=systemd:/\n{line}{own}\n")
    monkeypatch.setattr(staging, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    assert available_bytes() == left


def test_copy_of_what_is_on_a_gpu_takes_page_locked_memory() -> None:
    """torch rounds that up to a power of two."""
    codes = SimpleNamespace(nbytes=4097, is_cuda=True)
    exponents = SimpleNamespace(nbytes=65, is_cuda=True)
    part: Any = SimpleNamespace(tensor=codes, exponents=exponents)
    assert bytes_of_copy(part) == 8192 + 128
    on_host = FlatRange(tensor=torch.zeros(1025), offset=0, global_numel=1025)
    assert bytes_of_copy(on_host) == 4100


def test_staged_copy_does_not_change_with_its_source_and_its_buffer_is_used_again() -> None:
    source = torch.arange(10.0)
    area = Staging()
    ranges = {"master/a": FlatRange(tensor=source, offset=5, global_numel=20)}
    copy = area.copy(ranges)["master/a"]
    source.add_(1)
    assert torch.equal(copy.tensor, torch.arange(10.0))
    assert (copy.offset, copy.global_numel) == (5, 20)
    assert area.copy(ranges)["master/a"].tensor.data_ptr() == copy.tensor.data_ptr()
