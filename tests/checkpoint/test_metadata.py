"""`.metadata` describes tensors and can do nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cpt.checkpoint.flat_planner import FlatRange
from cpt.checkpoint.manifest import FileRecord, record_file
from cpt.checkpoint.metadata import (
    METADATA,
    PARTS,
    WrittenRange,
    check_metadata,
    read_metadata,
    write_metadata,
)
from cpt.checkpoint.reader import read_ranges, refusal_of
from cpt.checkpoint.writer import write_ranges, written_by
from cpt.errors import CheckpointError, InternalError
from tests.support.checkpoints import TENSORS, manifest_of, ranges_of, sign_again, write_checkpoint


def write_parts(folder: Path, parts: list[dict[str, FlatRange]]) -> list[WrittenRange]:
    folder.mkdir()
    written = []
    for rank, part in enumerate(parts):
        written += write_ranges(folder, part, rank, step=1).ranges
    return written


def test_what_each_rank_wrote_by_itself_is_read_as_one_tensor(tmp_path: Path) -> None:
    values = torch.randn(100)
    parts = []
    for first, last in ((0, 37), (37, 40), (40, 100)):
        part = FlatRange(tensor=values[first:last], offset=first, global_numel=100)
        parts.append({"master/a": part})
    write_metadata(tmp_path / "c", write_parts(tmp_path / "c", parts))
    read = torch.zeros(70)
    read_ranges(tmp_path / "c", {"master/a": FlatRange(tensor=read, offset=20, global_numel=100)})
    assert torch.equal(read, values[20:90])


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    values = torch.randn(10)
    part = {"master/a": FlatRange(tensor=values, offset=0, global_numel=10)}
    write_metadata(tmp_path / "c", write_parts(tmp_path / "c", [part]))
    loaded = {"master/a": torch.zeros(10)}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    assert torch.equal(loaded["master/a"], values)


@pytest.mark.parametrize(
    "cuts", [[(0, 40)], [(0, 60), (50, 50)], [(10, 90)], [(0, 40), (41, 59)]], ids=repr
)
def test_ranges_that_leave_a_gap_or_overlap_are_refused(
    tmp_path: Path, cuts: list[tuple[int, int]]
) -> None:
    written = [
        WrittenRange("master/a", offset, numel, 100, "__0_0.distcp", 0, 1) for offset, numel in cuts
    ]
    with pytest.raises(InternalError, match="do not cover its 100 elements once"):
        write_metadata(tmp_path, written)
    assert not list(tmp_path.iterdir())


def test_metadata_does_not_say_where_it_was_written(tmp_path: Path) -> None:
    write_metadata(tmp_path, ranges_of(TENSORS))
    assert str(tmp_path).encode() not in (tmp_path / METADATA).read_bytes()


class Crafted:
    """Creates a file when it is unpickled without restriction."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.sentinel),))


def sign_file(folder: Path, name: str) -> None:
    """Give a changed file a true record, as a forger who can write the manifest would."""
    record = record_file(folder / name)

    def replace_record(manifest: dict[str, Any]) -> None:
        for listed in manifest["files"]:
            if listed["name"] == name:
                listed.update(bytes=record.bytes, xxh3_128=record.xxh3_128)

    sign_again(folder, replace_record)


@pytest.mark.case(
    "X1", "refused before it can run, though hash and manifest are right; the sentinel is absent"
)
def test_crafted_metadata_is_refused_and_does_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    content = pickle.dumps(Crafted(sentinel))
    pickle.loads(content)  # without restriction it runs
    sentinel.rmdir()
    folder = write_checkpoint(tmp_path, 100)
    (folder / METADATA).write_bytes(content)
    sign_file(folder, METADATA)
    reason = refusal_of(folder)
    assert reason is not None and "step-00000100/.metadata: it names posix.mkdir" in reason
    assert not sentinel.exists()


@pytest.mark.case("X1", "a crafted shard does not run: tensors are read with weights_only")
def test_crafted_shard_is_refused_and_does_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    folder = tmp_path / "c"
    values = torch.zeros(10)
    part = {"master/a": FlatRange(tensor=values, offset=0, global_numel=10)}
    write_metadata(folder, write_parts(folder, [part]))
    torch.save({"a": Crafted(sentinel)}, folder / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"c: "):
        read_ranges(folder, {"master/a": FlatRange(tensor=values, offset=0, global_numel=10)})
    assert not sentinel.exists()


@pytest.mark.case("X1", "byte entries are refused")
def test_byte_entries_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 100)
    metadata = read_metadata(folder)
    metadata.state_dict_metadata["master/lm_head.weight"] = BytesStorageMetadata()
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"stored as bytes, not as a tensor"):
        check_metadata(folder, manifest_of(folder))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", pickle.dumps([1, 2])], ids=repr)
def test_what_is_no_description_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: "):
        read_metadata(tmp_path)


@pytest.mark.case(
    "C16", "keys, sizes and dtypes of the files are compared with the manifest, both ways"
)
@pytest.mark.parametrize("change", ["more", "less", "size", "dtype", "file"])
def test_metadata_that_says_other_than_the_manifest_is_refused(tmp_path: Path, change: str) -> None:
    folder = write_checkpoint(tmp_path, 100)
    metadata: Metadata = read_metadata(folder)
    entries = metadata.state_dict_metadata
    key = "exp_avg/lm_head.weight"
    if change == "more":
        entries["master/extra"] = entries[key]
    elif change == "less":
        del entries[key]
    elif change == "size":
        entries[key].size = torch.Size([7])
    elif change == "dtype":
        entries[key].properties.dtype = torch.bfloat16
    else:
        metadata.storage_data[next(iter(metadata.storage_data))].relative_path = "../../elsewhere"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"extra|exp_avg/lm_head\.weight|elsewhere|torch\.bfloat16"
    ):
        check_metadata(folder, manifest_of(folder))


def test_every_part_is_described(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 100)
    check_metadata(folder, manifest_of(folder))
    stored = read_metadata(folder).state_dict_metadata
    assert len(stored) == len(PARTS) * len(TENSORS)
    for name in TENSORS:
        assert stored.keys() >= {f"{part}/{name}" for part in PARTS}
    for record in manifest_of(folder).files:
        assert isinstance(record, FileRecord)


def test_what_several_ranks_hold_is_written_once_and_evenly() -> None:
    whole = {f"master/{name}": [0, 10] for name in "abcd"}
    held = [{**whole, "exp_avg/z": [0, 50]}, {**whole, "exp_avg/z": [50, 50]}]
    first = written_by(0, held)
    second = written_by(1, held)
    assert first & second == {"exp_avg/z"}, "ranges at different offsets are different ranges"
    assert first | second == held[0].keys()
    assert len(first) == len(second) == 3
