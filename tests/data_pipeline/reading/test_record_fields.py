"""Fields inside fields, and conditions on fields: what is read, what is left out and counted."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.build import build
from data_pipeline.build.origin import read_origin
from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.record_filters import FilterRule
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.parts.part import Part, make_part
from data_pipeline.parts.part_cache import _identity
from data_pipeline.reading.sources import read_texts
from data_pipeline.reading.units import split_into_units
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import MakeMix, make_texts

RECORDS: list[dict[str, Any]] = [
    {"meta": {"text": "a", "from": {"title": "A"}}, "score": 0.9, "dump": "d1"},
    {"meta": {"text": "b", "from": {"title": "B"}}, "score": 0.5, "dump": "d1"},
    {"meta": {"text": "c", "from": {"title": "C"}}, "score": 1.0, "dump": "d2"},
    {"meta": {"text": "d", "from": {"title": "D"}}, "score": None, "dump": None},
    {"meta": {"text": "e", "from": {"title": "E"}}, "score": 2.5, "dump": ""},
]


def source_of(path: Path, **keys: Any) -> SourceConfig:
    values: dict[str, Any] = {"name": "s", "language": "en", "domain": "web", "weight": 1.0} | keys
    return SourceConfig(path=str(path), **values)


def read(path: Path, **keys: Any) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(read_texts(source_of(path, **keys), tally)), tally


def write(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Write RECORDS in one of the formats, and return the path and the keys that it needs."""
    if kind == "jsonl":
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        return path, {}
    if kind == "parquet":
        path = folder / "a.parquet"
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)
        return path, {}
    path = folder / "saved"
    datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    return path, {"format": "huggingface"}


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])


@KINDS
def test_a_field_inside_others_is_read(tmp_path: Path, kind: str) -> None:
    path, keys = write(tmp_path, kind)
    assert read(path, text_field="meta.text", **keys)[0] == ["a", "b", "c", "d", "e"]
    template = "# {meta.from.title}: {meta.text} {{x}}"
    assert read(path, template=template, **keys)[0][0] == "# A: a {x}"


@KINDS
@pytest.mark.parametrize(
    ("rule", "kept", "filtered"),
    [
        (FilterRule(field="score", min=0.8), "ace", {"score < 0.8": 1, "score is absent": 1}),
        (FilterRule(field="score", max=1), "abc", {"score > 1": 1, "score is absent": 1}),
        (
            FilterRule(field="score", min=0.6, max=1),
            "ac",
            {"score < 0.6": 1, "score > 1": 1, "score is absent": 1},
        ),
        (
            FilterRule(field="dump", one_of=("d1", "d3")),
            "ab",
            {"dump is not one of d1, d3": 2, "dump is absent": 1},
        ),
        (
            FilterRule(field="dump", not_one_of=("d1",)),
            "ce",
            {"dump is one of d1": 2, "dump is absent": 1},
        ),
        (FilterRule(field="dump", present=True), "abc", {"dump is absent": 2}),
        (FilterRule(field="dump", present=False), "de", {"dump is present": 3}),
        (FilterRule(field="score", one_of=(1,)), "c", {"score is not one of 1": 3}),
        (FilterRule(field="meta.from.title", one_of=("B",)), "b", {}),
        (FilterRule(field="dump", min=1), "", {"dump is not a number": 4, "dump is absent": 1}),
    ],
)
def test_documents_that_meet_no_condition_are_left_out_and_counted_by_it(
    tmp_path: Path, kind: str, rule: FilterRule, kept: str, filtered: dict[str, int]
) -> None:
    path, keys = write(tmp_path, kind)
    texts, tally = read(path, text_field="meta.text", filters=(rule,), **keys)
    assert "".join(texts) == kept
    assert tally.filtered.items() >= filtered.items()
    assert tally.filtered.total() == 5 - len(kept) and not tally.rejects


def test_the_first_condition_that_fails_is_the_one_that_counts(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "jsonl")
    rules = (FilterRule(field="score", min=0.8), FilterRule(field="dump", one_of=("d2",)))
    texts, tally = read(path, text_field="meta.text", filters=rules)
    assert texts == ["c"]
    assert dict(tally.filtered) == {
        "score < 0.8": 1,
        "score is absent": 1,
        "dump is not one of d2": 2,
    }


