"""Compressed files, datasets, templates, earlier builds and normalization (B6, B9)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build.build import build
from data_pipeline.build.origin import fingerprint
from data_pipeline.config.mix_file import load_mix
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.reading import units
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import MakeMix, make_texts, write_jsonl

TEXTS = make_texts(50, "t")


def source_of(path: Path | None, **keys: Any) -> SourceConfig:
    values: dict[str, Any] = {"name": "s", "language": "en", "domain": "web", "weight": 1.0} | keys
    return SourceConfig(path=None if path is None else (str(path),), **values)


def read(path: Path | None, **keys: Any) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(read_texts(source_of(path, **keys), tally)), tally


def compress(content: bytes, path: Path) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes() + b'{"text": ""}\n'
    path = compress(content, tmp_path / f"a.jsonl{suffix}")
    texts, tally = read(path)
    assert texts == TEXTS and [str(place) for place in tally.places["empty text"]] == [f"{path}:51"]
    path.write_bytes(path.read_bytes() * 2)  # several members in one file
    assert read(path)[0] == TEXTS + TEXTS
    assert read(compress(b"plain text", tmp_path / f"b.txt{suffix}"))[0] == ["plain text"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.case("B6", "a truncated archive stops the build by name")
def test_a_cut_off_compressed_file_stops_the_build_by_name(
    tmp_path: Path, suffix: str, kept: float
) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", make_texts(3000, "t")).read_bytes()
    path = compress(content, tmp_path / f"a.jsonl{suffix}")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"a.jsonl{suffix}: cannot be read: .*[Tt]runcated"):
        read(path)


def test_a_template_puts_fields_together_and_names_the_field_that_fails(tmp_path: Path) -> None:
    lines = [
        {"t": "Title", "b": "Body {x}"},
        {"t": "No body"},
        {"t": None, "b": "x"},
        {"t": 3, "b": "x"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts, tally = read(path, template="# {t}\n\n{b} {{}}")
    assert texts == ["# Title\n\nBody {x} {}"]
    assert dict(tally.rejects) == {
        "no field 'b'": 1, "field 't': text is null": 1, "field 't': text is not a string": 1
    }  # fmt: skip
    pq.write_table(pa.table({"t": ["A", "C"], "b": ["B", None]}), tmp_path / "a.parquet")
    texts, tally = read(tmp_path / "a.parquet", template="{t}/{b}")
    assert texts == ["A/B"] and dict(tally.rejects) == {"field 'b': text is null": 1}


def test_parquet_units_are_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": [*TEXTS, None]}), tmp_path / "a.parquet", row_group_size=7)
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 1000)
    source = source_of(tmp_path / "a.parquet")
    assert 1 < len(units.split_into_units(source)) <= 8
    texts, tally = read(tmp_path / "a.parquet")
    assert texts == TEXTS and str(tally.places["text is null"][0]).endswith("row 51")


def test_a_saved_dataset_is_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"body": [*TEXTS, None], "n": list(range(51))}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 1000)
    keys: dict[str, Any] = {"format": "huggingface", "text_field": "body"}
    assert len(units.split_into_units(source_of(tmp_path / "plain", **keys))) > 1
    texts, tally = read(tmp_path / "plain", **keys)
    assert texts == TEXTS and str(tally.places["text is null"][0]).endswith("row 51")
    assert read(tmp_path / "splits", split="test", **keys)[0] == TEXTS
    with pytest.raises(DataError, match=r"the dataset: no column .text.\. It has: body, n"):
        read(tmp_path / "plain", format="huggingface")
    with pytest.raises(DataError, match=r"has no split 'train'. It has: test. Set split"):
        read(tmp_path / "splits", **keys)


def test_a_hub_dataset_is_asked_for_by_name_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load(name: str, subset: str | None, **keys: Any) -> datasets.Dataset:
        asked.update(keys, name=name, subset=subset)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts, _ = read(None, format="huggingface", dataset="some/name", revision="0" * 40, subset="ja")
    assert texts == TEXTS
    assert asked == {"name": "some/name", "subset": "ja", "split": "train", "revision": "0" * 40}


@pytest.mark.parametrize("name", ["planted.py", "folder"])
def test_a_dataset_with_a_loading_script_is_refused_unrun(tmp_path: Path, name: str) -> None:
    """`datasets` up to 3 ran such scripts; setup.cfg asks for 5."""
    folder = tmp_path / "planted"
    folder.mkdir()
    mark = tmp_path / "mark"
    (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w')\n")
    place = folder if name == "folder" else folder / name
    with pytest.raises((RuntimeError, FileNotFoundError, ValueError)):
        datasets.load_dataset(str(place), split="train", cache_dir=str(tmp_path / "cache"))
    assert not mark.exists()


@pytest.mark.case("X3", "a hub data set without a commit is refused")
def test_a_hub_dataset_without_a_commit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        "seq_len: 64\nseed: 1\nsources:\n"
        "  - {name: a, language: en, domain: web, format: huggingface, "
        "dataset: some/name, revision: main, weight: 1.0}\n"
    )
    with pytest.raises(
        ConfigError, match=r"revision is 'main', must be a commit \(40 hexadecimal digits\)"
    ):
        load_mix(tmp_path / "mix.yaml")


def test_an_earlier_build_gives_its_training_documents_and_not_its_held_out_ones(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    texts = {"ja": make_texts(40, "ja"), "en": make_texts(60, "en", 20)}
    first = build(make_mix(texts, held_out_share=0.2), tmp_path / "first", progress=False)
    source = {
        "name": "old",
        "language": "en",
        "domain": "web",
        "format": "build",
        "path": "first",
        "weight": 1.0,
    }
    path = tmp_path / "mix.yaml"
    path.write_text(f"seq_len: 64\nseed: 1\nnear_duplicates: 0\nsources: [{json.dumps(source)}]\n")
    mix = load_mix(path)
    taken, tally = list(read_texts(mix.sources[0], Tally())), Tally()
    assert len(taken) == sum(entry.documents for entry in first.sources) and not tally.rejects
    assert set(taken) < {*texts["ja"], *texts["en"]}
    assert build(mix, tmp_path / "second", progress=False).sources[0].documents == len(taken)
    BuiltData.open(tmp_path / "second", mix=mix)
    source |= {"build_sources": ["en"]}
    path.write_text(f"seq_len: 64\nseed: 1\nsources: [{json.dumps(source)}]\n")
    only = load_mix(path)
    assert set(read_texts(only.sources[0], Tally())) < set(texts["en"])
    assert fingerprint(only) != fingerprint(mix)


@pytest.mark.parametrize(
    ("steps", "before", "after"),
    [
        (
            (),
            "\uff21\uff22\uff23 \uff71\uff72 x\u00b2 \u00bd",
            "\uff21\uff22\uff23 \uff71\uff72 x\u00b2 \u00bd",
        ),
        (
            ("width",),
            "\uff21\uff11\uff01 \uff76\uff9e\uff77 x\u00b2 \u337f",
            "A1\uff01 \u30ac\u30ad x\u00b2 \u337f",
        ),
        (("nfkc",), "x\u00b2 \u00bd \u337f", "x2 1\u20442 \u682a\u5f0f\u4f1a\u793e"),
        (("nfc",), "\u304b\u3099 x\u00b2", "\u304c x\u00b2"),
        (("newlines",), "a\r\nb\rc", "a\nb\nc"),
        (
            ("control",),
            "a\x07b\ufeff\tc \U0001f469\u200d\U0001f680",
            "ab\tc \U0001f469\u200d\U0001f680",
        ),
        (("spaces",), "a  \n\n\n\nb \u3000", "a\n\nb"),
        (("spaces", "newlines"), "a \r\n\r\n\r\n\r\nb", "a\n\nb"),
    ],
)
def test_normalisation_does_what_is_asked_and_nothing_else(
    tmp_path: Path, steps: tuple[str, ...], before: str, after: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [before, "plain"])
    texts, tally = read(path, normalise=steps)
    assert texts == [after, "plain"]
    assert tally.notes.total() == (0 if before == after else len(steps))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"template": "{a"}, "template is not a template"),
        ({"template": "no field"}, "template names no field"),
        ({"normalise": ["nfc", "nfkc"]}, "normalise lists nfc and nfkc"),
        ({"normalise": ["nfd"]}, "normalise.* must be one of"),
        ({"dataset": "x/y"}, "dataset is given, but only format: huggingface"),
        ({"split": "test"}, "split is given, but only format: huggingface"),
        ({"format": "build", "path": "nowhere"}, "path is 'nowhere', which is no folder"),
        ({"path": "a.parquet.gz"}, "matches no file"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = {
        "name": "a",
        "language": "en",
        "domain": "web",
        "path": "a.jsonl",
        "weight": 1.0,
    } | keys
    (tmp_path / "mix.yaml").write_text(f"seq_len: 64\nseed: 1\nsources: [{json.dumps(source)}]\n")
    with pytest.raises(ConfigError, match=message):
        load_mix(tmp_path / "mix.yaml")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("{en: {min_share: 0.25}}", r"languages.en.min_share is 0.25, but the weights give en 0.2"),
        ("{ja: {max_share: 0.5}}", r"languages.ja.max_share is 0.5, but the weights give ja 0.8"),
        ("{fr: {min_share: 0.1}}", r"languages.fr.min_share is 0.1, but the weights give fr 0"),
        ("{en: {min_share: 0.5, max_share: 0.1}}", "No mix can meet both"),
        ("{english: {min_share: 0.1}}", "languages.english is not a known language"),
    ],
)
def test_floors_and_ceilings_are_held_when_the_mix_is_read(
    tmp_path: Path, limits: str, message: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "mix.yaml").write_text(
        f"seq_len: 64\nseed: 1\nlanguages: {limits}\nsources:\n"
        "  - {name: a, language: ja, domain: web, path: a.jsonl, weight: 0.8}\n"
        "  - {name: b, language: en, domain: web, path: a.jsonl, weight: 0.2}\n"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        load_mix(tmp_path / "mix.yaml")
    assert caught.value.exit_code == 78
