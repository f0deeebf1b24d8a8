"""A build is hashed once; then its note saves it, for as long as no file was written to."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from data_pipeline.build.build import build, build_share
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import DataError
from data_pipeline.store import verification
from data_pipeline.store.manifest import BuildManifest, read_manifest
from data_pipeline.store.verification import NOTE_FILE, check_files, inspect
from tests.data_pipeline.inputs import MakeMix, make_texts

SHARD = Path("en") / "documents-00000.tokens"


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    return make_mix({"en": make_texts(30, "e"), "ja": make_texts(20, "j")}, held_out_share=0.2)


@pytest.fixture
def built(mix: MixConfig, tmp_path: Path) -> Path:
    build(mix, tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []
    sha256_of = verification.sha256_of

    def recorded(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(verification, "sha256_of", recorded)
    return names


def manifest_of(directory: Path) -> BuildManifest:
    return read_manifest(directory)


def flip_last_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_build_leaves_a_note_and_nothing_is_hashed_again(built: Path, hashed: list[str]) -> None:
    assert inspect(built, manifest_of(built)).unverified == []
    BuiltData.open(built)
    assert hashed == []


def test_build_without_a_note_is_hashed_once(built: Path, hashed: list[str]) -> None:
    (built / NOTE_FILE).unlink()
    for _ in range(2):
        BuiltData.open(built)
    assert len(hashed) == len(manifest_of(built).files)
    hashed.clear()
    BuiltData.open(built)
    assert hashed == []


@pytest.mark.case("B10", "damage after a verification is found, with its time put back, too")
def test_file_that_is_written_to_is_refused_though_size_and_time_are_those_of_before(
    built: Path,
) -> None:
    path = built / SHARD
    before = path.stat()
    flip_last_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"documents-00000\.tokens: content differs"):
        BuiltData.open(built)


def test_file_that_was_only_touched_is_hashed_alone_and_noted_anew(
    built: Path, hashed: list[str]
) -> None:
    (built / SHARD).touch()
    for _ in range(2):
        BuiltData.open(built)
    assert hashed == [SHARD.name]


def test_copy_of_a_build_is_hashed_whole(built: Path, tmp_path: Path, hashed: list[str]) -> None:
    shutil.copytree(built, tmp_path / "copy")
    BuiltData.open(tmp_path / "copy")
    assert len(hashed) == len(manifest_of(built).files)


def test_shard_that_gets_another_name_is_not_hashed_again(
    built: Path, tmp_path: Path, hashed: list[str]
) -> None:
    os.link(built / SHARD, tmp_path / "shared.tokens")
    BuiltData.open(built)
    assert hashed == []


FACTS = '{"manifest": "%s", "files": {"a": %s}}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"manifest": 1}',
        FACTS % ("HASH", "[1]"),
        FACTS % ("HASH", "[1, 2, 3, null]"),
        FACTS % ("HASH", "[1, 2, 3, 1e999]"),
        FACTS % ("HASH", "[1, 2, 3, -Infinity]"),
    ],
)
def test_damaged_note_only_costs_a_verification(
    built: Path, content: str, hashed: list[str]
) -> None:
    content = content.replace("HASH", manifest_of(built).hash)
    (built / NOTE_FILE).write_text(content)
    BuiltData.open(built)
    assert hashed
    note = json.loads((built / NOTE_FILE).read_text())
    assert note["manifest"] == manifest_of(built).hash


def test_note_of_another_build_is_not_believed(built: Path, hashed: list[str]) -> None:
    path = built / NOTE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "manifest": "0" * 64}))
    BuiltData.open(built)
    assert len(hashed) == len(manifest_of(built).files)


def test_shard_that_changed_between_its_hash_and_the_end_of_the_build_is_not_noted(
    mix: MixConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build_share(mix, out, 0, 1)
    (shard,) = tmp_path.rglob(str(SHARD))
    time.sleep(0.02)  # the clock of a file system has ticks
    flip_last_byte(shard)
    build(mix, out, progress=False)
    assert inspect(out, manifest_of(out)).unverified == [str(SHARD)]
    with pytest.raises(DataError, match=r"documents-00000\.tokens: content differs"):
        check_files(out, manifest_of(out), verify=True)


def test_note_that_is_being_written_is_no_extra_file(built: Path) -> None:
    (built / f".{NOTE_FILE}.0123456789abcdef.partial").touch()
    BuiltData.open(built)
