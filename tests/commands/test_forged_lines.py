"""No name in a file of others passes for a line of ours on the terminal."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpt.errors import CheckpointError, ConfigError, DataError
from cpt.model.configuration_check import config_problems
from cpt.model.weights.directory import check_directory
from cpt.model.weights.hf_layout import tensor_files
from data_pipeline.commands import end_with_reason
from data_pipeline.reading.table_columns import check_columns
from data_pipeline.store import manifest as build_manifest
from data_pipeline.store.verification import check_files

FORGED = "x\nFAKE: verified ok\x1b[31m"
SHOWN = r"x\nFAKE: verified ok"
"""How a name is shown."""


def safetensors(names: list[str], dtype: str = "BF16") -> bytes:
    header = {name: {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def method_of_quantization(folder: Path) -> None:
    raise ConfigError(config_problems({"quantization_config": {"quant_method": FORGED}}))


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": FORGED}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensor_files(folder)


def name_of_a_tensor(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors([FORGED]))
    check_directory(folder, {})


def dtype_of_a_tensor(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors(["a"], FORGED))
    tensor_files(folder)


def only_weights(folder: Path) -> None:
    (folder / f"{FORGED}.safetensors").write_bytes(b"a")
    tensor_files(folder)


def second_set_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors(["a"]))
    (folder / f"{FORGED}-00001-of-00002.safetensors").write_bytes(b"a")
    tensor_files(folder)


def pickle_of_weights(folder: Path) -> None:
    (folder / f"{FORGED}.bin").write_bytes(b"a")
    tensor_files(folder)


def column_of_a_table(folder: Path) -> None:
    check_columns("a.parquet", pa.schema([(FORGED, pa.string())]), ["text"], [], "Set text_field.")


def type_of_a_column(folder: Path) -> None:
    schema = pa.schema([("text", pa.struct([(FORGED, pa.string())]))])
    check_columns("a.parquet", schema, ["text"], [], "Set text_field.")


def read_build(folder: Path, **changes: Any) -> None:
    content = {"format_version": 4, "sources": [], "guard_domains": [], "files": {}}
    content |= {"fingerprint": "a", "tokenizer": "a", "tokenizer_sha256": "a", "seq_len": 1}
    content |= changes
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "checksum": checksum}))
    build_manifest.read_manifest(folder)


def key_of_a_build(folder: Path) -> None:
    read_build(folder, **{FORGED: 1})


def file_of_a_build(folder: Path) -> None:
    read_build(folder, files={f"../{FORGED}": {"bytes": 1, "sha256": "a"}})


def version_of_a_build(folder: Path) -> None:
    read_build(folder, format_version=FORGED)


def file_in_a_build(folder: Path) -> None:
    (folder / FORGED).write_text("")
    read_build(folder)
    check_files(folder, build_manifest.read_manifest(folder), verify=False)


CASES: list[Callable[[Path], None]] = [
    method_of_quantization,
    missing_shard,
    name_of_a_tensor,
    dtype_of_a_tensor,
    only_weights,
    second_set_of_weights,
    pickle_of_weights,
    column_of_a_table,
    type_of_a_column,
    key_of_a_build,
    file_of_a_build,
    version_of_a_build,
    file_in_a_build,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_name_from_outside_begins_no_line(
    case: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ConfigError, DataError)) as refusal:
        case(tmp_path)
    end_with_reason(refusal.value, "cpt")
    told = capsys.readouterr().err
    assert SHOWN in told
    assert not [line for line in told.splitlines() if line.strip().startswith("FAKE")]


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_text_that_was_not_escaped_is_indented(
    kind: type[ConfigError], capsys: pytest.CaptureFixture[str]
) -> None:
    """What some message inserts as it is: the end of every command is the last barrier."""
    end_with_reason(kind(f"a.json: {FORGED}"), "cpt")
    assert capsys.readouterr().err.splitlines() == ["a.json: x", r"    FAKE: verified ok\x1b[31m"]


def test_each_problem_of_a_configuration_begins_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    end_with_reason(ConfigError(["first.", f"second: {FORGED}", "third."]), "cpt")
    told = capsys.readouterr().err.splitlines()
    assert told == ["first.", "second: x", r"    FAKE: verified ok\x1b[31m", "third."]
