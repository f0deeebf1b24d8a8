"""Every shipped mix can be read once its corpora are there, and its shares are those that its
comments promise.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipeline.build.build import build
from data_pipeline.build.self_replay import write_sidecar
from data_pipeline.config.schema import MixConfig, load_mix
from tests.data_pipeline.inputs import make_texts

ROOT = Path(__file__).parents[3]
TEMPLATES = ("swallow_like", "gpt-oss-20b", "gpt-oss-120b")


@pytest.fixture
def load_template(tmp_path: Path) -> Callable[[str], MixConfig]:
    """Loads a shipped template with small corpora where its paths point."""

    def load(name: str) -> MixConfig:
        path = tmp_path / "configs" / "mixes" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        shutil.copy(ROOT / "configs" / "mixes" / f"{name}.yaml", path)
        for source in yaml.safe_load(path.read_text())["sources"]:
            texts = make_texts(30, source["name"])
            records: list[dict[str, Any]]
            records = [
                {key: text for key in ("text", "title", "content", "en", "ja")} for text in texts
            ]
            if source.get("format") == "harmony":
                answer = {"role": "assistant", "content": "yes"}
                records = [
                    {"messages": [{"role": "user", "content": text}, answer]} for text in texts
                ]
            corpus = path.parent / source["path"].replace("*", "part")
            _write(corpus, records)
            if source.get("kind") == "self_replay":
                write_sidecar(corpus.parent, "0" * 32, {}, [corpus.name])
        return load_mix(path)

    return load


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_bytes(content)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        datasets.Dataset.from_list(records).save_to_disk(str(path))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_reads_and_builds_once_its_corpora_are_there(
    load_template: Callable[[str], MixConfig], tmp_path: Path, name: str
) -> None:
    mix = load_template(name)
    guard = dataclasses.replace(
        mix.guard, min_documents=1, min_tokens=1
    )  # there are 30 short texts a source
    lenient = dataclasses.replace(
        mix, near_duplicates=0.0, decontaminate_tokens=0, guard=guard
    )  # and near copies
    manifest = build(lenient, tmp_path / "out", progress=False)
    assert all(entry.documents >= 28 for entry in manifest.sources)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_its_corpora_says_what_is_missing(name: str) -> None:
    with pytest.raises(Exception, match=r"ja_web/\*.jsonl.zst', which matches no file"):
        load_mix(ROOT / "configs" / "mixes" / f"{name}.yaml")


def test_shares_are_those_that_the_comments_promise(
    load_template: Callable[[str], MixConfig],
) -> None:
    mix = load_template("swallow_like")
    shares: dict[str, float] = {}
    for source in mix.sources:
        shares[source.language] = shares.get(source.language, 0) + source.weight
    assert shares["ja"] == pytest.approx(0.54) and shares["en"] + shares["math"] == pytest.approx(
        0.296
    )
    assert shares["code"] == pytest.approx(0.16, abs=0.0005) and shares[
        "parallel"
    ] == pytest.approx(0.0044)
    assert not any(source.normalise for source in mix.sources if source.language != "ja")