def test_a_field_whose_own_name_has_dots_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a.b": "flat", "a": {"b": "deep"}}\n{"a.b": {"c": "x"}, "a": {"b": {}}}\n')
    texts, tally = read(path, text_field="a.b")
    assert texts == ["flat"] and dict(tally.rejects) == {"text is not a string": 1}
    assert read(path, text_field="a.b.c")[0] == ["x"]
    table = pa.table({"a.b": ["flat"], "a": [{"b": "deep"}]})
    pq.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", text_field="a.b")[0] == ["flat"]


def test_a_null_around_a_field_is_null(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([{"b": "x"}, None, {"b": None}], pa.struct([("b", pa.string())]))
    pq.write_table(pa.table({"a": column}), path)
    texts, tally = read(path, text_field="a.b")
    assert texts == ["x"] and dict(tally.rejects) == {"text is null": 2}


def test_a_field_that_a_record_does_not_have_is_told_by_its_whole_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"c": "x"}}\n{"a": "x"}\n{"a": {"b": "x"}}\n')
    texts, tally = read(path, text_field="a.b")
    assert texts == ["x"] and dict(tally.rejects) == {"no field 'a.b'": 2}


def test_a_template_looks_up_no_attribute_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "__class__": {"__name__": "y"}}\n{"text": "x"}\n')
    texts, tally = read(path, template="{text.__class__}")
    assert texts == [] and dict(tally.rejects) == {"no field 'text.__class__'": 2}
    assert read(path, template="{__class__.__name__}")[0] == ["y"]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"text": "a", "text": "b"}', "text"),
        ('{"text": "a", "q": 1, "q": 9}', "q"),
        ('{"text": "a", "m": {"v": 1, "v": 9}, "q": 9}', "m.v"),
        ('{"text": "a", "m": {"v": 1}, "m": {"v": 9}, "q": 9}', "m"),
        ('{"text": "a", "m.v": 1, "m.v": 9, "q": 9}', "m.v"),
    ],
)
def test_a_key_given_twice_is_refused_where_a_condition_reads_it(
    tmp_path: Path, line: str, key: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    rules = (FilterRule(field="q", min=5), FilterRule(field="m.v", min=5))
    assert dict(read(path, filters=rules)[1].rejects) == {f"key '{key}' given twice": 1}


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ('{"a": {"b": {"c": "x", "c": "y"}}}', "a.b.c"),
        ('{"a": {"b": {"c": "x"}, "b": {"c": "y"}}}', "a.b"),
        ('{"a": {"b": {"c": "x"}}, "a": {"b": {"c": "y"}}}', "a"),
        ('{"a.b": {"c": "x"}, "a.b": {"c": "y"}}', "a.b"),
        ('{"a": {"b.c": "x", "b.c": "y"}}', "a.b.c"),
        ('{"a": {"b": {"c": "y"}}, "m": {"b": 1, "b": 2, "c": 1, "c": 2}}', None),
        ('{"a": {"b": {"c": "y"}, "": 1, "": 2}}', None),
    ],
)
def test_a_key_given_twice_is_refused_wherever_the_way_to_the_text_passes_it(
    tmp_path: Path, record: str, key: str | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(record + "\n")
    texts, tally = read(path, text_field="a.b.c")
    if key is None:
        assert texts == ["y"] and not tally.rejects
        assert tally.notes["record with a key given twice, not one that is read"] == 1
    else:
        assert texts == [] and dict(tally.rejects) == {f"key '{key}' given twice": 1}


def test_a_number_that_no_float_holds_is_compared_like_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    huge = "9" * 310
    path.write_text(
        f'{{"text": "high", "q": {huge}}}\n{{"text": "low", "q": -{huge}}}\n'
        '{"text": "none", "q": NaN}\n'
    )
    texts, tally = read(path, filters=(FilterRule(field="q", min=0.5),))
    assert texts == ["high"]
    assert dict(tally.filtered) == {"q < 0.5": 1, "q is not a number": 1}


@pytest.mark.parametrize(
    ("column", "kept"),
    [
        (pa.array([1, 5], pa.int8()), 1),
        (pa.array([1, 5], pa.uint64()), 1),
        (pa.array([1, 5], pa.float32()), 1),
        (pa.array([Decimal("1.5"), Decimal("5.5")]), 1),
        (pa.array([5, 5]).dictionary_encode().dictionary_decode(), 2),
    ],
    ids=["int8", "uint64", "float32", "decimal", "int64"],
)
def test_numbers_of_every_type_are_compared(tmp_path: Path, column: pa.Array, kept: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "q": column}), path)
    assert len(read(path, filters=(FilterRule(field="q", min=3),))[0]) == kept


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_a_number_of_few_bits_is_the_decimal_that_was_written(
    tmp_path: Path, kind: pa.DataType
) -> None:
    path = tmp_path / "a.parquet"
    scores = pa.array(np.array([0.4, 0.8, 0.9, np.nan], kind.to_pandas_dtype()))
    column = pa.concat_arrays([scores, pa.nulls(1, kind)])
    pq.write_table(pa.table({"text": ["a", "b", "c", "d", "e"], "q": column}), path)
    texts, tally = read(path, filters=(FilterRule(field="q", min=0.4, max=0.8),))
    assert texts == ["a", "b"]
    assert dict(tally.filtered) == {"q > 0.8": 1, "q is not a number": 1, "q is absent": 1}


