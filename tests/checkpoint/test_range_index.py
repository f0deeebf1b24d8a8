"""The range index leads to the tensors of the manifest in the files of the manifest, or nowhere."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import PARTS, RANGES, TensorRecord, read_manifest
from cpt.checkpoint.range_index import (
    WrittenRange,
    group_ranges,
    read_range_index,
    stored_tensors,
)
from cpt.checkpoint.reader import read_ranges, read_weights, refusal_of
from cpt.checkpoint.writer import complete_folder, write_ranges
from cpt.errors import CheckpointError, InternalError
from tests.support.checkpoints import (
    SHARDS,
    TENSORS,
    manifest_of,
    sign_again,
    sign_file,
    write_checkpoint,
)

KEY = "exp_avg/lm_head.weight"
SECONDS = 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 100)


def written_checkpoint(folder: Path, tensors: dict[str, Tensor], cut: int) -> None:
    """Write weights in two ranks' files, every tensor cut at the same element."""
    folder.mkdir()
    parts = []
    for rank, where in enumerate((slice(0, cut), slice(cut, None))):
        ranges = {}
        for name, tensor in tensors.items():
            ranges[f"master/{name}"] = FlatRange(
                tensor=tensor[where], offset=where.start, global_numel=tensor.numel()
            )
        written = write_ranges(folder, ranges, rank, step=1)
        parts.append({"file": asdict(written.file), "ranges": written.ranges})
    records = {}
    for name, tensor in tensors.items():
        records[name] = TensorRecord(shape=tuple(tensor.shape), dtype="float32", trained=False)
    layout = {"world_size": 2, "sp_size": 1, "ep_size": 1, "zero_stage": 3}
    complete_folder(folder, parts, step=1, layout=layout, tensors=records, state={})


def test_what_two_ranks_wrote_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(100), "b": torch.tensor([1.0, -0.0, float("nan"), float("inf")])}
    written_checkpoint(tmp_path / "c", tensors, 3)
    assert refusal_of(tmp_path / "c") is None
    read = read_weights(tmp_path / "c", ["a", "b"], read_manifest(tmp_path / "c"))
    for name, tensor in tensors.items():
        assert torch.equal(read[name].view(torch.int32), tensor.view(torch.int32))


def test_reading_into_another_dtype_rounds(tmp_path: Path) -> None:
    values = torch.randn(50)
    written_checkpoint(tmp_path / "c", {"a": values}, 20)
    index = read_range_index(tmp_path / "c", read_manifest(tmp_path / "c"))
    target = torch.zeros(30, dtype=torch.bfloat16)
    part = FlatRange(tensor=target, offset=10, global_numel=50)
    read_ranges(tmp_path / "c", index, {"master/a": part})
    assert torch.equal(target, values[10:40].bfloat16())


def test_parameter_is_filled_in_place(tmp_path: Path) -> None:
    values = torch.randn(50)
    written_checkpoint(tmp_path / "c", {"a": values}, 20)
    index = read_range_index(tmp_path / "c", read_manifest(tmp_path / "c"))
    target = torch.nn.Parameter(torch.zeros(50))
    part = FlatRange(tensor=target, offset=0, global_numel=50)
    read_ranges(tmp_path / "c", index, {"master/a": part})
    assert torch.equal(target, values) and target.grad_fn is None


def test_file_that_lost_its_end_after_the_check_is_named(tmp_path: Path) -> None:
    written_checkpoint(tmp_path / "c", {"a": torch.randn(5000)}, 2500)
    manifest = read_manifest(tmp_path / "c")
    with open(tmp_path / "c" / "__1_0.distcp", "r+b") as file:
        file.truncate(6000)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: it ends at byte 6000"):
        read_weights(tmp_path / "c", ["a"], manifest)


def test_every_part_is_indexed(folder: Path) -> None:
    index = read_range_index(folder, manifest_of(folder))
    assert len(index.tensors) == len(PARTS) * len(TENSORS)
    for name in TENSORS:
        assert index.tensors.keys() >= {f"{part}/{name}" for part in PARTS}
    assert index.files == tuple(sorted(SHARDS))


