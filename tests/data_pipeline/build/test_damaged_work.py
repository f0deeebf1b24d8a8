"""Damaged builds and damaged unfinished work end in a message with a code, never in a trace."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_pipeline.build import build as build_module
from data_pipeline.build.build import build, build_share
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import EXIT_INTERNAL, DataError, explain
from data_pipeline.parts import part_cache
from data_pipeline.parts.part import Account, Part
from data_pipeline.reading import stored_rows
from data_pipeline.store.files import PARTIAL_SUFFIX
from data_pipeline.store.verification import NOTE_FILE
from tests.data_pipeline.inputs import MakeMix, make_texts

DAMAGES = ("flip", "cut", "empty", "garbage", "delete", "folder", "list")


def damage(path: Path, how: str, chance: random.Random) -> None:
    """Damage one file."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "folder":
        path.mkdir()
    if how in ("delete", "folder"):
        return
    if how == "flip":
        for _ in range(3):
            data[chance.randrange(min(len(data), 300))] ^= chance.randint(1, 255)
    contents = {
        "flip": bytes(data),
        "cut": bytes(data[: chance.randrange(len(data))]),
        "empty": b"",
        "garbage": chance.randbytes(200),
        "list": b"[1]",
    }
    path.write_bytes(contents[how])


def files_of(folder: Path) -> list[Path]:
    """Return the files of the mix and of one of its sources; those of the other are the same kinds.

    Files that hold nothing are left out, and the note, which only saves a verification.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if "en" in path.relative_to(folder).parts or path.name == NOTE_FILE:
            continue
        if path.is_file() and path.stat().st_size:
            found.append(path)
    return found


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    texts = {"ja": make_texts(30, "ja"), "en": make_texts(30, "en", 10)}
    return make_mix(texts, near_duplicates=0.99, held_out_share=0.2)


def test_parts_of_another_version_are_not_taken_from_unfinished_work(
    mix: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build(mix, tmp_path / "undisturbed", progress=False).hash
    build_share(mix, tmp_path / "out", 0, 1)
    made = []
    original = part_cache.make_part

    def make(part: Part) -> Account:
        made.append(part.source.name)
        return original(part)

    monkeypatch.setattr(part_cache, "make_part", make)
    monkeypatch.setattr(build_module, "VERSION", 10**6)
    with pytest.raises(DataError, match=r"or of another version\. Delete it first"):
        build_share(mix, tmp_path / "out", 0, 1)
    assert made == []
    assert build(mix, tmp_path / "out", progress=False).hash == expected
    assert made == ["ja", "en"]


def test_a_half_written_file_that_goes_while_leftovers_are_removed_ends_no_build(
    mix: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a task of a killed build may still be at work on another machine
    expected = build(mix, tmp_path / "undisturbed", progress=False).hash
    original = Path.rglob
    gone = []

    def list_and_rename(folder: Path, pattern: str) -> Iterator[Path]:
        if pattern == f".*{PARTIAL_SUFFIX}":
            half = folder / f".00000.{len(gone)}{PARTIAL_SUFFIX}"
            half.touch()
            for path in list(original(folder, pattern)):
                path.unlink()
                gone.append(path)
                yield path
        else:
            yield from original(folder, pattern)

    monkeypatch.setattr(Path, "rglob", list_and_rename)
    assert build(mix, tmp_path / "out", progress=False).hash == expected
    assert gone


def outcome(mix: MixConfig, out: Path) -> int:
    """Build, and return the exit code that the command would end with."""
    try:
        build(mix, out, progress=False)
    except Exception as error:
        explained = explain(error)
        return EXIT_INTERNAL if explained is None else explained[1]
    return 0


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_unfinished_work_is_made_again_or_told(
    how: str, mix: MixConfig, tmp_path: Path
) -> None:
    build_share(mix, tmp_path / "first" / "out", 0, 1)
    files = files_of(tmp_path / "first")
    assert len(files) >= 5
    for number, path in enumerate(files):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "first", folder)
        damage(folder / path.relative_to(tmp_path / "first"), how, random.Random(number))
        assert outcome(mix, folder / "out") in (0, 65, 74)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_build_is_refused_by_all_that_read_it(
    how: str, mix: MixConfig, tmp_path: Path
) -> None:
    build(mix, tmp_path / "first", progress=False)
    source = {"name": "a", "language": "en", "domain": "web", "format": "build", "weight": 1.0}
    files = files_of(tmp_path / "first")
    assert len(files) >= 15
    for number, path in enumerate(files):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "first", folder)
        damage(folder / path.relative_to(tmp_path / "first"), how, random.Random(number))
        content = {"seq_len": 32, "seed": 1, "sources": [source | {"path": folder.name}]}
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(content))
        stored_rows._open_build.cache_clear()
        again = load_mix(tmp_path / "again.yaml")
        with pytest.raises(DataError, match=folder.name):
            build(again, tmp_path / f"again{number}", progress=False)
        with pytest.raises(DataError, match=folder.name):
            BuiltData.open(folder, mix=mix)
