"""`.metadata` is written for the tools of torch, and only data is read of what others wrote."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from cpt.checkpoint.flat_range import FlatRange
from cpt.checkpoint.manifest import (
    METADATA,
    PARTS,
    FileRecord,
    Manifest,
    TensorRecord,
    read_manifest,
    record_file,
)
from cpt.checkpoint.metadata import write_metadata
from cpt.checkpoint.old_metadata import OldRange, read_old_metadata
from cpt.checkpoint.range_index import (
    WrittenRange,
    group_ranges,
    index_of_archives,
    read_range_index,
)
from cpt.checkpoint.reader import read_ranges, read_weights, refusal_of
from cpt.checkpoint.writer import write_ranges, written_by
from cpt.errors import CheckpointError
from tests.support.checkpoints import (
    OLD_CHECKPOINT,
    TENSORS,
    old_checkpoint,
    ranges_of,
    sign_file,
    write_checkpoint,
)


def write_parts(folder: Path, parts: list[dict[str, FlatRange]]) -> None:
    folder.mkdir()
    written = []
    for rank, part in enumerate(parts):
        written += write_ranges(folder, part, rank, step=1).ranges
    write_metadata(folder, group_ranges(written))


def test_what_each_rank_wrote_by_itself_is_read_as_one_tensor(tmp_path: Path) -> None:
    values = torch.randn(100)
    parts = []
    for first, last in ((0, 37), (37, 40), (40, 100)):
        part = FlatRange(tensor=values[first:last], offset=first, global_numel=100)
        parts.append({"master/a": part})
    write_parts(tmp_path / "c", parts)
    read = torch.zeros(70)
    index = index_of_archives(read_old_metadata((tmp_path / "c" / METADATA).read_bytes()))
    target = FlatRange(tensor=read, offset=20, global_numel=100)
    read_ranges(tmp_path / "c", index, {"master/a": target})
    assert torch.equal(read, values[20:90])


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    values = torch.randn(10)
    first = {"master/a": FlatRange(tensor=values[:4], offset=0, global_numel=10)}
    second = {"master/a": FlatRange(tensor=values[4:], offset=4, global_numel=10)}
    write_parts(tmp_path / "c", [first, second])
    loaded = {"master/a": torch.zeros(10)}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    assert torch.equal(loaded["master/a"], values)


def test_metadata_does_not_say_where_it_was_written(tmp_path: Path) -> None:
    write_metadata(tmp_path, group_ranges(ranges_of(TENSORS)))
    assert str(tmp_path).encode() not in (tmp_path / METADATA).read_bytes()


# checkpoints of format 1


def test_checkpoint_of_the_older_format_is_verified_and_read(tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path)
    assert refusal_of(folder) is None
    manifest = read_manifest(folder)
    assert manifest.format == 1
    weights = read_weights(folder, list(manifest.tensors), manifest)
    assert weights["model.norm.weight"].tolist() == list(range(7))
    assert weights["lm_head.weight"].flatten().tolist() == list(range(10_000, 10_020))
    moments = {}
    for number, part in enumerate(PARTS[1:], 1):
        tensor = torch.zeros(9)
        moments[f"{part}/lm_head.weight"] = FlatRange(tensor=tensor, offset=8, global_numel=20)
        read_ranges(folder, read_range_index(folder, manifest), moments)
        expected = [10_000 + 1_000 * number + element for element in range(8, 17)]
        assert tensor.tolist() == expected


@pytest.mark.parametrize("protocol", [4, 5])
def test_every_attribute_is_what_pickle_reads(protocol: int) -> None:
    metadata = pickle.loads((OLD_CHECKPOINT / METADATA).read_bytes())
    found = read_old_metadata(pickle.dumps(metadata, protocol))
    expected: dict[str, list[OldRange]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        for chunk in entry.chunks:
            index = torch.distributed.checkpoint.metadata.MetadataIndex(key, chunk.offsets)
            info = metadata.storage_data[index]
            one = OldRange(
                chunk.offsets[0], chunk.sizes[0], info.relative_path, info.offset, info.length
            )
            expected.setdefault(key, []).append(one)
    assert found == expected and len(found) == 4


class Crafted:
    """Creates a file when it is unpickled without restriction."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.sentinel),))


@pytest.mark.case(
    "X1", "refused before it can run, though hash and manifest are right; the sentinel is absent"
)
def test_crafted_metadata_is_refused_and_does_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    content = pickle.dumps(Crafted(sentinel))
    pickle.loads(content)  # without restriction it runs
    sentinel.rmdir()
    folder = old_checkpoint(tmp_path)
    (folder / METADATA).write_bytes(content)
    sign_file(folder, METADATA)
    reason = refusal_of(folder)
    assert reason is not None
    assert "step-00000003/.metadata: does not describe tensors: it holds posix.mkdir" in reason
    assert not sentinel.exists()


