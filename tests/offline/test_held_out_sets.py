"""Held-out text comes from a build, which needs no raw files and may be older than its mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cpt.errors import ConfigError
from cpt.offline.model import held_out_sets
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData


@pytest.fixture
def mix_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a mix with a source that holds out half of its documents."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"Text number {number}."}) for number in range(40)]
    (tmp_path / "web.jsonl").write_text("\n".join(lines) + "\n")
    source = {"name": "web", "language": "en", "domain": "web", "path": "web.jsonl", "weight": 1.0}
    mix = {"seq_len": 64, "seed": 1, "near_duplicates": 0, "decontaminate_tokens": 0}
    mix |= {"guard": {"min_tokens": 1}, "sources": [source | {"held_out_share": 0.5}]}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    return tmp_path / "mix.yaml"


@pytest.mark.parametrize("named", [True, False])
def test_a_whole_build_is_scored_without_its_raw_files(mix_file: Path, named: bool) -> None:
    folder = Path("built") if named else Path("data") / "mix-0123456789"
    build_dir = folder if named else None
    build(load_mix(mix_file), folder, progress=False)
    (mix_file.parent / "web.jsonl").unlink()
    assert [found.name for found in held_out_sets(mix_file, build_dir, 100)] == ["web"]


def test_one_document_of_a_cluster_is_scored_as_the_others_say_little_more(mix_file: Path) -> None:
    """Of 40 texts of 8 sites half are held out; intervals take those that are scored for
    independent ones.
    """
    lines = []
    for number in range(40):
        lines.append(
            json.dumps({"text": f"Text number {number}.", "site": f"{number % 8}.example"})
        )
    (mix_file.parent / "web.jsonl").write_text("\n".join(lines) + "\n")
    mix = yaml.safe_load(mix_file.read_text())
    mix["sources"][0]["cluster_by"] = "site"
    mix_file.write_text(yaml.safe_dump(mix))
    build(load_mix(mix_file), Path("built"), progress=False)
    (held_out,) = BuiltData.open(Path("built"), verify=False).held_out
    num_clusters = len(set(held_out.document_clusters.tolist()))
    assert 1 < num_clusters < held_out.num_documents
    (scored,) = held_out_sets(mix_file, Path("built"), 100)
    drawn = held_out.document_clusters[scored.documents].tolist()
    assert len(set(drawn)) == len(drawn) == num_clusters
    (fewer,) = held_out_sets(mix_file, Path("built"), 2)
    assert fewer.documents.tolist() == scored.documents[:2].tolist()


def test_a_build_in_data_is_found_whatever_its_folder_is_called(mix_file: Path) -> None:
    build(load_mix(mix_file), Path("data") / "by-hand", progress=False)
    assert [found.name for found in held_out_sets(mix_file, None, 100)] == ["web"]
    (mix_file.parent / "web.jsonl").write_text(json.dumps({"text": "Other text."}) + "\n")
    with pytest.raises(ConfigError, match=r"is not built in data/mix-[0-9a-f]{10}"):
        held_out_sets(mix_file, None, 100)


def test_without_files_and_build_the_files_are_missing(mix_file: Path) -> None:
    (mix_file.parent / "web.jsonl").unlink()
    with pytest.raises(ConfigError, match="matches no file"):
        held_out_sets(mix_file, None, 100)


def test_a_build_of_another_mix_is_scored_with_a_warning(
    mix_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(load_mix(mix_file), Path("built"), progress=False)
    caplog.clear()
    held_out_sets(mix_file, Path("built"), 100)
    assert not caplog.records
    mix_file.write_text(mix_file.read_text().replace("near_duplicates: 0", "near_duplicates: 0.7"))
    assert held_out_sets(mix_file, Path("built"), 100)
    assert "near_duplicates: 0.0 in the build, 0.7 in the mix" in caplog.text