def test_rules_of_values_belong_to_sources_that_read_them_from_tables(tmp_path: Path) -> None:
    table = pa.table({"text": make_texts(9, "en"), "q": [0.5] * 9})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "q": 0.5}\n')
    rule = {"filters": [{"field": "q", "min": 0.1}]}
    sources = [
        {"path": "a.parquet", **rule},
        {"path": "a.parquet", "keep": ["q"]},
        {"path": "a.parquet"},
        {"path": "b.jsonl", **rule},
    ]
    entries = []
    for number, source in enumerate(sources):
        entry = {"name": f"s{number}", "language": "en", "domain": "web", "weight": 0.25}
        entries.append({**entry, **source})
    (tmp_path / "mix.yaml").write_text(
        yaml.safe_dump({"seq_len": 32, "seed": 1, "sources": entries})
    )
    mix = load_mix(tmp_path / "mix.yaml")
    found = [rules.get("value_rules") for rules in read_origin(mix).rules["sources"]]
    assert found == [2, 2, None, None]
    versions = []
    for source in mix.sources:
        (unit,) = split_into_units(source)
        part = Part(
            source=source,
            unit=unit,
            number=0,
            work_dir=tmp_path,
            near_duplicates=False,
            seq_len=32,
        )
        versions.append(_identity(part).get("value_rules"))
    assert versions == found


def test_true_and_false_and_times_are_compared_as_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    days = pa.array([19000, 19001], pa.date32())
    pq.write_table(pa.table({"text": ["x", "y"], "ok": [True, False], "day": days}), path)
    assert read(path, filters=(FilterRule(field="ok", one_of=(True,)),))[0] == ["x"]
    assert read(path, filters=(FilterRule(field="day", one_of=("2022-01-09",)),))[0] == ["y"]


def test_a_condition_on_a_column_that_is_not_there_or_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "q": [[1]], "m": [{"v": 1}]}), path)
    with pytest.raises(DataError, match=r"no column 'score'.*Correct filters or cluster_by\."):
        read(path, filters=(FilterRule(field="score", min=1),))
    with pytest.raises(DataError, match=r"'q' holds list<.*must hold numbers, texts"):
        read(path, filters=(FilterRule(field="q", min=1),))
    with pytest.raises(DataError, match=r"'m' holds struct<.*such as 'm\.v'"):
        read(path, filters=(FilterRule(field="m", min=1),))


