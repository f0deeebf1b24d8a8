"""A build reads what it hashed: files that are written to meanwhile are refused; hashes are noted.

The writer stands at a named place of the build, so nothing here depends on timing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.build import build as build_module
from data_pipeline.build.build import build, build_share
from data_pipeline.build.origin import fingerprint
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.errors import DataError
from data_pipeline.parts import part as part_module
from data_pipeline.reading import input_files, stored_rows
from data_pipeline.reading.input_files import HashNotes, read_inputs
from data_pipeline.store.file_states import settled_state_of, state_of
from data_pipeline.store.files import PARTIAL_SUFFIX
from data_pipeline.store.verification import NOTE_FILE
from tests.data_pipeline.inputs import MakeMix, make_texts, write_jsonl

TEXTS = {"en": make_texts(30, "en"), "ja": make_texts(30, "ja")}


def rewrite(path: Path) -> None:
    """Write other content of the same size into a file, and put its time of modification back."""
    before = path.stat()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content.replace(b"river", b"stone"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.read_bytes() != content


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "one more document"}\n')


def replace(path: Path) -> None:
    """Put another file of the same size and time in the place of one."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"river", b"stone"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def once(action: Callable[[], None]) -> Callable[[], None]:
    """Return a function whose first call does something."""
    waiting = [action]

    def act() -> None:
        if waiting:
            waiting.pop()()

    return act


def write_between(monkeypatch: pytest.MonkeyPatch, moment: str, write: Callable[[], None]) -> None:
    """Let a writer act at a moment of the next build."""
    act = once(write)
    if moment == "after the fingerprint":
        original = build_module.read_origin

        def read_and_write(*arguments: Any, **keys: Any) -> Any:
            origin = original(*arguments, **keys)
            act()
            return origin

        monkeypatch.setattr(build_module, "read_origin", read_and_write)
        return
    documents = part_module.read_documents

    def write_and_read(*arguments: Any) -> Any:
        for number, document in enumerate(documents(*arguments)):
            if number == 3:
                act()
            yield document

    monkeypatch.setattr(part_module, "read_documents", write_and_read)


