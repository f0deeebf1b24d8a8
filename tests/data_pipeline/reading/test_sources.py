"""Bad input is counted by reason with file and line; good input around it is kept (B1-B6, B8)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.reading import sources
from data_pipeline.reading.mock_documents import invent_documents
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import MAX_WHITESPACE_RUN, Tally, why_unusable
from data_pipeline.text.tokenizer import NUM_TEXT_TOKENS, encode

GOOD = b'{"text": "good"}\n'


def source_of(*paths: Path, text_field: str = "text") -> SourceConfig:
    return SourceConfig(
        name="s",
        language="en",
        domain="web",
        path=tuple(map(str, paths)),
        weight=1.0,
        text_field=text_field,
    )


def read(*paths: Path, text_field: str = "text") -> tuple[list[str], Tally]:
    tally = Tally()
    return list(read_texts(source_of(*paths, text_field=text_field), tally)), tally


def shown(tally: Tally) -> dict[str, list[str]]:
    return {reason: [str(place) for place in places] for reason, places in tally.places.items()}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}\n', "invalid UTF-8"),
        (b'{"text": "\x83\x65\x83\x58\x83\x67"}\n', "invalid UTF-8"),
        (b'{"text": "a\\ud800b"}\n', "lone surrogate"),
        (b'{"text": ""}\n', "empty text"),
        (b'{"text": " \\n\\u3000"}\n', "empty text"),
        (b'{"text": "a\\u0000b"}\n', "NUL character"),
        (b'{"body": "x"}\n', "no field 'text'"),
        (b'{"text": null}\n', "text is null"),
        (b'{"text": 3}\n', "text is not a string"),
        (b'{"text": NaN}\n', "text is not a string"),
        (b'{"text": ["a"]}\n', "text is not a string"),
        (b'["text"]\n', "not a JSON object"),
        (b"{text: 1}\n", "broken JSON"),
        (b"[" * 100_000 + b"\n", "broken JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}\n", "broken JSON"),
    ],
)
@pytest.mark.case("B1", "counted by reason with file and line; the build goes on")
@pytest.mark.case("B2", "counted by reason with file and line; the build goes on")
@pytest.mark.case("B3", "counted by reason with file and line; the build goes on")
@pytest.mark.case("B4", "counted by reason with file and line; the build goes on")
def test_a_bad_line_costs_that_line_and_is_counted_with_its_place(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + GOOD)
    texts, tally = read(path)
    assert texts == ["good", "good"]
    assert dict(tally.rejects) == {reason: 1} and tally.accepted == 2
    assert shown(tally)[reason] == [f"{path}:2"]


@pytest.mark.parametrize("template", [None, "{text}"])
def test_nul_is_removed_where_control_is_asked_for_and_rejected_elsewhere(
    tmp_path: Path, template: str | None
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "a\\u0000b"}\n', b'{"text": "\\u0000 \\u0000"}\n', GOOD]
    path.write_bytes(b"".join(lines))
    field = "" if template is None else "field 'text': "
    for steps, texts, rejects, notes in (
        (("control",), ["ab", "good"], {"empty text": 1}, {"normalised: control": 1}),
        (("width",), ["good"], {"NUL character": 2}, {}),
    ):
        source = dataclasses.replace(source_of(path), normalise=steps, template=template)
        tally = Tally()
        assert list(read_texts(source, tally)) == texts
        assert dict(tally.rejects) == {field + reason: n for reason, n in rejects.items()}
        assert dict(tally.notes) == notes


@pytest.mark.case("B6", "a cut-off last line is told from a broken one")
def test_a_cut_off_last_line_is_told_from_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + GOOD[:-5])
    texts, tally = read(path)
    assert texts == ["good"] and shown(tally) == {"last line cut off": [f"{path}:2"]}


def test_a_whole_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + GOOD.rstrip())
    assert read(path)[0] == ["good", "good"]


@pytest.mark.case("B5", "cost no document")
def test_byte_order_mark_crlf_and_blank_lines_cost_no_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a\\r\\nb"}\r\n' + b"\r\n\n" + GOOD)
    texts, tally = read(path)
    assert texts == ["a\r\nb", "good"] and not tally.rejects
    assert dict(tally.notes) == {"byte order mark": 1, "blank line": 2}


@pytest.mark.case("B7", "an overlong line is rejected, the next one read")
def test_a_line_above_the_limit_is_rejected_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"text": "x" * 1000}).encode() + b"\n" + GOOD)
    texts, tally = read(path)
    assert texts == ["good"] and shown(tally) == {"line longer than 100 bytes": [f"{path}:1"]}


def test_only_the_first_places_are_kept_but_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n' * 10 + b'{"text": 1}\n')
    _, tally = read(path)
    assert tally.rejects.total() == 11 and tally.reject_share == 1.0
    assert tally.describe_rejects() == (
        f"10 empty text ({path}:1, {path}:2, {path}:3, ...); 1 text is not a string ({path}:11)"
    )


def test_text_file_is_one_document_without_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    texts, tally = read(path)
    assert texts == ["one\ntwo\n"]
    assert dict(tally.notes) == {"byte order mark": 1, "file with CRLF line ends, read as LF": 1}


@pytest.mark.case("B9", "Shift-JIS rejected, not guessed")
def test_text_file_in_shift_jis_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\u65e5\u672c\u8a9e".encode("shift_jis"))
    assert dict(read(path)[1].rejects) == {"invalid UTF-8": 1}


def test_parquet_rows_are_read_and_bad_ones_counted_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pa.array([b"ok", b"\xff", None, b" ", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": invalid, "n": [1, 2, 3, 4, 5]}), path)
    texts, tally = read(path, text_field="body")
    assert texts == ["ok", "fine"]
    assert shown(tally) == {
        "invalid UTF-8": [f"{path}: row 2"],
        "text is null": [f"{path}: row 3"],
        "empty text": [f"{path}: row 4"],
    }


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(DataError, match=r"a.parquet: no column 'text'. It has: body, n"):
        read(path)
    with pytest.raises(DataError, match="holds int64, must hold strings"):
        read(path, text_field="n")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 100]}), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file"):
        read(path)


def test_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"b.jsonl: empty file"):
        read(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_formats_mix_within_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.txt").write_text("plain")
    pq.write_table(pa.table({"text": ["columns"]}), tmp_path / "c.parquet")
    assert read(tmp_path / "b.txt", tmp_path / "c.parquet", tmp_path / "a.jsonl")[0] == [
        "plain",
        "columns",
        "good",
    ]


def test_whitespace_that_overflows_the_tokenizer_is_rejected_before_it() -> None:
    longest = "a" + " " * MAX_WHITESPACE_RUN + "b"
    assert why_unusable(longest) is None and len(encode(longest)) > 0
    assert (
        why_unusable(longest.replace("a", "a "))
        == "more than 100000 whitespace characters in a row"
    )


def test_invented_documents_are_the_same_ones_every_time() -> None:
    source = SourceConfig(
        name="m",
        language="en",
        domain="mock",
        format="mock",
        weight=1.0,
        num_documents=500,
        mean_tokens=100,
    )
    first = list(invent_documents(source, 0, 500))
    second = list(invent_documents(source, 0, 500))
    lengths = [len(tokens) for tokens in first]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert min(lengths) >= 50 and max(lengths) <= 150 and abs(np.mean(lengths) - 100) < 5
    assert max(int(tokens.max()) for tokens in first) < NUM_TEXT_TOKENS