@pytest.mark.parametrize(
    "cuts", [[(0, 40)], [(0, 60), (50, 50)], [(10, 90)], [(0, 40), (41, 59)]], ids=repr
)
def test_ranges_that_leave_a_gap_or_overlap_are_not_written(cuts: list[tuple[int, int]]) -> None:
    written = []
    for offset, numel in cuts:
        written.append(WrittenRange("master/a", offset, numel, 100, "__0_0.distcp", 0, 1, 0))
    with pytest.raises(InternalError, match="do not cover its 100 elements once"):
        group_ranges(written)


# indexes of others

Entry = dict[str, list[Any]]


def replace_index(folder: Path, content: bytes) -> None:
    (folder / RANGES).write_bytes(content)
    sign_file(folder, RANGES)


def refusal(folder: Path) -> str:
    began = time.process_time()
    reason = refusal_of(folder)
    seconds = time.process_time() - began
    assert reason is not None and f"{folder.name}/{RANGES}: " in reason, reason
    assert seconds < SECONDS
    return reason


def put(name: str, value: Any) -> Callable[[Entry], None]:
    """Return a change of the first number of a list."""

    def change(entry: Entry) -> None:
        entry[name][0] = value

    return change


def forged_lengths(entry: Entry) -> None:
    """Make a sum that is right once it has left 64 bits."""
    numbers = [2**61 - 1] * 8 + [6144 + 8]
    entry.update(file=[0] * 9, offset=[0] * 9, numel=numbers)


CHANGES: dict[str, tuple[Callable[[Entry], Any], str]] = {
    "beyond the end": (put("offset", 40_000), "goes beyond the end of its file"),
    "far beyond the end": (put("offset", 2**63 - 1), "goes beyond the end of its file"),
    "beyond 64 bits": (put("offset", 2**63), "not readable (OverflowError"),
    "a thousand digits": (put("offset", 10**1000), "not readable (OverflowError"),
    "negative offset": (put("offset", -4), "has a negative number"),
    "negative file": (put("file", -1), "has a negative number"),
    "unknown file": (put("file", 2), "is in a file that is not listed"),
    "fraction": (put("offset", 704.0), "something else than whole numbers"),
    "not a number": (put("offset", float("nan")), "something else than whole numbers"),
    "infinite": (put("numel", float("inf")), "something else than whole numbers"),
    "truth": (put("file", True), "something else than whole numbers"),
    "text": (put("file", "0"), "something else than whole numbers"),
    "nothing": (put("numel", None), "something else than whole numbers"),
    "no elements": (put("numel", 0), "without elements, or with too many"),
    "too many elements": (put("numel", 2**61), "without elements, or with too many"),
    "gap": (put("numel", 3071), "do not cover its 6144 elements once"),
    "overlap": (put("numel", 3073), "do not cover its 6144 elements once"),
    "sum beyond 64 bits": (forged_lengths, "do not cover its 6144 elements once"),
    "no range": (
        lambda entry: entry.update(file=[], offset=[], numel=[]),
        "do not cover its 6144 elements once",
    ),
    "another length": (lambda entry: entry["file"].append(0), "lists of different lengths"),
    "one list less": (lambda entry: entry.pop("file"), "does not have the lists"),
    "one list more": (lambda entry: entry.update(run=[]), "more lists than"),
    "no list": (lambda entry: entry.update(file=3), "something else than whole numbers"),
    "a mapping": (lambda entry: entry.update(file={}), "something else than whole numbers"),
    "bytes of another tensor": (put("offset", 4), "two ranges share bytes of '__0_0.distcp'"),
}


@pytest.mark.case("C16", "ranges outside the files, gaps, overlaps, what is no number: refused")
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_range_that_is_none_is_refused(
    folder: Path, change: Callable[[Entry], Any], message: str
) -> None:
    body = json.loads((folder / RANGES).read_bytes())
    change(body["tensors"][KEY])
    replace_index(folder, json.dumps(body).encode())
    assert message in refusal(folder)


@pytest.mark.parametrize("content", [b"[]", b"3", b'{"files": [], "tensors": 3}', b"{}"], ids=repr)
def test_index_of_another_form_is_refused(folder: Path, content: bytes) -> None:
    replace_index(folder, content)
    assert "its top or its tensors are no mapping" in refusal(folder)


