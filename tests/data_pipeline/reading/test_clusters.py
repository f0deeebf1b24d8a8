"""A build knows which held-out documents belong together, and nothing of what they are named by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipeline.build.build import build
from data_pipeline.build.origin import build_rules
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import DataError
from data_pipeline.reading.clusters import NO_CLUSTER, cluster_of, first_of_cluster, host_of

HOSTS = ("a.example", "b.example", "c.example")
NUM_DOCUMENTS = 60


def records() -> list[dict[str, Any]]:
    """Return texts of three sites by turns; every fifth text has no address."""
    found = []
    for number in range(NUM_DOCUMENTS):
        text = f"Document {number} tells of the number {number * 7919} and of nothing else."
        url = f"https://{HOSTS[number % 3]}/page/{number}"
        found.append({"text": text, "url": None if number % 5 == 0 else url})
    return found


def write_mix(folder: Path, path: str, **source: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"name": "web", "language": "en", "domain": "web", "path": path, "weight": 1.0}
    mix: dict[str, Any] = {"seq_len": 32, "seed": 1, "near_duplicates": 0}
    mix |= {"decontaminate_tokens": 0, "guard": {"min_documents": 1, "min_tokens": 1}}
    mix["sources"] = [{**entry, "held_out_share": 0.5, **source}]
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    return folder / "mix.yaml"


def built_from(mix_file: Path) -> BuiltData:
    out = mix_file.parent / "built"
    build(load_mix(mix_file), out, progress=False)
    return BuiltData.open(out)


def numbers_of(built: BuiltData) -> list[int]:
    """Return the number that each held-out document tells of."""
    from data_pipeline.text.tokenizer import encoding

    (domain,) = built.held_out
    numbers = []
    for document in range(domain.num_documents):
        last = int(domain.document_tokens[document]) - 1
        tokens, _ = domain.tokens_and_loss(document, 0, last)
        numbers.append(int(encoding().decode(tokens.tolist()).split()[1]))
    return numbers


def write_input(folder: Path, file_format: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if file_format == "parquet":
        pq.write_table(pa.Table.from_pylist(records()), folder / "web.parquet")
        return "web.parquet"
    lines = [json.dumps(record) + "\n" for record in records()]
    (folder / "web.jsonl").write_text("".join(lines))
    return "web.jsonl"


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_documents_of_one_host_are_one_cluster(tmp_path: Path, file_format: str) -> None:
    path = write_input(tmp_path, file_format)
    built = built_from(write_mix(tmp_path, path, cluster_by="url"))
    (domain,) = built.held_out
    numbers = numbers_of(built)
    assert len(numbers) > 15
    for one, cluster in zip(numbers, domain.document_clusters, strict=True):
        for other, other_cluster in zip(numbers, domain.document_clusters, strict=True):
            has_hosts = one % 5 != 0 and other % 5 != 0
            belong_together = one == other or (has_hosts and one % 3 == other % 3)
            assert (cluster == other_cluster) == belong_together
    without = sum(number % 5 == 0 for number in range(NUM_DOCUMENTS))
    assert built.manifest.sources[0].notes == {"document without 'url' (cluster_by)": without}


def test_documents_of_one_folder_or_file_are_one_cluster(tmp_path: Path) -> None:
    for number, record in enumerate(records()):
        folder = tmp_path / "in" / HOSTS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(record["text"])
    by_folder = built_from(write_mix(tmp_path, "in/*/*.txt", cluster_by="folder"))
    assert len(set(by_folder.held_out[0].document_clusters.tolist())) == 3
    other = tmp_path / "files"
    mix_file = write_mix(other, str(tmp_path / "in/*/*.txt"), cluster_by="file")
    by_file = built_from(mix_file).held_out[0]
    assert len(set(by_file.document_clusters.tolist())) == by_file.num_documents


def test_build_without_clusters_and_a_build_from_before_have_documents_of_their_own(
    tmp_path: Path,
) -> None:
    built = built_from(write_mix(tmp_path, write_input(tmp_path, "jsonl")))
    (domain,) = built.held_out
    assert domain.document_clusters.tolist() == list(range(domain.num_documents))
    assert not list(built.directory.rglob("clusters.npy"))


def test_rules_of_keys_belong_to_the_fingerprint_of_sources_that_name_one(tmp_path: Path) -> None:
    path = write_input(tmp_path, "jsonl")
    (without,) = build_rules(load_mix(write_mix(tmp_path, path)))["sources"]
    (by_key,) = build_rules(load_mix(write_mix(tmp_path, path, cluster_by="url")))["sources"]
    (by_file,) = build_rules(load_mix(write_mix(tmp_path, path, cluster_by="file")))["sources"]
    assert "cluster_by" not in without and by_file == {**without, "cluster_by": "file"}
    assert by_key == {**without, "cluster_by": "url", "cluster_rules": 2}


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_whole_numbers_name_clusters(tmp_path: Path, file_format: str) -> None:
    rows = []
    for number, record in enumerate(records()):
        rows.append({"text": record["text"], "site_id": number % 3 + 7})
    if file_format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "web.parquet")
    else:
        (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = built_from(write_mix(tmp_path, f"web.{file_format}", cluster_by="site_id"))
    assert built.manifest.sources[0].notes == {}
    assert len(set(built.held_out[0].document_clusters.tolist())) == 3


@pytest.mark.parametrize("value", [None, " ", float("nan"), ["a"], {"a": 1}])
def test_what_names_nothing_gives_no_cluster(value: Any) -> None:
    assert cluster_of("site", "", {"site": value}) == NO_CLUSTER


def test_a_number_and_its_text_name_one_cluster() -> None:
    found = {cluster_of("site", "", {"site": value}) for value in (3, 3.0, "3", " 3 ")}
    assert len(found) == 1 and NO_CLUSTER not in found
    assert cluster_of("site", "", {"site": 0}) != NO_CLUSTER


def test_equal_documents_give_an_equal_build_wherever_they_lie(tmp_path: Path) -> None:
    hashes = []
    for name in ("here", "there"):
        folder = tmp_path / name
        mix_file = write_mix(folder, write_input(folder, "jsonl"), cluster_by="file")
        hashes.append(built_from(mix_file).manifest.hash)
    assert hashes[0] == hashes[1]


def test_clusters_that_do_not_fit_the_documents_are_refused(tmp_path: Path) -> None:
    built = built_from(write_mix(tmp_path, write_input(tmp_path, "jsonl"), cluster_by="url"))
    (path,) = built.directory.rglob("clusters.npy")
    np.save(path, np.array([0, 5], dtype=np.int64))
    with pytest.raises(DataError, match=r"clusters\.npy"):
        BuiltData.open(built.directory, verify=False)


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("https://Example.org:443/a?b", "example.org"),
        ("package-name", "package-name"),
        ("http://[broken", "http://[broken"),
    ],
)
def test_host_of_a_url_and_any_other_value_name_a_cluster(value: str, host: str) -> None:
    assert host_of(value) == host


def test_first_of_a_cluster_is_found_and_others_stay_alone() -> None:
    a = cluster_of("url", "", {"url": "a"})
    b = cluster_of("url", "", {"url": "b"})
    assert cluster_of("url", "", {"url": " "}) == cluster_of(None, "f", {}) == NO_CLUSTER
    hashes = np.array([NO_CLUSTER, a, b, NO_CLUSTER, a], dtype=np.uint64)
    assert first_of_cluster(hashes).tolist() == [0, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "text", "cluster_by": "url"}, "has no such key"),
        ({"format": "mock", "cluster_by": "file"}, "has no files"),
    ],
)
def test_cluster_that_a_format_cannot_have_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = write_input(tmp_path, "jsonl")
    with pytest.raises(Exception, match=told):
        load_mix(write_mix(tmp_path, path, **changes))
