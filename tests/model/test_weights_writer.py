"""Weight files written in pieces are those of safetensors, and appear only when whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cpt.errors import ConfigError, InternalError, StorageError
from cpt.model.weights import writer as tensor_writer
from cpt.model.weights.checksums import SUMS_FILE
from cpt.model.weights.hf_layout import INDEX_FILE, SINGLE_FILE, tensor_files
from cpt.model.weights.writer import (
    LEFTOVER_SECONDS,
    DirectoryWriter,
    Entry,
    check_weights_space,
    published,
)

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "b": torch.arange(10).bfloat16(),
    "c": torch.arange(7, dtype=torch.uint8),
}
ENTRIES = {
    name: Entry(shape=tuple(value.shape), dtype=value.dtype) for name, value in TENSORS.items()
}


def write(folder: Path, names: str = "abc", piece: int = 5) -> None:
    with DirectoryWriter(folder, ENTRIES) as writer:
        for name in names:
            flat = TENSORS[name].view(-1)
            for start in reversed(
                range(0, flat.numel(), piece)
            ):  # pieces go to their place in any order
                writer.write(name, start, flat[start : start + piece])


def test_one_file_holds_every_tensor_exactly(tmp_path: Path) -> None:
    write(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [SUMS_FILE, SINGLE_FILE]
    found = load_file(tmp_path / SINGLE_FILE)
    assert found.keys() == TENSORS.keys() and all(
        torch.equal(found[name], TENSORS[name]) for name in TENSORS
    )


def test_several_files_and_their_index_hold_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_writer, "LARGEST_FILE_BYTES", 50)
    write(tmp_path)
    files = tensor_files(tmp_path)
    assert sorted(file.name for file in set(files.values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert all(torch.equal(load_file(file)[name], TENSORS[name]) for name, file in files.items())
    assert (
        json.loads((tmp_path / INDEX_FILE).read_text())["metadata"]["total_size"]
        == 24 * 4 + 10 * 2 + 7
    )


def test_tensor_that_was_not_written_is_an_error_and_leaves_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_writer, "LARGEST_FILE_BYTES", 50)
    with pytest.raises(InternalError, match="model-00002-of-00002"):
        write(tmp_path, "ab")
    with pytest.raises(ConfigError):
        tensor_files(tmp_path)


def test_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with suppress(InternalError), DirectoryWriter(tmp_path, ENTRIES) as writer:
        writer.write("a", 0, TENSORS["a"].view(-1))
        assert not (tmp_path / SINGLE_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with published(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="no space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_write_one_directory_do_not_touch_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with published(out) as first:
        (first / "weights").write_text("first", encoding="utf-8")
        with suppress(StorageError), published(out) as second:
            assert first != second
            (second / "weights").write_text("second", encoding="utf-8")
            raise OSError(28, "No space left on device")
        assert (first / "weights").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").read_text(encoding="utf-8") == "first"


def test_what_a_killed_process_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    killed = os.fork()
    if killed == 0:
        with published(tmp_path / "out") as folder:
            (folder / "weights").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    assert len(list(tmp_path.iterdir())) == 2
    with published(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_machine_has_left_is_removed_after_a_day_and_other_names_never(
    tmp_path: Path,
) -> None:
    left = tmp_path / ".tmp-out-0123456789abcdef"
    kept = [tmp_path / ".tmp-out-of-a-person", tmp_path / ".tmp-other-0123456789abcdef"]
    for folder in (left, *kept):
        folder.mkdir()
    (tmp_path / f"{left.name}.lock").write_text("another machine", encoding="ascii")
    with published(tmp_path / "out"):
        pass
    assert left.exists()
    (tmp_path / "out").rmdir()
    then = time.time() - LEFTOVER_SECONDS - 60
    for folder in (left, *kept):
        os.utime(folder, (then, then))
    with published(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "out"])


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    with pytest.raises(StorageError, match=r"need 5\.0 MB, 3\.0 MB are free"):
        check_weights_space(tmp_path, 5_000_000)