@pytest.mark.parametrize("name", ["../victim/__0_0.distcp", "manifest.json", "other", ""])
@pytest.mark.case("X1", "a range index that leads out of the checkpoint is refused")
def test_file_outside_the_manifest_is_refused(folder: Path, name: str) -> None:
    body = json.loads((folder / RANGES).read_bytes())
    body["files"][0] = name
    replace_index(folder, json.dumps(body).encode())
    assert f"points to {name!r}, which is not in the manifest" in refusal(folder)


@pytest.mark.case("X1", "bytes that pose as those of many files are refused")
def test_file_under_two_numbers_is_refused(folder: Path) -> None:
    body = json.loads((folder / RANGES).read_bytes())
    body["files"].append(body["files"][0])
    entry = body["tensors"][KEY]
    entry["file"][1], entry["offset"][1] = 2, entry["offset"][0]  # the other half, once more
    replace_index(folder, json.dumps(body).encode())
    assert "a file is listed twice" in refusal(folder)


def test_tensor_that_only_one_of_both_has_is_named(folder: Path) -> None:
    body = json.loads((folder / RANGES).read_bytes())
    body["tensors"]["master/extra"] = body["tensors"].pop(KEY)
    replace_index(folder, json.dumps(body).encode())
    assert "'exp_avg/lm_head.weight' is not in both it and the manifest" in refusal(folder)


def test_dtype_that_is_not_stored_is_refused(folder: Path) -> None:
    sign_again(folder, lambda body: body["tensors"]["lm_head.weight"].update(dtype="bfloat16"))
    assert "is 'bfloat16' in the manifest, stored are only float32 values" in refusal(folder)


def test_checkpoint_without_an_index_is_refused(folder: Path) -> None:
    (folder / RANGES).unlink()

    def forget(body: dict[str, Any]) -> None:
        body["files"] = [file for file in body["files"] if file["name"] != RANGES]

    sign_again(folder, forget)
    assert "ranges.json: not in the manifest, so the tensors cannot be found" in refusal(folder)


BOMBS = {
    "lists": b"[" * 2**17,
    "lists in a list": b'{"files": [' + b"[]," * 40_000 + b"[]]}",
    "mappings": b'{"files": [' + b"{}," * 40_000 + b"{}]}",
    "names": b'{"files": [' + b'"",' * 40_000 + b'""]}',
    "larger than its tensors need": b" " * 2**20,
    "no mapping": b"3",
    "a list": b"[]",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "names that are none": b'{"files": [1, 2], "tensors": {}}',
    "a long number": b'{"files": [' + b"9" * 5000 + b"]}",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
@pytest.mark.case("X1", "a range index of very many values is refused before they take memory")
def test_bomb_is_refused_at_once(folder: Path, content: bytes) -> None:
    replace_index(folder, content)
    refusal(folder)
    manifest = read_manifest(folder)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_range_index(folder, manifest)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_index_that_changes_after_the_check_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    content = (folder / RANGES).read_bytes()
    (folder / RANGES).write_bytes(content.replace(b"3072", b"3071"))
    with pytest.raises(CheckpointError, match=r"does not match the manifest's hash"):
        read_range_index(folder, manifest)


def test_link_is_not_followed(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / RANGES).rename(folder.parent / "elsewhere")
    (folder / RANGES).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"ranges\.json: not readable \(OSError"):
        read_range_index(folder, manifest)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_changed_index_is_read_or_refused_and_nothing_else(
    folder: Path, data: st.DataObject
) -> None:
    original = (folder / RANGES).read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.binary(max_size=4) | st.sampled_from([b"[", b"9", b"-", b"1e9"]))
        content[position : position + data.draw(st.integers(0, 4))] = change
    try:
        replace_index(folder, bytes(content))
        with contextlib.suppress(CheckpointError):
            index = read_range_index(folder, read_manifest(folder))
            assert index.tensors.keys() == stored_tensors(read_manifest(folder)).keys()
    finally:
        replace_index(folder, original)
