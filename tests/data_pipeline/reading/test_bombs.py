"""Input that is small on disk and huge in memory is rejected or refused within 1 GiB."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.parts import near_duplicates
from data_pipeline.reading import json_records, parquet_files, table_columns
from data_pipeline.reading.json_records import parse_record
from data_pipeline.reading.sources import read_texts
from data_pipeline.store import parquet_footer, parquet_pages
from data_pipeline.text import cleaning
from data_pipeline.text.cleaning import (
    MAX_DOCUMENT_BYTES,
    TOO_LONG,
    Tally,
    why_unusable,
)

MIB = 2**20
PEAK_MIB = 1024
READER = textwrap.dedent("""
    import json, resource, sys
    from data_pipeline.reading.sources import read_texts
    from data_pipeline.config.source_config import SourceConfig
    from data_pipeline.errors import DataError
    from data_pipeline.text.cleaning import Tally

    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    for path in sys.argv[1:]:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        tally = Tally()
        source = SourceConfig(name="s", language="en", domain="web", path=path, weight=1.0)
        count = 0
        try:
            for text in read_texts(source, tally):
                count += 1
            end = dict(tally.rejects)
        except DataError as error:
            end = str(error)
        status = open("/proc/self/status").read()
        peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
        print(json.dumps([count, end, peak]), flush=True)
