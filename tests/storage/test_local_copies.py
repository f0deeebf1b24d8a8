"""Copies on a node's disk are whole, used again only while they equal their source, or not made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cpt.errors import StorageError
from cpt.storage.local_copies import VARIABLE, alone_in, local_copy, stage

NAMES = ("manifest.json", "train/a.bin")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "mix"
    (folder / "train").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "train" / "a.bin").write_bytes(b"abc" * 1000)
    (folder / "unrelated").write_text("stays")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    return folder


def test_copy_holds_the_named_files_and_is_used_again(source: Path, root: Path) -> None:
    copy = stage(source, NAMES, root)
    found = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    assert found == sorted(NAMES)
    assert (copy / "train" / "a.bin").read_bytes() == (source / "train" / "a.bin").read_bytes()
    before = (copy / "train" / "a.bin").stat().st_mtime_ns
    assert stage(source, NAMES, root) == copy
    assert (copy / "train" / "a.bin").stat().st_mtime_ns == before


def test_changed_source_gets_a_copy_of_its_own(source: Path, root: Path) -> None:
    first = stage(source, NAMES, root)
    file = source / "train" / "a.bin"
    file.write_bytes(b"xyz" * 1000)  # of the same size
    os.utime(file, ns=(1, 1))
    second = stage(source, NAMES, root)
    assert second != first and (second / "train" / "a.bin").read_bytes()[:3] == b"xyz"


def test_copy_that_has_lost_a_file_is_made_again(source: Path, root: Path) -> None:
    copy = stage(source, NAMES, root)
    (copy / "train" / "a.bin").unlink()
    assert stage(source, NAMES, root) == copy
    assert (copy / "train" / "a.bin").stat().st_size == 3000


def test_too_little_room_is_told_with_both_sizes_and_leaves_nothing(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StorageError, match=r"the copy of .*mix needs .* Set CPT_STAGE_DIR"):
        stage(source, NAMES, root)
    assert list(root.iterdir()) == []


def test_copy_that_is_cut_short_gets_no_name(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(file: Path, target: Path) -> None:
        target.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", cut_short)
    with pytest.raises(StorageError, match="changed while it was copied"):
        stage(source, NAMES, root)
    assert list(root.iterdir()) == []


def test_links_keep_the_hash_that_their_target_is_named_after(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "snapshot"
    cache.mkdir()
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_text("weights")
    (cache / "model.safetensors").symlink_to(blob)
    copied = stage(cache, ["model.safetensors"], root) / "model.safetensors"
    assert copied.is_symlink() and copied.resolve().name == blob.name
    assert root in copied.resolve().parents and copied.read_text() == "weights"


def test_leftovers_of_a_killed_copy_go(root: Path) -> None:
    (root / ".partial-x").mkdir()
    (root / "kept-0123").mkdir()
    with alone_in(root):
        assert sorted(path.name for path in root.iterdir()) == [".lock", "kept-0123"]
    with (
        pytest.raises(StorageError, match="Set CPT_STAGE_DIR to another"),
        alone_in(root / ".lock" / "below"),
    ):
        pass


def test_ranks_read_the_copy_that_the_environment_names(source: Path, root: Path) -> None:
    copy = stage(source, NAMES, root)
    variables = {VARIABLE: json.dumps({str(source): str(copy)})}
    assert local_copy(source, variables) == copy
    assert local_copy(source / "train" / "..", variables) == copy
    assert local_copy(source.parent, variables) == source.parent
    assert local_copy(source, {}) == source
