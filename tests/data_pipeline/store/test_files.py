"""Promises of the atomic writer and of the cache of what files hold."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipeline.store import files
from data_pipeline.store.files import (
    AtomicFile,
    atomic_write,
    cached_per_file,
    sha256_of,
    write_json,
    write_text,
    xxh3_of,
    xxh3_of_open,
)


def test_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"whole")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_file_that_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with suppress(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced: list[tuple[str, bool]] = []

    def record(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        kind = "folder" if target == tmp_path else "file"
        synced.append((kind, path.exists()))

    monkeypatch.setattr(files.os, "fsync", record)
    write_text(path, "content")
    assert synced == [("file", False), ("folder", True)]


def test_two_writers_of_one_file_do_not_mix_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first = AtomicFile(path)
    second = AtomicFile(path)
    first.file.write(b"first")
    second.file.write(b"second")
    second.publish()
    first.publish()
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_published_file_survives_a_later_discard(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic = AtomicFile(path)
    atomic.publish()
    atomic.discard()
    assert list(tmp_path.iterdir()) == [path]


def test_discarded_file_leaves_nothing(tmp_path: Path) -> None:
    AtomicFile(tmp_path / "file").discard()
    assert list(tmp_path.iterdir()) == []


def test_json_is_ascii_and_ends_with_a_newline(tmp_path: Path) -> None:
    value = {"b": "\u3042", "a": 1}
    write_json(tmp_path / "file.json", value, indent=1)
    content = (tmp_path / "file.json").read_bytes()
    assert content.isascii() and content.endswith(b"}\n")
    assert json.loads(content) == value
    write_json(tmp_path / "file.json", value, sort_keys=True)
    assert (tmp_path / "file.json").read_text() == '{"a": 1, "b": "\\u3042"}\n'


def test_hashes_are_those_of_the_whole_content(tmp_path: Path) -> None:
    content = os.urandom(files._CHUNK_BYTES + 7)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert xxh3_of(path) == xxhash.xxh3_128_hexdigest(content)
    with path.open("rb") as file:
        assert xxh3_of_open(file) == xxhash.xxh3_128_hexdigest(content)


def test_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path: Path) -> None:
    reads: list[str] = []

    @cached_per_file(max_files=8)
    def read(path: Path, suffix: str) -> str:
        reads.append(path.name)
        return path.read_text() + suffix

    path = tmp_path / "file"
    path.write_text("one")
    assert [read(path, "!"), read(path, "!")] == ["one!", "one!"]
    assert reads == ["file"]
    assert read(path, "?") == "one?"
    write_text(path, "two")  # as long as before, but another inode
    assert read(path, "!") == "two!"
    assert reads == ["file", "file", "file"]


def write_large(path: Path, what: str) -> None:
    with atomic_write(path) as file:
        if what == "array":
            np.save(file, np.zeros(99_999))
        else:
            file.write(bytes(99_999))


@pytest.mark.parametrize("what", ["bytes", "array"])
def test_a_disk_that_is_full_is_told_with_the_path(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_large(path, what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_reading_while_a_file_is_written_keeps_its_own_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "file"):
        open(tmp_path / "input")  # noqa: SIM115  # it is not there
    assert caught.value.filename == str(tmp_path / "input")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.filename is None