""")


def source_of(path: Path, **keys: str) -> SourceConfig:
    return SourceConfig(name="s", language="en", domain="web", path=str(path), weight=1.0, **keys)


def read(path: Path) -> tuple[list[str], dict[str, int]]:
    tally = Tally()
    texts = list(read_texts(source_of(path), tally))
    return texts, dict(tally.rejects)


def bombs(folder: Path) -> list[Path]:
    """Write files of some kilobytes that stand for gigabytes."""
    same = pa.DictionaryArray.from_arrays(
        pa.array([0] * 80, pa.int32()), pa.array(["a " * 8 * MIB])
    )
    texts = pa.array(["a " * 8 * MIB] * 16)
    plain = {"use_dictionary": False, "compression": "zstd"}
    pq.write_table(pa.table({"text": same}), folder / "dictionary.parquet", compression="zstd")
    pq.write_table(pa.table({"text": texts}), folder / "pages.parquet", write_batch_size=1, **plain)
    pq.write_table(
        pa.table({"text": texts}),
        folder / "prefixes.parquet",
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        **plain,
    )
    pq.write_table(pa.table({"text": ["a" * 300 * MIB]}), folder / "one_text.parquet", **plain)
    line = b'{"text": "small", "more": [' + b"{}," * (20 * MIB) + b"{}]}\n"
    (folder / "objects.jsonl").write_bytes(line + b'{"text": "good"}\n')
    letters = b'{"text": "' + b"a" * (60 * MIB) + b'"}\n'
    (folder / "letters.jsonl").write_bytes(letters + b'{"text": "good"}\n')
    names = ["dictionary", "pages", "prefixes", "one_text", "objects", "letters"]
    return [next(folder.glob(f"{name}.*")) for name in names]


@pytest.mark.slow
def test_bombs_take_less_than_a_gigabyte_and_are_told(tmp_path: Path) -> None:
    paths = bombs(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, text=True
    )
    found = {}
    for path, line in zip(paths, done.stdout.splitlines(), strict=False):
        found[path.stem] = json.loads(line)
    assert len(found) == len(paths), (found, done.returncode, done.stderr[-2000:])
    peaks = {name: peak for name, (_, _, peak) in found.items()}
    assert max(peaks.values()) < PEAK_MIB, peaks
    assert found["dictionary"][:2] == [80, {}]
    assert found["pages"][:2] == [16, {}]
    assert found["prefixes"][:2] == [16, {}]
    assert found["one_text"][0] == 0 and "write_batch_size" in found["one_text"][1]
    assert found["objects"][:2] == [1, {"more than 1000000 values in a record": 1}]
    assert found["letters"][:2] == [1, {"more than 2097152 letters or symbols in a row": 1}]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "string_view"])
def test_a_row_that_is_too_long_is_rejected_and_the_next_one_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_columns, "MAX_DOCUMENT_BYTES", 100)
    values = pa.array(["one", "x" * 101, None, "y" * 60, "z" * 60, "x" * 101, "end"])
    if kind == "dictionary":
        values = values.dictionary_encode()
    elif kind != "string":
        values = values.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    texts, rejects = read(tmp_path / "a.parquet")
    assert texts == ["one", "y" * 60, "z" * 60, "end"]
    assert rejects == {TOO_LONG: 2, "text is null": 1}


def batch_rows(path: Path, column: str = "text") -> int:
    """Return the rows of the largest batch."""
    batches = parquet_files.parquet_batches(path, range(1), (column,))
    return max(batch.num_rows for _, batch in batches)


def test_as_many_rows_are_decoded_at_once_as_fit_whatever_their_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "_BATCH_BYTES", 80_000)
    path = tmp_path / "a.parquet"
    same = ["a " * 8_000] * 50
    pq.write_table(pa.table({"other": ["b"] * 50, "text": same}), path)
    batches = list(parquet_files.parquet_batches(path, range(1), ("text",)))
    assert max(batch.num_rows for _, batch in batches) == 4
    assert [before for before, _ in batches][:3] == [0, 4, 8]
    assert batch_rows(path, "other") == 50
    kept = pa.array(same).dictionary_encode()
    pq.write_table(pa.table({"text": kept}), path)
    assert batch_rows(path) == 50
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    table = pa.table({"text": same})
    pq.write_table(table, path, use_dictionary=False, column_encoding=encoding)
    assert batch_rows(path) == 4


def test_rows_in_plain_pages_take_what_their_pages_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a " * 500] * 400})
    pq.write_table(table, path, use_dictionary=False, data_page_size=1, write_batch_size=10)
    for limit, rows in ((10**6, 400), (400_000, 256), (100_000, 64), (90_000, 64), (31_000, 16)):
        monkeypatch.setattr(parquet_files, "_BATCH_BYTES", limit)
        assert batch_rows(path) == rows
    # rows of two pages at once, if a page is larger than the limit
    monkeypatch.setattr(parquet_files, "_BATCH_BYTES", 5000)
    assert batch_rows(path) == 4
    assert read(path)[0] == table["text"].to_pylist()


def test_a_window_of_pages_is_as_large_as_the_worst_rows() -> None:
    generator = np.random.default_rng(0)
    pages = [(int(rows), int(size)) for rows, size in generator.integers(1, 9, (60, 2))]
    sizes_of_rows = []
    for number, (rows, _) in enumerate(pages):
        sizes_of_rows += [number] * rows
    for rows in (4, 16, 64):
        window = parquet_pages._Window(rows)
        for page in pages:
            window.add(*page)
        most = 0
        for start in range(len(sizes_of_rows) - rows + 1):
            touched = set(sizes_of_rows[start : start + rows])
            most = max(most, sum(pages[number][1] for number in touched))
        assert window.most == most


def test_honest_long_documents_of_the_default_writer_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pyarrow looks at the size of a page every 1,024 rows: this one holds all rows
    monkeypatch.setattr(parquet_pages, "FREE_PAGE_BYTES", 100_000)
    path = tmp_path / "books.parquet"
    books = [f"{n} " + "a long text " * 200 for n in range(300)]
    pq.write_table(pa.table({"text": books}), path)
    assert read(path) == (books, {})
    bomb = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": books}), bomb, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="write_batch_size=16"):
        read(bomb)
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 200_000)
    with pytest.raises(DataError, match=r"at most 200,000 are read: write it with smaller row gr"):
        read(path)


def _seconds_to_read(num_rows: int, folder: Path) -> float:
    """Return the processor time for a column of pandas categories, all of them different."""
    texts = pa.array([f"{n} " + "some words " * 10 for n in range(num_rows)])
    path = folder / f"{num_rows}.parquet"
    limit = {"dictionary_pagesize_limit": 64 * MIB}
    pq.write_table(pa.table({"text": texts.dictionary_encode()}), path, **limit)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        assert sum(batch.num_rows for batch in _batches(path)) == num_rows
        seconds.append(time.process_time() - start)
    return min(seconds)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    for _, batch in parquet_files.parquet_batches(path, range(1), ("text",)):
        assert len(list(table_columns.table_records("place", batch, ["text"]))) == batch.num_rows
        yield batch


def test_a_column_of_categories_takes_time_in_proportion_to_its_rows(tmp_path: Path) -> None:
    ratio = _seconds_to_read(100_000, tmp_path) / _seconds_to_read(25_000, tmp_path)
    assert ratio < 12  # 16 if each batch went through the whole dictionary


def test_an_array_that_points_outside_of_its_memory_is_refused() -> None:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2**30, 3)))
    array = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc")])
    table = pa.table({"text": array})
    with pytest.raises(DataError, match="place: column 'text' is damaged"):
        list(table_columns.table_records("place", table, ["text"]))


def test_the_document_limit_counts_bytes() -> None:
    assert why_unusable("a " * (MAX_DOCUMENT_BYTES // 2)) is None
    assert why_unusable("a " * (MAX_DOCUMENT_BYTES // 2) + "a") == TOO_LONG
    assert why_unusable("\u6c34 " * (MAX_DOCUMENT_BYTES // 4 + 1)) == TOO_LONG


@pytest.mark.parametrize("character", ["a", "\u6c34", "!", "\u0301", "\U0001f600"])
def test_a_run_that_the_tokenizer_takes_as_one_piece_is_bounded(
    character: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "MAX_UNBROKEN_RUN", 1000)
    run = character * 1000
    assert why_unusable(f"a {run} 1") is None
    assert "letters or symbols in a row" in str(why_unusable(f"a {run}{character} 1"))


def test_only_values_outside_of_texts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_VALUES", 10)
    source = source_of(Path("a.jsonl"))

    def reason_of(record: object) -> str | None:
        return parse_record(source, json.dumps(record).encode(), Tally())[1]

    assert reason_of({"text": ',[{"\\' * 50}) is None
    assert reason_of({"text": "a", "more": list(range(7))}) is None
    assert reason_of({"text": "a", "more": list(range(8))}) == ("more than 10 values in a record")
    # the record, the text, the list and seven objects: ten values
    assert reason_of({"text": "a", "more": [{}] * 7}) is None
    assert reason_of({"text": "a", "more": [{}] * 8}) == "more than 10 values in a record"
    assert reason_of({"text": "a", "more": [{"k": []}] * 3}) is None
    assert reason_of({"text": "a", "more": [{"k": []}] * 4}) == "more than 10 values in a record"


def test_a_long_document_has_the_signature_that_it_would_have_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 999, n).astype(np.uint32) for n in (1, 5, 6, 300, 9000)]
    expected = near_duplicates.minhash_signatures(documents)
    for length in (1, 7, 1000):
        monkeypatch.setattr(near_duplicates, "_SIGNED_TOKENS", length)
        assert np.array_equal(near_duplicates.minhash_signatures(documents), expected)


def _varint(value: int) -> bytes:
    value *= 2
    content = b""
    while value > 127:
        content += bytes([value & 127 | 128])
        value >>= 7
    return content + bytes([value])


def _rewritten_footer(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-8]
    assert old in footer
    footer = footer.replace(old, new)
    path.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_a_footer_that_claims_a_trillion_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(1234)]}), path)
    _rewritten_footer(path, _varint(1234), _varint(10**12))
    with pytest.raises(DataError, match="claims 1,000,000,000,000 rows and holds 1,234"):
        read(path)


def test_a_footer_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a"]}).replace_schema_metadata({"key": "v" * 13 * MIB})
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"its footer has .* bytes, at most 16,777,216 are read"):
        read(path)
    path.write_bytes(b"PAR1" + bytes(100) + (2**31).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="claims a footer of 2,147,483,648"):
        read(path)


def test_the_largest_page_is_found_with_statistics_and_in_every_encoding(tmp_path: Path) -> None:
    texts = ["x" * 50_000, *[f"{n} " * 50 for n in range(3000)]]
    for version in ("1.0", "2.0"):
        for use_dictionary in (True, False):
            path = tmp_path / "a.parquet"
            pq.write_table(
                pa.table({"text": texts}),
                path,
                use_dictionary=use_dictionary,
                data_page_version=version,
                data_page_size=10_000,
                row_group_size=1000,
            )
            metadata = pq.ParquetFile(path).metadata
            columns = parquet_footer.read_columns(path)
            for group in range(metadata.num_row_groups):
                chunk = metadata.row_group(group).column(0)
                bounds = parquet_pages.ColumnBounds(path, columns, 0, "BYTE_ARRAY", keeps=False)
                bounds.add_group(group)
                assert 0 < bounds.largest_page <= chunk.total_uncompressed_size
                assert bounds.largest_page >= (50_000 if group == 0 else 0)
                longest = 50_000 if group == 0 else 250
                assert bounds.bytes_of(4) >= (4 * longest if use_dictionary else longest)
            assert read(path)[0] == texts
