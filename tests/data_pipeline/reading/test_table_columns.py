"""Columns that hold text in any form are read; others are told (case D5)."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import Tally

VALUES = ["one", None, "\u6c34"]
STRINGS = pa.array(VALUES)
BYTES = pa.array([None if value is None else value.encode() for value in VALUES])
INVALID = pa.array([b"fine", b"\xff", None])


def read(*paths: Path, **keys: Any) -> tuple[list[str], Tally]:
    tally = Tally()
    values: dict[str, Any] = {"name": "s", "language": "en", "domain": "web", "weight": 1.0} | keys
    source = SourceConfig(path=tuple(map(str, paths)), **values)
    return list(read_texts(source, tally)), tally


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


TEXT_COLUMNS = {
    "string": STRINGS,
    "large_string": STRINGS.cast(pa.large_string()),
    "string_view": STRINGS.cast(pa.string_view()),
    "dictionary": STRINGS.dictionary_encode(),
    "dictionary of large strings": STRINGS.cast(pa.large_string()).dictionary_encode(),
    "binary": BYTES,
    "large_binary": BYTES.cast(pa.large_binary()),
    "binary_view": BYTES.cast(pa.binary_view()),
    "json": pa.ExtensionArray.from_storage(pa.json_(), STRINGS),
}


@pytest.mark.parametrize("column", TEXT_COLUMNS.values(), ids=TEXT_COLUMNS)
def test_text_in_any_form_is_read(column: pa.Array, tmp_path: Path) -> None:
    texts, tally = read(parquet(tmp_path / "a.parquet", text=column))
    assert texts == ["one", "\u6c34"] and dict(tally.rejects) == {"text is null": 1}


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary_view(), pa.string()])
def test_bytes_that_are_no_text_cost_their_row(kind: pa.DataType, tmp_path: Path) -> None:
    column = INVALID.view(kind) if kind == pa.string() else INVALID.cast(kind)
    texts, tally = read(parquet(tmp_path / "a.parquet", text=column))
    assert texts == ["fine"]
    assert str(tally.places["invalid UTF-8"][0]).endswith("row 2")
    indices = pa.array([0, 1, 0], pa.int32())
    encoded = pa.DictionaryArray.from_arrays(indices, INVALID.view(pa.string())[:2])
    texts, tally = read(parquet(tmp_path / "b.parquet", text=encoded))
    assert texts == ["fine", "fine"] and dict(tally.rejects) == {"invalid UTF-8": 1}


def test_a_column_without_a_type_is_nulls(tmp_path: Path) -> None:
    first = parquet(tmp_path / "a.parquet", text=pa.nulls(3))
    second = parquet(tmp_path / "b.parquet", text=STRINGS)
    texts, tally = read(first, second)
    assert texts == ["one", "\u6c34"] and dict(tally.rejects) == {"text is null": 4}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), r"holds int64, must hold strings\. Set text_field"),
        (pa.array([["a"], ["b"]]), r"holds list<.*string>, must hold .*write it as a column"),
        (pa.array([{"text": "a"}] * 2), r"holds struct<text: string>.* such as 'text\.text'"),
        (pa.array([b"abcd"] * 2, pa.binary(4)), r"holds fixed_size_binary\[4\], must hold"),
        (pa.array([1, 1]).dictionary_encode(), r"holds .*int64.*, must hold strings"),
        (pa.array([True, None]), r"holds bool, must hold strings"),
    ],
)
def test_what_is_no_text_is_refused_with_its_type(
    column: pa.Array, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"a.parquet: column 'text' {message}"):
        read(parquet(tmp_path / "a.parquet", text=column))


def test_a_field_that_a_column_does_not_have_is_told_with_what_it_has(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", meta=pa.array([{"body": "a"}]))
    with pytest.raises(DataError, match=r"no column 'meta.text'.* 'meta' holds struct<body"):
        read(path, text_field="meta.text")


def test_two_columns_of_one_name_are_refused_only_if_they_are_read(tmp_path: Path) -> None:
    columns = [pa.array([name]) for name in ("a", "b", "c")]
    table = pa.Table.from_arrays(columns, names=["text", "text", "body"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: 2 columns are named 'text'\. Rename"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="body")[0] == ["c"]


@pytest.mark.parametrize("num_groups", [0, 1])
def test_a_parquet_file_without_rows_stops_the_build(num_groups: int, tmp_path: Path) -> None:
    full = parquet(tmp_path / "a.parquet", text=STRINGS)
    empty = pa.table({"text": pa.array([], pa.string())})
    with pq.ParquetWriter(tmp_path / "b.parquet", empty.schema) as writer:
        for _ in range(num_groups):
            writer.write_table(empty)
    with pytest.raises(DataError, match=r"b.parquet: has no rows\. Remove it or fetch it again"):
        read(full, tmp_path / "b.parquet")


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow"])
def test_a_dataset_saved_with_a_format_is_read(form: str, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": VALUES, "n": [1, 2, 3]})
    dataset.with_format(form).save_to_disk(str(tmp_path / "d"))
    texts, tally = read(tmp_path / "d", format="huggingface")
    assert texts == ["one", "\u6c34"] and dict(tally.rejects) == {"text is null": 1}


def test_columns_of_a_dataset_are_judged_as_those_of_parquet(tmp_path: Path) -> None:
    table = pa.table({"view": BYTES, "null": pa.nulls(3), "n": [1, 2, 3], "text": STRINGS})
    dataset = datasets.Dataset(table).select([2, 1, 0])
    dataset.save_to_disk(str(tmp_path / "d"))
    for field in ("view", "text"):
        found = read(tmp_path / "d", format="huggingface", text_field=field)[0]
        assert found == ["\u6c34", "one"]
    _, tally = read(tmp_path / "d", format="huggingface", text_field="null")
    assert dict(tally.rejects) == {"text is null": 3}
    with pytest.raises(DataError, match=r"column 'n' holds int64, must hold strings"):
        read(tmp_path / "d", format="huggingface", text_field="n")


def test_a_split_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": VALUES})
    datasets.DatasetDict({"test": dataset, "dev": dataset}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"has no split 'train'\. It has: test, dev\. Set split"):
        read(tmp_path / "d", format="huggingface")


def test_a_pointer_among_the_files_of_a_dataset_is_told(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": VALUES}).save_to_disk(str(tmp_path / "d"))
    (shard,) = (tmp_path / "d").glob("*.arrow")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"\.arrow is a Git LFS pointer .*git lfs pull"):
        read(tmp_path / "d", format="huggingface")


KNOWN = ((210, 56), (256, 1))
"""Bytes of the file below and what is changed in them: pyarrow aborts if asked for its columns."""


def test_no_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=STRINGS, n=[1, 2, 3])
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    drawn = random.Random(0)
    damages = list(KNOWN)
    for _ in range(60):
        damages.append((drawn.randrange(footer, len(content)), drawn.randrange(1, 256)))
    child = os.fork()
    if child == 0:
        try:
            for place, mask in damages:
                damaged = bytearray(content)
                damaged[place] ^= mask
                path.write_bytes(damaged)
                with contextlib.suppress(DataError):
                    read(path)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@settings(max_examples=60, deadline=None)
@example(place=KNOWN[0][0], mask=KNOWN[0][1], cut=0)
@example(place=KNOWN[1][0], mask=KNOWN[1][1], cut=0)
@given(place=st.integers(0, 5000), mask=st.integers(1, 255), cut=st.integers(0, 300))
def test_damaged_parquet_gives_texts_or_a_message_that_names_it(
    place: int, mask: int, cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = parquet(Path(folder) / "a.parquet", text=STRINGS, n=[1, 2, 3])
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= mask
        path.write_bytes(bytes(data[: len(data) - cut * (cut > 200)]))
        failure = None
        try:
            read(path)
        except DataError as error:
            failure = error
        assert failure is None or str(path) in str(failure)