def test_a_conversation_may_have_the_fields_that_conditions_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    lines = [{"messages": messages, "score": score} for score in (1, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rule = FilterRule(field="score", min=2)
    texts, tally = read(path, format="harmony", filters=(rule,))
    assert len(texts) == 1 and dict(tally.filtered) == {"score < 2": 1} and not tally.rejects


LINES = st.sampled_from(
    [
        '{"text": "short", "q": 9}',
        '{"text": "short", "q": 9}',
        '{"text": "a text of more words than that", "q": 9}',
        '{"text": "another text of more words than that one has, by far", "q": 3}',
        '{"text": "a text of low quality", "q": 1}',
        '{"text": "no quality"}',
        '{"text": ""}',
        '{"text": "", "q": 9}',
        "broken",
        '{"q": 9}',
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=30))
def test_records_are_kept_or_counted_by_a_reason(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("\n".join(lines) + "\n")
        source = source_of(
            path,
            filters=(FilterRule(field="q", min=2),),
            min_characters=6,
            min_tokens=3,
            max_tokens=9,
        )
        (unit,) = split_into_units(source)
        work_dir = Path(folder) / "work"
        account = make_part(
            Part(
                source=source,
                unit=unit,
                number=0,
                work_dir=work_dir,
                near_duplicates=False,
                seq_len=64,
            )
        )
    tally = account.tally
    turned_away = tally.rejects.total() + tally.filtered.total() + account.num_duplicates
    assert account.num_documents + turned_away == len(lines)
    assert tally.accepted == account.num_documents + account.num_duplicates


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("filters", [{"field": "q"}], "stands alone"),
        ("filters", [{"field": "", "min": 1}], "names no field"),
        ("filters", [{"field": "a..b", "min": 1}], "names no field"),
        ("filters", [{"field": "q", "min": 2, "max": 1}], "no document would pass"),
        ("filters", [{"field": "q", "present": False, "min": 1}], "has no value"),
        ("filters", [{"field": "q", "minimum": 2}], "is not a known key. Did you mean 'min'"),
        ("filters", [{"field": "q", "one_of": [0.5]}], "must be text or a whole number"),
        ("min_tokens", 0, "must be at least 1"),
        ("text_field", "a.", "names no field"),
        ("fill_in_the_middle", 0.5, "has no token that marks a prefix, a middle or a suffix"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_refused(
    make_mix: MakeMix, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mix({"en": make_texts(3, "en")}, sources={"en": {key: value}})


def test_a_limit_of_characters_is_refused_where_there_is_no_plain_text(tmp_path: Path) -> None:
    chat = source_of(tmp_path / "a.jsonl", format="harmony", min_characters=1000)
    (problem,) = chat.check()
    assert problem[0] == "min_characters" and "Set min_tokens" in problem[1]
    assert not list(dataclasses.replace(chat, min_characters=None, min_tokens=9).check())
    assert not list(dataclasses.replace(chat, format="auto").check())


def test_conditions_belong_to_the_fingerprint_only_where_they_are_used(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts = {"en": make_texts(30, "en")}
    plain = make_mix(texts)
    manifest = build(plain, tmp_path / "plain", workers=1)
    rules = manifest.rules["sources"][0]
    assert not {"filters", "min_tokens", "max_tokens", "min_characters"} & rules.keys()
    condition = {"filters": [{"field": "id", "one_of": ["1", "2", "3"]}], "min_tokens": 2}
    filtered = build(make_mix(texts, sources={"en": condition}), tmp_path / "filtered", workers=1)
    assert filtered.fingerprint != manifest.fingerprint
    entry = filtered.sources[0]
    assert entry.documents == 3
    assert entry.dropped["filtered: id is not one of 1, 2, 3"] == {"documents": 27}


def test_a_source_of_which_conditions_leave_nothing_says_so(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    condition = {"filters": [{"field": "scores", "min": 1}]}
    mix = make_mix({"en": make_texts(5, "en")}, sources={"en": condition})
    with pytest.raises(DataError, match=r"filters leave no document: 5 scores is absent"):
        build(mix, tmp_path / "out", workers=1)


def test_conditions_are_read_from_a_mix(make_mix: MakeMix) -> None:
    filters = [{"field": "q", "min": 0.5}, {"field": "d", "one_of": [2024, "x", True]}]
    mix = make_mix({"en": make_texts(3, "en")}, sources={"en": {"filters": filters}})
    assert mix.sources[0].filters == (
        FilterRule(field="q", min=0.5),
        FilterRule(field="d", one_of=(2024, "x", True)),
    )
