"""Weight files whose SHA-256 is known are compared with it, each by one rank."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from cpt.errors import ConfigError
from cpt.model.weights.checksums import (
    SUMS_FILE,
    damaged,
    is_identity,
    known_sums,
    model_hash,
    sampled_hash,
    tensor_hash,
    weights_identity,
    write_sums,
)
from cpt.model.weights.hf_layout import open_tensors
from cpt.model.weights.writer import DirectoryWriter, Entry

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in NAMES]
    for number, file in enumerate(found):
        file.write_bytes(bytes([number]) * 1000)
    return found


def write_list(files: list[Path], separator: str = "  ") -> None:
    write_sums(files[0].parent, [file.name for file in files])
    sums = files[0].parent / SUMS_FILE
    sums.write_text(sums.read_text().replace("  ", separator))


def test_written_directory_knows_its_sums(tmp_path: Path) -> None:
    with DirectoryWriter(tmp_path, {"a": Entry(shape=(3,), dtype=torch.float32)}) as writer:
        writer.write("a", 0, torch.ones(3))
    files = list(tmp_path.glob("*.safetensors"))
    sums = known_sums(tmp_path, files)
    assert set(sums) == set(files) and damaged(sums, files) == []


@pytest.mark.parametrize("separator", ["  ", " *"])
def test_whole_files_pass(files: list[Path], separator: str) -> None:
    write_list(files, separator)
    sums = known_sums(files[0].parent, files)
    assert set(sums) == set(files) and damaged(sums, files) == []


def test_flipped_byte_is_named_with_its_file(files: list[Path]) -> None:
    write_list(files)
    files[1].write_bytes(b"\x01" * 500 + b"\x03" + b"\x01" * 499)
    (problem,) = damaged(known_sums(files[0].parent, files), files)
    assert str(files[1]) in problem and "fetch it again" in problem


def test_links_into_a_hub_cache_know_their_sum(files: list[Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    links = []
    for file in files:
        blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        links.append(snapshot / file.name)
        links[-1].symlink_to(blob)
    sums = known_sums(snapshot, links)
    assert set(sums) == set(links) and damaged(sums, links) == []
    links[0].resolve().write_bytes(b"other")
    assert len(damaged(sums, links)) == 1


def test_files_that_nobody_knows_are_left_out(files: list[Path]) -> None:
    assert known_sums(files[0].parent, files) == {}


def test_list_that_leaves_out_a_file_is_refused(files: list[Path]) -> None:
    write_list(files[:1])
    with pytest.raises(ConfigError, match=f"does not list {NAMES[1]}"):
        known_sums(files[0].parent, files)


def test_malformed_list_is_refused_with_its_line(files: list[Path]) -> None:
    (files[0].parent / SUMS_FILE).write_text("no sums here\n")
    with pytest.raises(ConfigError, match=f"{SUMS_FILE}:1"):
        known_sums(files[0].parent, files)


def test_sampled_hash_tells_weights_apart_and_reads_little(
    files: list[Path], tmp_path: Path
) -> None:
    before = sampled_hash(files)
    moved = tmp_path / "moved"
    moved.mkdir()
    copies = [Path(shutil.copy(file, moved)) for file in files]
    assert sampled_hash(reversed(copies)) == before
    copies[1].write_bytes(bytes([1]) * 999 + b"\0")
    assert sampled_hash(copies) != before
    copies[1].write_bytes(bytes([1]) * 1001)
    assert sampled_hash(copies) != before


def model_directory(folder: Path) -> list[Path]:
    """Write a large tensor and a small one, and a configuration."""
    entries = {
        "large": Entry(shape=(2**20,), dtype=torch.float32),
        "norm": Entry(shape=(64,), dtype=torch.float32),
        # of a size that puts `norm` between two blocks of `sampled_hash`
        "tail": Entry(shape=(11 * 2**17,), dtype=torch.float32),
    }
    with DirectoryWriter(folder, entries) as writer:
        for name, entry in entries.items():
            writer.write(name, 0, torch.ones(entry.shape))
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return sorted(folder.glob("*.safetensors"))


def change_small_tensor(file: Path) -> None:
    """Change the last value of `norm`."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    _, end = json.loads(content[8 : 8 + length])["norm"]["data_offsets"]
    content[8 + length + end - 1] ^= 1
    file.write_bytes(content)


def test_identity_sees_one_bit_of_a_small_tensor_and_of_the_configuration(tmp_path: Path) -> None:
    (file,) = model_directory(tmp_path)
    before = model_hash(tmp_path)
    sampled = sampled_hash([file])
    change_small_tensor(file)
    changed = model_hash(tmp_path)
    assert changed != before and not is_identity(before, changed)
    assert sampled_hash([file]) == sampled, (
        "the hash of before sees it, too: the test shows nothing"
    )
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert model_hash(tmp_path) != changed


def test_file_of_before_is_compared_by_the_hash_that_it_states(tmp_path: Path) -> None:
    (file,) = model_directory(tmp_path)
    identity = weights_identity([file])
    assert is_identity(identity, identity) and is_identity(sampled_hash([file]), identity)
    assert not is_identity(tensor_hash([file]), identity) and not is_identity(None, identity)
    assert not is_identity("tiny", "other+tiny"), "a name is compared as it is"


def test_pipe_among_the_weights_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    # with a writer the old code would read nothing for ever; without one it would wait for one
    keep_open = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(keep_open, bytes(2**16))
        for read in (lambda: model_hash(tmp_path), lambda: open_tensors(pipe)):
            with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read"):
                read()
        with pytest.raises(OSError, match="Not a regular file"):
            damaged({pipe: "0" * 64}, [pipe])
    finally:
        os.close(keep_open)
