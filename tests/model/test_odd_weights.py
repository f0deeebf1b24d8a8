"""Files of a model directory that are not what they are called are told with the cure (case D3)."""

from __future__ import annotations

import codecs
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS, load_config
from cpt.model.weights.byte_ranges import TensorFile
from cpt.model.weights.directory import check_directory
from cpt.model.weights.hf_layout import INDEX_FILE, SINGLE_FILE, read_json, tensor_files
from cpt.model.weights.tokenizer_check import tokenizer_problems
from data_pipeline.text.tokenizer import VOCAB_SIZE

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
CONFIG = json.dumps({"model_type": "gpt_oss", **PRESETS["tiny"]})


def refusal(function: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        function(path)
    assert caught.value.exit_code == 78
    return str(caught.value)


def save(path: Path) -> Path:
    save_file({"w": torch.zeros(3)}, path)
    return path


ODD_WEIGHTS = {
    "pointer": (POINTER, "it is a Git LFS pointer in place of the file. Fetch the file itself: "),
    "page": (PAGE, "it is an HTML page. A server sent a page"),
    "zip": (b"PK\x03\x04" + bytes(60), "it is a ZIP archive (or PyTorch weights). Unpack it"),
    "pickle": (b"\x80\x02}q\x00" + bytes(60), "it is a Python pickle. It can run code"),
    "text": (b'{"w": [1, 2]}', "it is something that begins with b'{\"w\": [1, 2]}'. Fetch"),
    "zeros": (bytes(4096), "it is zero bytes where its content should begin. A download"),
    "empty": (b"", "it is empty. Fetch it again."),
    "arrow": (b"ARROW1\x00\x00" + bytes(20), "it is an Arrow file"),
}


@pytest.mark.parametrize(("content", "message"), ODD_WEIGHTS.values(), ids=ODD_WEIGHTS)
def test_what_is_called_safetensors_and_is_something_else_is_told(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / SINGLE_FILE
    file.write_bytes(content)
    told = refusal(tensor_files, tmp_path)
    assert told.startswith(f"{file}: not a whole safetensors file: {message}")
    assert refusal(TensorFile, file) == told


def test_a_shard_that_is_a_pointer_is_told(tmp_path: Path) -> None:
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.write_bytes(POINTER)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": shard.name}}))
    assert tensor_files(tmp_path) == {"w": shard}
    assert "Git LFS pointer" in refusal(TensorFile, shard)
    (tmp_path / INDEX_FILE).write_bytes(POINTER)
    assert f"{tmp_path / INDEX_FILE}: is a Git LFS pointer" in refusal(tensor_files, tmp_path)


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE])
def test_a_link_of_a_cache_to_nothing_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("../../blobs/0123")
    told = refusal(tensor_files, tmp_path)
    assert told.startswith(f"{tmp_path / name} is a link to ../../blobs/0123, which does not exist")


def test_a_shard_that_is_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {"a": shards[0], "b": shards[1]}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    save(tmp_path / shards[0])
    (tmp_path / shards[1]).symlink_to("../blobs/1")
    told = refusal(tensor_files, tmp_path)
    assert told.startswith(f"{tmp_path / shards[1]} is a link to ../blobs/1, which does not exist")


def test_shards_without_an_index_are_told(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / f"model-0000{number}-of-00002.safetensors")
    told = refusal(tensor_files, tmp_path)
    assert f"holds 2 shards (model-00001-of-00002.safetensors, ...) without {INDEX_FILE}" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "holds an adapter (LoRA), not a model. Merge it"),
        ("weights.safetensors", "It holds weights.safetensors: rename the one"),
        ("snapshots/0123/model.safetensors", "It is the root of a model in the Hub's cache"),
        ("pytorch_model.bin", "pickles can run code and are not read. Save as safetensors."),
    ],
)
def test_a_directory_with_other_files_says_what_to_do_with_them(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    save(tmp_path / name)
    assert message in refusal(tensor_files, tmp_path)


@pytest.mark.parametrize("named_by", [INDEX_FILE, SINGLE_FILE])
def test_weights_without_a_tensor_beside_others_are_refused(named_by: str, tmp_path: Path) -> None:
    save_file({}, tmp_path / "model-00001-of-00002.safetensors")
    if named_by == INDEX_FILE:
        (tmp_path / INDEX_FILE).write_text('{"weight_map": {}}')
    else:
        save_file({}, tmp_path / SINGLE_FILE)
    assert f"{tmp_path / named_by}: names no tensor" in refusal(tensor_files, tmp_path)


def load(path: Path) -> object:
    return load_config(path, None)


def test_a_configuration_that_is_something_else_is_told(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(POINTER)
    assert refusal(load, tmp_path).startswith(f"{file}: is a Git LFS pointer in place of the file")
    file.write_bytes(PAGE)
    assert refusal(load, tmp_path).startswith(f"{file}: is an HTML page, not JSON.")
    file.write_bytes(b"[" * 100_000)
    assert "not readable as JSON" in refusal(load, tmp_path)
    file.unlink()
    file.symlink_to("../blobs/1")
    assert f"{file} is a link to ../blobs/1, which does not exist" in refusal(load, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_configuration_is_read_in_any_unicode_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(codecs.encode(CONFIG, encoding))
    assert load_config(tmp_path, None).hidden_size == 64


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.binary(max_size=50).map(lambda tail: b"{" + tail))
def test_any_bytes_as_json_or_weights_end_in_a_value_or_a_message(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SINGLE_FILE
        file.write_bytes(content)
        for function, argument in ((read_json, file), (tensor_files, file.parent)):
            failure = None
            try:
                function(argument)
            except ConfigError as error:
                failure = error
            assert failure is None or str(file) in str(failure)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 200), mask=st.integers(1, 255), cut=st.integers(0, 150))
def test_damaged_weights_end_in_a_value_or_a_message(place: int, mask: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = save(Path(folder) / SINGLE_FILE)
        data = bytearray(file.read_bytes())
        data[place % len(data)] ^= mask
        file.write_bytes(bytes(data[: max(0, len(data) - cut)]))
        failure = None
        try:
            tensor_files(file.parent)
            TensorFile(file)
        except ConfigError as error:
            failure = error
        assert failure is None or str(file) in str(failure)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"added_tokens": 5}', "added_tokens is no list of objects with content and id"),
        ('{"added_tokens": [1]}', "added_tokens is no list of objects"),
        ('{"added_tokens": [{"content": "a", "id": "x"}]}', "added_tokens is no list of objects"),
        ('{"added_tokens": ' + 3000 * "[" + 3000 * "]" + "}", "nested deeper than 64 levels"),
        ("[" + 2**21 * "[]," + "[]]", "more than 2,097,152 lists and objects"),
        ("{" + 2**26 * " " + "}", "larger than 67,108,864 bytes"),
    ],
    ids=["number", "numbers", "text", "deep", "many", "large"],
)
def test_tokenizer_that_is_made_to_hurt_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        tokenizer_problems(tmp_path, VOCAB_SIZE)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_index_with_names_without_end_is_told_in_a_bounded_message(tmp_path: Path) -> None:
    names = {f"x{number}": "model-1.safetensors" for number in range(20_000)}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    save_file({"x0": torch.zeros(1)}, str(tmp_path / "model-1.safetensors"))
    with pytest.raises(ConfigError, match="more problems with tensors") as caught:
        check_directory(tmp_path, {})
    assert len(caught.value.problems) <= 1001
