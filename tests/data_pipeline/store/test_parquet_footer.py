"""Where the columns of a Parquet file lie is read as pyarrow reads it, and doubts are refused."""

from __future__ import annotations

import random
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.store import parquet_footer
from data_pipeline.store.parquet_footer import read_columns
from data_pipeline.store.thrift import I32, ListOf, Struct, parse_struct

TABLE = pa.table(
    {
        "text": ["one", None, "two two"] * 7,
        "number": list(range(21)),
        "nested": [{"words": ["a", "b"], "more": {"x": 1.5}}] * 21,
        "flag": [True, False, None] * 7,
    }
)
WRITERS = {
    "defaults": {},
    "groups": {"row_group_size": 4},
    "plain": {"use_dictionary": False, "compression": "none", "write_statistics": False},
    "second pages": {"data_page_version": "2.0", "compression": "zstd", "row_group_size": 9},
    "indexes": {"write_page_index": True, "sorting_columns": [pq.SortingColumn(1)]},
    "old types": {"version": "1.0", "compression": "gzip"},
}


def footer_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[-8 - int.from_bytes(content[-8:-4], "little") : -8]


def assert_agrees_with_pyarrow(path: Path) -> None:
    metadata = pq.ParquetFile(path).metadata
    codecs = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "ZSTD": 6}
    found = read_columns(path)
    assert len(found) == metadata.num_row_groups
    for group, columns in enumerate(found):
        assert len(columns) == metadata.num_columns
        for number, column in enumerate(columns):
            chunk = metadata.row_group(group).column(number)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            assert column == (
                codecs[chunk.compression],
                start,
                start + chunk.total_compressed_size,
            )


@pytest.mark.parametrize("options", WRITERS.values(), ids=WRITERS)
def test_columns_lie_where_pyarrow_finds_them(options: dict[str, object], tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", **options)
    assert_agrees_with_pyarrow(tmp_path / "a.parquet")


def test_columns_of_another_writer_lie_where_pyarrow_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = "select 'a text ' || i as text, [i, 2] as numbers from range(5000) t(i)"
    duckdb.sql(f"copy ({rows}) to '{path}' (format parquet, row_group_size 2048)")
    assert_agrees_with_pyarrow(path)


def test_a_damaged_footer_is_read_or_refused_and_nothing_else() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=9)
    content = sink.getvalue().to_pybytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") : -8]
    drawn = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(footer)
        damaged[drawn.randrange(len(damaged))] ^= drawn.randrange(1, 256)
        try:
            parquet_footer._parse_footer(bytes(damaged[: drawn.choice((None, 500))]))
        except ValueError:
            refused += 1
    assert 150 < refused < 300


INNER = Struct(name="an inner one", fields={1: I32})
OUTER = Struct(
    name="a structure", fields={1: I32, 2: INNER, 3: ListOf(items=INNER), 4: ListOf(items=I32)}
)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x15\x04\x00", {1: 2}),
        (b"\x05\x02\x03\x00", {1: -2}),  # the number of the field in full
        (b"\x16\x04\x00", {}),  # of 64 bits, where the format has 32
        (b"\x2c\x15\x02\x00\x00", {2: {1: 1}}),
        (b"\x39\x2c\x15\x02\x00\x15\x04\x00\x00", {3: [{1: 1}, {1: 2}]}),
        (b"\x39\x00\x00", {3: []}),
        (b"\x49\x25\x02\x04\x00", {4: []}),
        # true, a byte, a double, a text, lists of texts and of booleans, a structure in one
        (
            b"\x51\x13\x07\x1712345678\x18\x02ab\x19\x28\x01a\x01b\x19\x21\x01\x02\x1c\x1c\x00\x00"
            b"\x00",
            {},
        ),
    ],
)
def test_fields_that_are_named_are_found_and_others_passed_over(
    data: bytes, found: dict[int, object]
) -> None:
    assert parse_struct(data, 0, OUTER) == (found, len(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x15\x04\x05\x02\x06\x00", "a structure has its field 1 twice"),
        (b"\x15\xff\xff\xff\xff\x1f\x00", "a number has more than 32 bits"),
        (b"\x15" + b"\xff" * 10 + b"\x00", "a number has more than 32 bits"),
        (b"\x05\x82\x80\x08\x04\x00", "there is no field 65537"),
        (b"\x39\x25\x02\x02\x00", "a list has items of type 5, must have type 12"),
        (b"\x39\xfc\xff\xff\xff\x0f\x00", "a list claims 33,554,431 items, at most 100,000"),
        (b"\x58\xff\xff\xff\xff\xff\x01\x00", "a length has more than 32 bits"),
        (b"\x1b\x00", "a value is of the unknown type 11"),
        (b"\x5c" + b"\x1c" * 40, "a structure is nested too deeply"),
    ],
)
def test_what_two_readers_could_take_differently_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_struct(data, 0, OUTER)


def test_a_field_that_is_missing_is_told() -> None:
    struct = Struct(name="a pair", fields={1: I32, 2: I32}, make=lambda found: found[2])
    with pytest.raises(ValueError, match="a pair lacks its field 2"):
        parse_struct(b"\x15\x04\x00", 0, struct)