@pytest.mark.parametrize("moment", ["after the fingerprint", "while a unit is read"])
@pytest.mark.parametrize("write", [rewrite, append, replace])
def test_a_file_that_is_written_to_during_a_build_is_refused(
    make_mix: MakeMix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    write: Callable[[Path], None],
) -> None:
    mix = make_mix(TEXTS)
    path = tmp_path / "in" / "en.jsonl"
    write_between(monkeypatch, moment, lambda: write(path))
    with pytest.raises(DataError, match=r"en.jsonl: changed while the build .* source 'en'"):
        build(mix, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # the next build is that of the file as it is now
    made = build(mix, tmp_path / "out", progress=False)
    assert made.hash == build(mix, tmp_path / "again", progress=False).hash


def test_a_file_that_only_gets_another_link_or_mode_is_no_other_file(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make_mix(TEXTS)
    expected = build(mix, tmp_path / "undisturbed", progress=False).hash
    path = tmp_path / "in" / "en.jsonl"
    before = settled_state_of(path)

    def link() -> None:
        os.link(path, tmp_path / "linked")
        path.chmod(0o600)
        assert state_of(path) != before

    write_between(monkeypatch, "while a unit is read", link)
    assert build(mix, tmp_path / "out", progress=False).hash == expected


def mix_over_a_folder(tmp_path: Path, make_mix: MakeMix) -> tuple[MixConfig, Path]:
    """Return a mix whose only source is a glob over three files, and their folder."""
    folder = tmp_path / "in" / "many"
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", make_texts(20, f"x{number}"))
    return make_mix({"en": ["unused"]}, sources={"en": {"path": "many/*.jsonl"}}), folder


@pytest.mark.parametrize("share", [False, True], ids=["build", "share"])
def test_a_file_that_goes_away_after_the_fingerprint_is_refused(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    mix, folder = mix_over_a_folder(tmp_path, make_mix)
    write_between(monkeypatch, "after the fingerprint", (folder / "1.jsonl").unlink)
    with pytest.raises(DataError, match=r"1\.jsonl: cannot be read: No such file"):
        build_share(mix, tmp_path / "out", 0, 1) if share else build(mix, tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [False, True], ids=["build", "share"])
def test_a_file_that_appears_after_the_fingerprint_is_in_no_part(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    mix, folder = mix_over_a_folder(tmp_path, make_mix)
    expected = build(mix, tmp_path / "undisturbed", progress=False)
    late = folder / "0a.jsonl"  # between others, so that it would move their numbers
    write_between(
        monkeypatch, "after the fingerprint", lambda: write_jsonl(late, make_texts(5, "late"))
    )
    if share:
        build_share(mix, tmp_path / "out", 0, 1)
        late.unlink()
    assert build(mix, tmp_path / "out", progress=False).hash == expected.hash


def stored_mix(tmp_path: Path, make_mix: MakeMix, kind: str) -> tuple[MixConfig, Path]:
    """Return a mix over a dataset or an earlier build, and the largest file that it reads."""
    if kind == "build":
        build(make_mix({"en": TEXTS["en"]}), tmp_path / "stored", progress=False)
    else:
        import datasets

        made = datasets.Dataset.from_dict({"text": TEXTS["en"]})
        made.save_to_disk(str(tmp_path / "stored"))
    source = {"name": "s", "language": "en", "domain": "web", "format": kind, "weight": 1.0}
    content = {"seq_len": 32, "seed": 1, "near_duplicates": 0, "decontaminate_tokens": 0}
    (tmp_path / "stored.yaml").write_text(
        yaml.safe_dump({**content, "sources": [source | {"path": "stored"}]})
    )
    files = [path for path in (tmp_path / "stored").rglob("*") if path.is_file()]
    return load_mix(tmp_path / "stored.yaml"), max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("kind", ["huggingface", "build"])
def test_a_dataset_or_build_that_is_written_to_while_it_is_read_is_refused(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    mix, path = stored_mix(tmp_path, make_mix, kind)

    def write() -> None:
        status = path.stat()
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    write_between(monkeypatch, "while a unit is read", write)
    with pytest.raises(DataError, match=rf"{path.name}: changed while the build"):
        build(mix, tmp_path / "out", progress=False)


def test_a_copy_of_a_build_has_the_fingerprint_of_the_build_whatever_was_verified(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    mix, _ = stored_mix(tmp_path, make_mix, "build")
    of_build = fingerprint(mix)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "stored", copy)
    note = copy / NOTE_FILE
    note.write_text("{}")
    (copy / f".{NOTE_FILE}.0{PARTIAL_SUFFIX}").touch()
    other = dataclasses.replace(mix, sources=(dataclasses.replace(mix.sources[0], path=str(copy)),))
    assert fingerprint(other) == of_build
    # the reading of the copy writes a note while the build is at work
    first = build(other, tmp_path / "first", progress=False)
    assert note.read_text() != "{}"
    assert build(other, tmp_path / "second", progress=False).hash == first.hash
    (copy / "en" / NOTE_FILE).touch()  # no note there, so it is a file like any other
    assert fingerprint(other) != of_build


def test_files_of_the_hub_cache_are_watched_like_others(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix, path = stored_mix(tmp_path, make_mix, "huggingface")
    (source,) = mix.sources
    hub = dataclasses.replace(source, path=None, dataset="lab/texts", revision="0" * 40)
    stored = stored_rows._dataset(source)
    monkeypatch.setattr(stored_rows, "_dataset", lambda source: stored)
    write_between(monkeypatch, "while a unit is read", lambda: os.utime(path))
    with pytest.raises(DataError, match=rf"{path.name}: changed while the build"):
        build(dataclasses.replace(mix, sources=(hub,)), tmp_path / "out", progress=False)


class Forgetful(dict[Path, Any]):
    """The memory of a process that has just started, whenever it is asked."""

    def get(self, key: Path, default: Any = None) -> Any:
        return default


def counted_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that takes the path of every file that is hashed, as in a new process."""
    hashed: list[Path] = []
    original = input_files.xxh3_of

    def count(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(input_files, "file_hash", count)
    monkeypatch.setattr(input_files, "_HASHED_HERE", Forgetful())
    return hashed


def test_notes_spare_the_reading_of_all_files_that_did_not_change(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make_mix(TEXTS)
    hashed = counted_hashing(monkeypatch)
    expected = fingerprint(mix)
    assert len(hashed) == 2
    assert fingerprint(mix, notes=HashNotes(tmp_path / "notes")) == expected
    assert len(hashed) == 4
    assert fingerprint(mix, notes=HashNotes(tmp_path / "notes")) == expected
    assert len(hashed) == 4
    rewrite(tmp_path / "in" / "en.jsonl")
    changed = fingerprint(mix, notes=HashNotes(tmp_path / "notes"))
    assert hashed[4:] == [tmp_path / "in" / "en.jsonl"] and changed != expected
    assert changed == fingerprint(mix)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}', '{"folder": "/x", "files": {}}'])
def test_damaged_notes_only_cost_time(
    make_mix: MakeMix, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make_mix(TEXTS)
    expected = fingerprint(mix, notes=HashNotes(tmp_path / "notes"))
    for path in (tmp_path / "notes").iterdir():
        path.write_text(content)
    monkeypatch.setattr(input_files, "_HASHED_HERE", {})
    assert fingerprint(mix, notes=HashNotes(tmp_path / "notes")) == expected


def test_a_hash_that_was_damaged_in_its_note_is_not_believed(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make_mix(TEXTS)
    expected = fingerprint(mix, notes=HashNotes(tmp_path / "notes"))
    (note,) = (tmp_path / "notes").glob("*.json")
    content = json.loads(note.read_text())
    values = content["files"]["en.jsonl"]
    values[-1] = f"{int(values[-1], 16) ^ 1:032x}"
    note.write_text(json.dumps(content))
    hashed = counted_hashing(monkeypatch)
    assert fingerprint(mix, notes=HashNotes(tmp_path / "notes")) == expected
    assert len(hashed) == 2


def test_much_input_is_hashed_by_workers_under_a_lock_with_the_same_result(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        write_jsonl(tmp_path / "in" / "many" / f"{number}.jsonl", make_texts(3, f"x{number}"))
    mix = make_mix({"en": ["unused"]}, sources={"en": {"path": "many/*.jsonl"}})
    expected = read_inputs(mix.sources)
    monkeypatch.setattr(input_files, "SPREAD_BYTES", 1)
    monkeypatch.setattr(input_files, "_BATCH_FILES", 2)
    monkeypatch.setattr(input_files, "_HASHED_HERE", {})
    with LocalExecutor(2) as executor:
        assert read_inputs(mix.sources, executor, HashNotes(tmp_path / "notes")) == expected
    assert (tmp_path / "notes" / ".lock").exists()


def test_whoever_waits_for_the_lock_finds_the_hashes_of_who_held_it(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the other process hashes the input while this one waits for the lock
    mix = make_mix(TEXTS)
    monkeypatch.setattr(input_files, "SPREAD_BYTES", 1)
    hashed = counted_hashing(monkeypatch)
    original = input_files._alone

    def wait(notes: HashNotes) -> Any:
        monkeypatch.setattr(input_files, "_alone", original)
        read_inputs(mix.sources, notes=HashNotes(notes.folder))
        return original(notes)

    monkeypatch.setattr(input_files, "_alone", wait)
    read_inputs(mix.sources, notes=HashNotes(tmp_path / "notes"))
    assert len(hashed) == 2


def test_hashes_survive_a_folder_of_notes_that_cannot_be_written(
    make_mix: MakeMix,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mix = make_mix(TEXTS)
    (tmp_path / "file").touch()
    notes = HashNotes(tmp_path / "file" / "notes")
    monkeypatch.setattr(input_files, "_HASHED_HERE", {})
    assert fingerprint(mix, notes=notes) == fingerprint(mix)
    assert "hashes of the input cannot be noted" in caplog.text
