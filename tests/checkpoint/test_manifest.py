"""A directory is a checkpoint if every byte is the one that was written; what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from cpt.checkpoint import loading
from cpt.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    TensorRecord,
    read_manifest,
    record_file,
    verify_files,
    write_manifest,
)
from cpt.checkpoint.reader import check_same_tensors, find_checkpoint, list_steps
from cpt.errors import CheckpointError
from tests.support.checkpoints import (
    FILES,
    SHARDS,
    TENSORS,
    flip,
    manifest_of,
    sign_again,
    write_checkpoint,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 100)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify_files(folder, read_manifest(folder))
    return str(caught.value)


# whole


def test_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    assert read_manifest(folder) == manifest_of(folder)


def test_moments_that_a_parameter_lacks_are_known_from_its_record(tmp_path: Path) -> None:
    manifest = dataclasses.replace(
        manifest_of(write_checkpoint(tmp_path, 100)),
        tensors={
            "momentum.weight": TensorRecord(shape=(4,), dtype="float32", moments=("exp_avg",)),
            "frozen.weight": TensorRecord(shape=(4,), dtype="float32", trained=False),
            "adam.weight": TensorRecord(shape=(4,), dtype="float32"),
        },
    )
    write_manifest(tmp_path, manifest)
    found = read_manifest(tmp_path)
    assert found == manifest
    parts = {name: record.parts for name, record in found.tensors.items()}
    assert parts["momentum.weight"] == ("master", "exp_avg")
    assert parts["frozen.weight"] == ("master",)
    assert parts["adam.weight"] == ("master", "exp_avg", "exp_avg_sq")
    stored = {name: record.stored_bytes for name, record in found.tensors.items()}
    assert stored == {"momentum.weight": 32, "frozen.weight": 16, "adam.weight": 48}


def test_records_with_both_moments_are_written_as_before(folder: Path) -> None:
    body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for record in body["tensors"].values():
        assert sorted(record) == ["dtype", "shape", "trained"]


@pytest.mark.parametrize("moments", [["exp_avg", "exp_avg"], ["momentum"], [["exp_avg"]], [1]])
def test_forged_moments_are_refused(folder: Path, moments: list[Any]) -> None:
    sign_again(folder, lambda body: body["tensors"]["lm_head.weight"].update(moments=moments))
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        read_manifest(folder)


def test_untouched_checkpoint_is_accepted(folder: Path) -> None:
    verify_files(folder, read_manifest(folder))


def test_record_holds_name_size_and_hash(folder: Path) -> None:
    content = SHARDS["__0_0.distcp"]
    expected = FileRecord(
        name="__0_0.distcp", bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content)
    )
    assert record_file(folder / "__0_0.distcp") == expected


# damaged files

EVERY_FILE = pytest.mark.parametrize("name", FILES)


@EVERY_FILE
@pytest.mark.parametrize("position", [0, 100, -1])
@pytest.mark.case("C6", "named, for each kind of file")
def test_flipped_byte_is_named(folder: Path, name: str, position: int) -> None:
    flip(folder / name, position)
    assert (
        refusal(folder) == f"step-00000100/{name}: its content does not match the manifest's hash."
    )


@EVERY_FILE
@pytest.mark.case("C5", "named with both sizes")
def test_cut_file_is_named_with_both_sizes(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size // 2)
    assert refusal(folder) == f"step-00000100/{name}: {size // 2} bytes, manifest says {size}."


@EVERY_FILE
@pytest.mark.case("C7", "empty: named")
def test_empty_file_is_named(folder: Path, name: str) -> None:
    os.truncate(folder / name, 0)
    assert f"step-00000100/{name}: 0 bytes" in refusal(folder)


@EVERY_FILE
def test_longer_file_is_named(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size + 1)
    assert f"step-00000100/{name}: {size + 1} bytes" in refusal(folder)


@EVERY_FILE
@pytest.mark.case("C7", "deleted: named")
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == f"step-00000100/{name}: missing, though the manifest lists it."


@pytest.mark.parametrize("name", ["__2_0.distcp", ".hidden", "zero_to_fp32.py"])
@pytest.mark.case("C7", "unknown: named")
def test_unknown_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    assert refusal(folder) == f"step-00000100/{name}: not in the manifest."


def test_unknown_folder_is_named(folder: Path) -> None:
    (folder / "more").mkdir()
    assert refusal(folder) == "step-00000100/more: not in the manifest."


# files that are no files


def replace_by_symlink(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    file.rename(elsewhere)  # the same content: only the kind of file is wrong
    file.symlink_to(elsewhere)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)  # opening it would wait for ever


@pytest.mark.parametrize("replace", [replace_by_symlink, replace_by_folder, replace_by_pipe])
@pytest.mark.case("X5", "link, folder, pipe: refused unopened")
def test_file_that_is_no_regular_file_is_refused_unopened(
    folder: Path, replace: Callable[[Path], None]
) -> None:
    replace(folder / ".metadata")
    assert refusal(folder) == "step-00000100/.metadata: not a regular file."


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/b", "..", "."])
@pytest.mark.case("X5", "refused")
def test_name_that_leads_out_of_the_directory_is_refused(folder: Path, name: str) -> None:
    record = {"name": name, "bytes": 1, "xxh3_128": "0" * 32}
    sign_again(folder, lambda body: body["files"].append(record))
    assert (
        refusal(folder)
        == f"step-00000100: the manifest names '{name}', which is not a plain file name."
    )


# damaged manifests


def test_missing_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert f"{folder / MANIFEST}: missing" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", "{}", '{"format": 1}', "\x00" * 64], ids=repr
)
@pytest.mark.case("C7", "manifest empty or not JSON: named")
def test_text_that_is_no_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    assert f"{folder / MANIFEST}: not a readable manifest" in refusal(folder)


def test_bytes_that_are_no_text_are_named(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe{}")
    assert f"{folder / MANIFEST}: not a readable manifest" in refusal(folder)


def test_cut_manifest_is_named(folder: Path) -> None:
    os.truncate(folder / MANIFEST, (folder / MANIFEST).stat().st_size // 2)
    assert f"{folder / MANIFEST}: not a readable manifest" in refusal(folder)


def test_changed_value_is_noticed_by_the_checksum(folder: Path) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text.replace('"tokens": 123', '"tokens": 124'), encoding="utf-8")
    assert refusal(folder) == f"{folder / MANIFEST}: its checksum does not match its content."


@pytest.mark.case("C6", "a flipped bit anywhere in the manifest is noticed")
def test_no_flipped_bit_goes_unnoticed(folder: Path) -> None:
    original = (folder / MANIFEST).read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 8)
        (folder / MANIFEST).write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_manifest(folder)


def test_other_format_is_refused_with_its_number(folder: Path) -> None:
    sign_again(folder, lambda body: body.update(format=3))
    assert refusal(folder) == (
        f"{folder / MANIFEST}: format 3, this version reads 1 to 2. "
        "Use the version of gpt-oss-cpt that wrote it, or a newer one."
    )


@pytest.mark.parametrize("number", [True, 1.0, "2", None, [2]], ids=repr)
def test_format_that_is_no_number_is_refused(folder: Path, number: Any) -> None:
    sign_again(folder, lambda body: body.update(format=number))
    assert f"format {number!r}, this version reads 1 to 2" in refusal(folder)


def test_manifest_of_very_many_values_is_refused_before_they_take_memory(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"[" + b"[]," * 2**22 + b"[]]")
    tracemalloc.start()
    try:
        assert "more than 4194304 values; not one of ours." in refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 2 * (folder / MANIFEST).stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "shape", [[2**40, 2**40], [1] * 9, [5, 0], [2**62] * 10_000], ids=lambda shape: str(shape)[:20]
)
def test_shape_that_no_tensor_has_is_refused(folder: Path, shape: list[int]) -> None:
    sign_again(folder, lambda body: body["tensors"]["lm_head.weight"].update(shape=shape))
    assert "'lm_head.weight' is no tensor of a model" in refusal(folder)


@pytest.mark.parametrize("key", ["files", "tensors", "layout", "state", "step"])
def test_manifest_without_a_part_is_refused(folder: Path, key: str) -> None:
    sign_again(folder, lambda body: body.pop(key))
    assert f"{folder / MANIFEST}: not a readable manifest" in refusal(folder)


def test_manifest_with_an_unknown_part_is_refused(folder: Path) -> None:
    sign_again(folder, lambda body: body.update(code="import os"))
    assert f"{folder / MANIFEST}: not a readable manifest" in refusal(folder)


def test_manifest_of_absurd_size_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 300 * 2**20)  # sparse
    assert "larger than" in refusal(folder)


# which checkpoint a run goes on from


def damage(folder: Path) -> None:
    flip(folder / "__0_0.distcp", 0)


def test_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") == (None, [])


def test_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (100, 20, 1000):
        write_checkpoint(tmp_path, step)
    assert find_checkpoint(tmp_path, "auto") == (1000, [])


def test_mode_of_a_checkpoint_does_not_matter_where_nobody_else_can_get_in(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    write_checkpoint(tmp_path, 50).chmod(0o775)  # as versions under umask 002 left it
    assert find_checkpoint(tmp_path, "auto") == (50, [])


def test_checkpoint_before_a_damaged_one_is_taken_and_the_damage_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 50)
    damage(write_checkpoint(tmp_path, 100))
    step, rejected = find_checkpoint(tmp_path, "auto")
    assert step == 50 and len(rejected) == 1 and "step-00000100/__0_0.distcp" in rejected[0]


@pytest.mark.case("C7", "manifest missing: the previous checkpoint is used")
def test_directory_without_a_manifest_is_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 50)
    (write_checkpoint(tmp_path, 100) / MANIFEST).unlink()
    assert find_checkpoint(tmp_path, "auto")[0] == 50


@pytest.mark.case("C8", "74 with each reason")
def test_nothing_but_damaged_checkpoints_is_an_error_with_every_reason(tmp_path: Path) -> None:
    for step in (50, 100):
        damage(write_checkpoint(tmp_path, step))
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, "auto")
    text = str(caught.value)
    assert caught.value.exit_code == 74 and "step-00000050" in text and "step-00000100" in text
    assert "--resume never" in text


@pytest.mark.case("C8", "a chosen step does not fall back")
def test_damaged_checkpoint_that_was_asked_for_is_an_error_without_another(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 50)
    damage(write_checkpoint(tmp_path, 100))
    with pytest.raises(CheckpointError, match="step-00000100"):
        find_checkpoint(tmp_path, "100")


def test_checkpoint_that_was_asked_for_is_taken_though_there_is_a_newer_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 50)
    write_checkpoint(tmp_path, 100)
    assert find_checkpoint(tmp_path, "50") == (50, [])


def test_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 50)
    (tmp_path / "checkpoints" / ".tmp-step-00000100").mkdir()
    (tmp_path / "checkpoints" / "step-100-copy").mkdir()
    assert list_steps(tmp_path) == [50]


# of another model


def with_record(name: str, **changes: Any) -> dict[str, TensorRecord]:
    return {**TENSORS, name: dataclasses.replace(TENSORS["lm_head.weight"], **changes)}


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (with_record("model.extra"), "key 'model.extra' is unknown to this model"),
        ({"lm_head.weight": TENSORS["lm_head.weight"]}, "key 'model.norm.weight' is missing"),
        (with_record("lm_head.weight", shape=(64, 96)), "key 'lm_head.weight' is float32 (64, 96)"),
        (with_record("lm_head.weight", dtype="bfloat16"), "key 'lm_head.weight' is bfloat16"),
    ],
    ids=["one_more", "one_less", "shape", "dtype"],
)
@pytest.mark.case("C16", "the key is named")
def test_checkpoint_of_another_model_is_refused_by_key(
    tmp_path: Path, stored: Any, words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_same_tensors("step-00000100", stored, TENSORS)
    assert words in str(caught.value)


def test_checkpoint_of_the_same_model_is_accepted(tmp_path: Path) -> None:
    check_same_tensors("step-00000100", dict(TENSORS), dict(reversed(TENSORS.items())))


def list_sparse_file(folder: Path, size: int) -> None:
    with open(folder / "big", "wb") as file:
        file.truncate(size)
    record = {"name": "big", "bytes": size, "xxh3_128": "0" * 32}
    sign_again(folder, lambda manifest: manifest["files"].append(record))


@pytest.mark.case("X1", "a sparse file of terabytes is not hashed")
def test_files_larger_than_the_tensors_need_are_refused_unread(folder: Path) -> None:
    list_sparse_file(folder, 2**40)
    with pytest.raises(CheckpointError, match=r"lists files of 1,099,511,[\d,]+ bytes, though"):
        read_manifest(folder)


@pytest.mark.case("X1", "tensors of another model are not hashed either")
def test_checkpoint_of_another_model_is_not_hashed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_again(
        folder, lambda manifest: manifest["tensors"]["model.norm.weight"].update(shape=[2**40])
    )
    topology: Any = SimpleNamespace(rank=0, world_size=1, control_group=None)
    monkeypatch.setattr(loading, "gather_json", lambda value, group: [value])
    monkeypatch.setattr(loading, "on_first_rank", lambda group, call: call())
    hashed: list[FileRecord] = []
    monkeypatch.setattr(loading, "check_hashes", lambda folder, files: hashed.extend(files))
    loading.agreed_refusal(folder, topology, TENSORS)
    assert hashed == []
    loading.agreed_refusal(folder, topology, read_manifest(folder).tensors)
    assert {record.name for record in hashed} == set(FILES)
