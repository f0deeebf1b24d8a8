"""A saved dataset with compressed record batches is refused before they are decompressed."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.reading.stored_rows import count_rows
from data_pipeline.store.arrow_streams import check_saved_dataset


def count(folder: Path) -> int:
    source = SourceConfig(
        name="s",
        language="en",
        domain="web",
        path=str(folder),
        weight=1.0,
        format="huggingface",
        split="train",
    )
    return count_rows(source)[0]


def write_stream(path: Path, table: pa.Table, compression: str | None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(path), table.schema, options=options) as writer:
        writer.write_table(table)


def saved(folder: Path) -> Path:
    """Save a dataset in one split; return the file of its data."""
    dataset = datasets.Dataset.from_dict({"text": ["a text of some words " * 50] * 30})
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder))
    return folder / "train" / "data-00000-of-00001.arrow"


def test_what_save_to_disk_writes_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert path.is_file()
    assert count(tmp_path) == 30
    assert count(tmp_path / "train") == 30


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("kind", ["text", "dictionary"])
def test_compressed_batches_are_refused_wherever_the_dataset_names_them(
    compression: str, kind: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    values = pa.array(["a text of some words " * 50] * 30)
    table = pa.table({"text": values if kind == "text" else values.dictionary_encode()})
    write_stream(path, table, None)
    check_saved_dataset(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    write_stream(elsewhere, table, compression)
    state = path.parent / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": "../elsewhere"}]
    state.write_text(json.dumps(content))
    for folder in (tmp_path, path.parent):
        with pytest.raises(DataError, match="elsewhere has compressed record batches"):
            count(folder)


def test_a_state_beyond_the_limits_is_no_way_around(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = path.parent / "state.json"
    content = json.loads(state.read_text())
    deep: list[object] = []
    for _ in range(100):
        deep = [deep]
    state.write_text(json.dumps({**content, "more": deep}))
    with pytest.raises(DataError, match=r"state\.json"):
        count(tmp_path)
