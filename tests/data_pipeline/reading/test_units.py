"""Large sources: few units of many files, and a change of one file leaves the other units alone."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build.build import build
from data_pipeline.build.origin import build_rules, compare, read_origin
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.parts.cache_folder import open_cache
from data_pipeline.reading import units
from data_pipeline.reading.sources import read_texts
from data_pipeline.reading.units import split_into_units
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import MakeMix, make_texts

NUM_FILES = 60


def write_files(folder: Path, kind: str) -> None:
    """Write many small files of a kind, whose texts name their file."""
    folder.mkdir(parents=True)
    for number in range(NUM_FILES):
        texts = [f"file {number}, text {index}: {'word ' * index}" for index in range(4)]
        path = folder / f"{number:03}"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in ["", *texts])
        if kind == "jsonl":
            path.with_suffix(".jsonl").write_text(lines)
        elif kind == "jsonl.gz":
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        elif kind == "parquet":
            pq.write_table(pa.table({"text": texts}), path.with_suffix(".parquet"))
        else:
            path.with_suffix(".txt").write_text(texts[3])


def source_of(folder: Path) -> SourceConfig:
    return SourceConfig(name="s", language="en", domain="web", path=f"{folder}/*", weight=1.0)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of more than 20 files is large, with units of 400 bytes."""
    monkeypatch.setattr(units, "MAX_UNITS", 20)
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 400)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "text"])
def test_many_small_files_make_few_units_and_the_same_texts_and_places(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "in", kind)
    source = source_of(tmp_path / "in")
    results = []
    for most_files in (1000, 20):
        monkeypatch.setattr(units, "MAX_UNITS", most_files)
        monkeypatch.setattr(units, "MIN_UNIT_BYTES", 4000)
        tally = Tally()
        texts = list(read_texts(source, tally))
        places = [str(place) for listed in tally.places.values() for place in listed]
        results.append((texts, places, tally.rejects, len(split_into_units(source))))
    assert results[0][:3] == results[1][:3]
    if kind == "jsonl":
        assert results[1][1][0].endswith("000.jsonl:1") and results[1][1][1].endswith("001.jsonl:1")
    assert results[1][3] < NUM_FILES / 2


def test_compressed_small_files_become_few_shards_of_the_same_documents(
    tmp_path: Path, make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "in" / "many", "jsonl.gz")
    mix = make_mix({"en": ["unused"]}, sources={"en": {"path": "many/*"}}, max_reject_share=0.5)
    plain = build(mix, tmp_path / "plain", progress=False)
    assert len(plain.shard_names("en")) == NUM_FILES
    monkeypatch.setattr(units, "MAX_UNITS", 20)
    large = build(mix, tmp_path / "large", progress=False)
    assert len(large.shard_names("en")) < 5
    assert large.sources == plain.sources and large.fingerprint != plain.fingerprint
    for name in plain.files:
        tells_shards = name.endswith((".tokens", "shard_documents.npy")) or "provenance" in name
        if not tells_shards:
            assert large.files[name] == plain.files[name], name


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("change", ["added first", "added between", "removed", "grown"])
def test_a_change_of_one_file_leaves_the_units_of_the_others(tmp_path: Path, change: str) -> None:
    write_files(tmp_path / "in", "jsonl")
    source = source_of(tmp_path / "in")
    before = {unit.paths for unit in split_into_units(source)}
    assert len(before) > 8
    path = tmp_path / "in" / "030.jsonl"
    if change == "removed":
        path.unlink()
    elif change == "grown":
        path.write_text(path.read_text() * 2)
    else:
        name = "0-first.jsonl" if change == "added first" else "030-more.jsonl"
        (tmp_path / "in" / name).write_text(path.read_text())
    after = {unit.paths for unit in split_into_units(source)}
    assert len(before - after) <= 2 and len(after - before) <= 2


@pytest.mark.usefixtures("small_limits")
def test_one_changed_file_among_many_makes_one_part_anew(
    tmp_path: Path, make_mix: MakeMix, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_files(tmp_path / "in" / "many", "jsonl")
    mix = make_mix({"en": ["unused"]}, sources={"en": {"path": "many/*"}}, max_reject_share=0.5)
    cache = open_cache(tmp_path)
    build(mix, tmp_path / "first", cache_dir=cache)
    num_parts = len(split_into_units(mix.sources[0]))
    path = tmp_path / "in" / "many" / "030.jsonl"
    path.write_text(path.read_text().replace("text 2", "text two"))
    build(mix, tmp_path / "second", cache_dir=cache)
    told = f"{num_parts - 1} of {num_parts} parts were there already"
    assert told in caplog.text and num_parts > 8


def test_units_of_a_growing_source_have_few_sizes() -> None:
    sizes = {units._large_unit_bytes(10**9 * step) for step in range(1, 20_000, 7)}
    mebibytes = sorted(size // 2**20 for size in sizes)
    assert mebibytes == [16, 64, 256, 1024, 4096, 16384]


def test_the_rules_of_large_sources_are_in_the_fingerprint_of_those_alone(
    tmp_path: Path, make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix: MixConfig = make_mix({"en": make_texts(20, "en")})
    assert read_origin(mix).rules == build_rules(mix)
    monkeypatch.setattr(units, "MAX_UNITS", 0)
    assert read_origin(mix).rules["sources"][0]["unit_rules"] == units.LARGE_RULES
    manifest = build(mix, tmp_path / "out", progress=False)
    assert not compare(manifest, mix, read_contents=True).differences
    monkeypatch.setattr(units, "LARGE_RULES", 99)
    (line,) = compare(manifest, mix, read_contents=True).differences
    assert line == "sources[en].unit_rules: 1 in the build, 99 in the mix"


def test_splitting_takes_time_in_proportion_to_the_number_of_files(tmp_path: Path) -> None:
    seconds = []
    for count in (1000, 4000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text("some words")
        begun = time.process_time()
        split_into_units(source_of(folder))
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 8 * seconds[0]  # four times as many files; a square would be sixteen