@pytest.mark.case("X1", "the `.metadata` of a checkpoint that has a range index is not opened")
def test_metadata_beside_a_range_index_is_not_opened(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    folder = write_checkpoint(tmp_path, 100)
    (folder / METADATA).write_bytes(pickle.dumps(Crafted(sentinel)))
    sign_file(folder, METADATA)
    assert refusal_of(folder) is None
    assert not sentinel.exists()


@pytest.mark.case("X1", "a crafted shard does not run: only the bytes of values are read")
def test_crafted_shard_is_refused_and_does_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    folder = old_checkpoint(tmp_path)
    size = (folder / "__0_0.distcp").stat().st_size
    torch.save({"a": Crafted(sentinel)}, folder / "__0_0.distcp")
    with open(folder / "__0_0.distcp", "ab") as file:
        file.truncate(size)
    sign_file(folder, "__0_0.distcp")
    manifest = read_manifest(folder)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: not an archive of 13 elements"):
        read_weights(folder, ["lm_head.weight"], manifest)
    assert not sentinel.exists()


def bytes_entry(metadata: Any) -> None:
    metadata.state_dict_metadata["master/lm_head.weight"] = BytesStorageMetadata()


def more(metadata: Any) -> None:
    key = "exp_avg/lm_head.weight"
    metadata.state_dict_metadata["master/extra"] = metadata.state_dict_metadata[key]


def less(metadata: Any) -> None:
    del metadata.state_dict_metadata["exp_avg/lm_head.weight"]


def other_size(metadata: Any) -> None:
    metadata.state_dict_metadata["exp_avg/lm_head.weight"].size = torch.Size([7])


def other_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["exp_avg/lm_head.weight"].properties.dtype = torch.bfloat16


def place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def elsewhere(metadata: Any) -> None:
    place(metadata).relative_path = "../../elsewhere"


def beyond(metadata: Any) -> None:
    place(metadata).offset = 2**40


def negative(metadata: Any) -> None:
    place(metadata).offset = -1


def fraction(metadata: Any) -> None:
    place(metadata).length = 1.5


def truth(metadata: Any) -> None:
    place(metadata).offset = True


def transformed(metadata: Any) -> None:
    place(metadata).transform_descriptors = ["zstd"]


def gap(metadata: Any) -> None:
    chunk = metadata.state_dict_metadata["exp_avg/lm_head.weight"].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] - 1])


def two_dimensions(metadata: Any) -> None:
    metadata.state_dict_metadata["exp_avg/lm_head.weight"].size = torch.Size([5, 4])


CHANGES: dict[Callable[[Any], None], str] = {
    bytes_entry: "stored as bytes, not as a tensor",
    more: "does not have one place for each range",
    less: "has places of 'exp_avg/lm_head.weight', which it does not describe",
    other_size: "has 7 elements, its ranges have others",
    other_dtype: "is torch.bfloat16, not torch.float32",
    elsewhere: "points to '../../elsewhere', which is not in the manifest",
    beyond: "goes beyond the end of its file",
    negative: "no size where a size should be",
    fraction: "it has the opcode BINFLOAT",
    truth: "no size where a size should be",
    transformed: "stored transformed",
    gap: "has 20 elements, its ranges have others",
    two_dimensions: "does not have one dimension",
}


@pytest.mark.case(
    "C16", "keys, sizes and dtypes of the files are compared with the manifest, both ways"
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_older_metadata_that_says_other_than_the_manifest_is_refused(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    folder = old_checkpoint(tmp_path)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    sign_file(folder, METADATA)
    reason = refusal_of(folder)
    assert reason is not None and f"{METADATA}: " in reason and CHANGES[change] in reason, reason


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", pickle.dumps([1, 2])], ids=repr)
def test_what_is_no_description_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="does not describe tensors"):
        read_old_metadata(content)


def test_what_several_ranks_hold_is_written_once_and_evenly() -> None:
    whole = {f"master/{name}": [0, 10] for name in "abcd"}
    held = [{**whole, "exp_avg/z": [0, 50]}, {**whole, "exp_avg/z": [50, 50]}]
    first = written_by(0, held)
    second = written_by(1, held)
    assert first & second == {"exp_avg/z"}, "ranges at different offsets are different ranges"
    assert first | second == held[0].keys()
    assert len(first) == len(second) == 3


def test_metadata_of_long_names_and_many_ranges_stays_within_the_bounds_of_its_reader(
    tmp_path: Path,
) -> None:
    num_ranks = 40
    numel = 2**35
    tensors = {}
    written = []
    for number in range(4):
        name = f"{number}." + "n" * 500
        tensors[name] = TensorRecord(shape=(num_ranks, numel), dtype="float32", trained=True)
        for part in PARTS:
            for rank in range(num_ranks):
                file = f"__{rank}_0.distcp"
                place = 2**50 + (number * 3 + PARTS.index(part)) * numel * 4
                where = (rank * numel, numel, num_ranks * numel, file, place, numel * 4, place)
                written.append(WrittenRange(f"{part}/{name}", *where))
    write_metadata(tmp_path, group_ranges(written))
    files = [record_file(tmp_path / METADATA)]
    for rank in range(num_ranks):
        files.append(FileRecord(name=f"__{rank}_0.distcp", bytes=2**62, xxh3_128=""))
    manifest = Manifest(
        step=1, files=tuple(files), tensors=tensors, layout={}, versions={}, state={}, format=1
    )
    index = read_range_index(tmp_path, manifest)
    assert len(index.tensors) == 12 and len(index.files) == num_ranks


def test_nothing_is_written_that_others_may_change_where_a_folder_has_a_default_acl(
    tmp_path: Path,
) -> None:
    # everybody may do everything with what is made here, whatever the umask
    entries = b"".join(struct.pack("<HHI", tag, 7, 2**32 - 1) for tag in (0x01, 0x04, 0x10, 0x20))
    folder = tmp_path / "c"
    folder.mkdir()
    try:
        os.setxattr(folder, "system.posix_acl_default", struct.pack("<I", 2) + entries)
    except OSError as error:
        pytest.skip(f"the file system has no ACLs ({error.strerror})")
    part = FlatRange(tensor=torch.ones(4), offset=0, global_numel=4)
    written = write_ranges(folder, {"master/a": part}, 0, step=1)
    write_metadata(folder, group_ranges(written.ranges))
    modes = {path.name: path.stat().st_mode & 0o022 for path in folder.iterdir()}
    assert modes == {METADATA: 0, "__0_0.distcp": 0}
