"""Weights of a download that has not ended are told as such, by headers and names alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpt.errors import ConfigError
from cpt.model.weights.directory import check_directory
from cpt.model.weights.downloads import unfinished_files
from cpt.model.weights.hf_layout import INDEX_FILE

SHAPES = {"a": (4, 8), "b": (3,), "c": (2, 2)}
SHARDS = {"a": "m-1-of-3.safetensors", "b": "m-2-of-3.safetensors", "c": "m-3-of-3.safetensors"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory of three shards."""
    for name, shard in SHARDS.items():
        save_file({name: torch.ones(SHAPES[name])}, tmp_path / shard)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": SHARDS}), encoding="utf-8")
    return tmp_path


def problems_of(directory: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_directory(directory, SHAPES)
    return caught.value.problems


def test_whole_weights_are_accepted_whatever_another_download_left(directory: Path) -> None:
    (directory / "original.bin.incomplete").touch()
    assert check_directory(directory, SHAPES).keys() == SHAPES.keys()


def test_every_file_that_is_cut_off_is_told_with_the_download(directory: Path) -> None:
    for name in ("a", "c"):
        file = directory / SHARDS[name]
        file.write_bytes(file.read_bytes()[:-1])
    unfinished = directory / ".cache" / "huggingface" / "download" / "x.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    first, hint, second = problems_of(directory)
    assert first.startswith(f"{directory / SHARDS['a']}: not a whole safetensors file")
    assert second.startswith(f"{directory / SHARDS['c']}: not a whole safetensors file")
    assert "a download is going on or was cut off" in hint and str(unfinished) in hint


def test_missing_shards_are_told_with_the_download(directory: Path) -> None:
    for name in ("b", "c"):
        (directory / SHARDS[name]).rename(directory / f"{SHARDS[name]}.part")
    problems = problems_of(directory)
    assert [SHARDS[name] in problems[i] for i, name in enumerate("bc")] == [True, True]
    assert "a download is going on or was cut off" in problems[2]


def test_file_of_full_length_that_is_still_fetched_in_place_is_refused(directory: Path) -> None:
    (directory / f"{SHARDS['b']}.aria2").touch()
    (problem,) = problems_of(directory)
    assert problem.startswith(f"{directory / SHARDS['b']}: ")
    assert "so it is not fetched whole" in problem


def test_unfinished_blobs_of_the_hubs_cache_are_found(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "blobs" / "abc.incomplete"
    blob.parent.mkdir()
    blob.touch()
    assert unfinished_files(snapshot) == [blob]


def test_temporary_file_of_rsync_is_found(tmp_path: Path) -> None:
    file = tmp_path / ".model.safetensors.Ab12Cd"
    file.touch()
    assert unfinished_files(tmp_path) == [file]


def test_wrong_dtype_and_shape_of_several_files_come_together(directory: Path) -> None:
    save_file({"a": torch.ones(4, 7)}, directory / SHARDS["a"])
    save_file({"b": torch.ones(3, dtype=torch.int32)}, directory / SHARDS["b"])
    told = "\n".join(problems_of(directory))
    assert "tensor 'a' has shape (4, 7), expected (4, 8)" in told
    assert "tensor 'b' has dtype I32" in told
