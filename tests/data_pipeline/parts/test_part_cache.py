"""Parts are made once: other builds take them, whole and unchanged, and nothing else."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.build import build, build_share
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import ConfigError
from data_pipeline.parts import part_cache
from data_pipeline.parts.cache_folder import (
    CACHE_VARIABLE,
    default_cache,
    list_entries,
    open_cache,
    prune,
)
from data_pipeline.parts.part_cache import _DECIDED_LATER, ENTRY_FILE
from data_pipeline.parts.part_making import source_parts
from data_pipeline.reading import input_files
from data_pipeline.store.manifest import BuildManifest
from tests.data_pipeline.inputs import MakeMix, make_texts
from tests.support.other_users import ATTACKER, needs_root

ROOT = Path(__file__).parents[3]
TEXTS = {"ja": make_texts(40, "ja"), "en": make_texts(60, "en", 20)}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = open_cache(tmp_path)
    assert folder is not None
    return folder


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    return make_mix(TEXTS, held_out_share=0.1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that takes the source of every part that is made."""
    names: list[str] = []
    original = part_cache.make_part

    def make(part: Any) -> Any:
        names.append(part.source.name)
        return original(part)

    monkeypatch.setattr(part_cache, "make_part", make)
    return names


def built(mix: MixConfig, out: Path, cache: Path | None = None) -> BuildManifest:
    return build(mix, out, progress=False, cache_dir=cache)


def shard_of(directory: Path, source: str) -> Path:
    return directory / source / "documents-00000.tokens"


@pytest.mark.parametrize(
    "change",
    [
        lambda mix: dataclasses.replace(mix, seq_len=64),
        lambda mix: dataclasses.replace(mix, packing="concatenate"),
        lambda mix: dataclasses.replace(mix, decontaminate_tokens=50),
        lambda mix: with_source(mix, held_out_share=0.3),
        lambda mix: dataclasses.replace(with_source(mix, weight=0.0, epochs=2.0), seq_len=64),
        lambda mix: with_source(mix, name="renamed", language="zh", domain="other"),
        lambda mix: dataclasses.replace(mix, name="other", sources=mix.sources[::-1]),
    ],
    ids=["seq_len", "packing", "decontamination", "held_out_share", "epochs", "labels", "order"],
)
def test_what_is_decided_after_the_parts_takes_all_of_them(
    mix: MixConfig,
    tmp_path: Path,
    cache: Path,
    made: list[str],
    change: Callable[[MixConfig], MixConfig],
) -> None:
    built(mix, tmp_path / "first", cache)
    assert sorted(made) == ["en", "ja"]
    changed = change(mix)
    found = built(changed, tmp_path / "second", cache)
    assert sorted(made) == ["en", "ja"]
    assert found.hash == built(changed, tmp_path / "without").hash
    inode = shard_of(tmp_path / "first", "en").stat().st_ino
    assert shard_of(tmp_path / "second", "en").stat().st_ino == inode


def with_source(mix: MixConfig, **changes: Any) -> MixConfig:
    first = dataclasses.replace(mix.sources[0], **changes)
    return dataclasses.replace(mix, sources=(first, *mix.sources[1:]))


@pytest.mark.parametrize(
    "changes",
    [
        {"text_field": "title"},
        {"template": "{title}: {text}"},
        {"normalise": ("nfkc",)},
        {"cluster_by": "file"},
        {"cluster_by": "id"},
    ],
    ids=lambda changes: "-".join(map(str, changes)) + str(len(str(changes))),
)
def test_what_touches_the_text_makes_its_parts_anew(
    mix: MixConfig, tmp_path: Path, cache: Path, made: list[str], changes: dict[str, Any]
) -> None:
    built(mix, tmp_path / "first", cache)
    changed = with_source(mix, **changes)
    if changes.get("text_field") == "title":  # all titles are equal: one document is left
        changed = dataclasses.replace(
            with_source(mix, **changes, held_out_share=0.0), guard=mix.guard
        )
    made.clear()
    found = built(changed, tmp_path / "second", cache)
    assert made == ["ja"]
    assert found.hash == built(changed, tmp_path / "without").hash


def test_other_rules_of_keys_make_the_parts_anew_whose_clusters_keys_name(
    mix: MixConfig,
    tmp_path: Path,
    cache: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_key = with_source(mix, cluster_by="id")
    built(by_key, tmp_path / "first", cache)
    made.clear()
    monkeypatch.setattr(part_cache, "KEY_RULES_VERSION", 99)
    built(by_key, tmp_path / "second", cache)
    assert made == ["ja"]


def test_every_field_of_a_source_is_decided_later_or_belongs_to_the_part() -> None:
    names = {field.name for field in dataclasses.fields(SourceConfig)}
    assert names > _DECIDED_LATER
    # a change of these would give other files: they must never be added to the list
    assert not _DECIDED_LATER & {"format", "text_field", "template", "normalise", "cluster_by"}


def test_near_copies_need_signatures_so_their_parts_are_others(
    make_mix: MakeMix, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    built(make_mix(TEXTS), tmp_path / "first", cache)
    made.clear()
    signed = make_mix(TEXTS, near_duplicates=0.9)
    first = built(signed, tmp_path / "second", cache)
    assert sorted(made) == ["en", "ja"]
    made.clear()
    other = built(make_mix(TEXTS, near_duplicates=0.99), tmp_path / "third", cache)
    assert made == [] and other.fingerprint != first.fingerprint


def test_one_changed_file_among_many_is_the_only_one_that_is_made(
    make_mix: MakeMix, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    texts = {f"s{number}": make_texts(9, f"s{number}") for number in range(6)}
    built(make_mix(texts), tmp_path / "first", cache)
    made.clear()
    texts["s3"][4] += " changed"
    changed = make_mix(texts)
    found = built(changed, tmp_path / "second", cache)
    assert made == ["s3"]
    assert found.hash == built(changed, tmp_path / "without").hash


def test_a_corpus_that_was_moved_takes_its_parts_and_names_its_files_where_they_are(
    make_mix: MakeMix, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    texts = {"en": [*TEXTS["en"], ""]}
    built(make_mix(texts, max_reject_share=0.5), tmp_path / "first", cache)
    made.clear()
    moved = make_mix(texts, folder="moved", max_reject_share=0.001)
    with pytest.raises(Exception, match=r"moved/en.jsonl:61") as refusal:
        built(moved, tmp_path / "second", cache)
    assert made == [] and "in/en.jsonl" not in str(refusal.value)


def chat_mix(make_mix: MakeMix, words: list[int], seq_len: int) -> MixConfig:
    """Return a mix of conversations with so many words in their answers."""
    mix = make_mix(
        {"chat": ["unused"]},
        seq_len=seq_len,
        sources={"chat": {"format": "harmony"}},
        max_reject_share=0.9,
    )
    with mix.sources[0].files()[0].open("w") as file:
        for number, count in enumerate(words):
            answer = {"role": "assistant", "content": f"{number} " + "word " * count}
            messages = [{"role": "user", "content": "say it"}, answer]
            file.write(json.dumps({"messages": messages}) + "\n")
    return mix


def test_conversations_are_shared_by_all_rows_that_hold_them(
    make_mix: MakeMix, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    words = [10, 20, 30, 200]
    expected = {}
    for seq_len in (512, 1024, 128, 4096):
        mix = chat_mix(make_mix, words, seq_len)
        expected[seq_len] = built(mix, tmp_path / f"without{seq_len}").hash
    made.clear()
    for seq_len in (512, 1024, 128, 4096, 128):
        mix = chat_mix(make_mix, words, seq_len)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert built(mix, tmp_path / "out", cache).hash == expected[seq_len]
    # 512 makes it for all rows that are long enough, 128 leaves the long one out and makes its own
    assert made == ["chat", "chat"]


def test_a_build_that_leaves_long_conversations_out_is_taken_by_rows_of_its_length(
    make_mix: MakeMix, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    built(chat_mix(make_mix, [10, 20, 30, 200], 1024), tmp_path / "earlier")
    made.clear()
    source = {"format": "build", "path": str(tmp_path / "earlier")}
    hashes = set()
    for number in range(2):
        mix = make_mix({"chat": ["x"]}, sources={"chat": source}, seq_len=128, max_reject_share=0.9)
        hashes.add(built(mix, tmp_path / f"later{number}", cache).hash)
    assert made == ["chat"] and len(hashes) == 1


def entry_files(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "parts").rglob("*") if path.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


def cut(path: Path) -> None:
    replace(path, path.read_bytes()[:-2])


def replace(path: Path, content: bytes) -> None:
    """Write another file in the place of one, which keeps the builds that share it whole."""
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
def test_no_damaged_entry_gets_into_a_build(
    mix: MixConfig, tmp_path: Path, cache: Path, made: list[str], damage: Callable[[Path], None]
) -> None:
    expected = built(mix, tmp_path / "first", cache).hash
    num_files = len(entry_files(cache))
    assert num_files == 8
    for number in range(num_files):
        made.clear()
        damage(entry_files(cache)[number])
        assert built(mix, tmp_path / f"again{number}", cache).hash == expected
        assert len(made) == 1, "the damage was not noticed"
        assert len(entry_files(cache)) == num_files, "the entry was not repaired"


def file_for_entry(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("x")


def folder_for(name: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        (entry / name).unlink()
        (entry / name).mkdir()

    return damage


def link_for(name: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        moved = entry.parent.parent.parent / "moved"
        (entry / name).rename(moved)
        (entry / name).symlink_to(moved)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        file_for_entry,
        folder_for("hashes"),
        folder_for(ENTRY_FILE),
        link_for("documents.tokens"),
        link_for(ENTRY_FILE),
    ],
    ids=["file for entry", "folder for file", "folder for own", "link for file", "link for own"],
)
def test_an_entry_that_is_something_else_is_made_again(
    mix: MixConfig, tmp_path: Path, cache: Path, made: list[str], damage: Callable[[Path], None]
) -> None:
    expected = built(mix, tmp_path / "first", cache).hash
    damage(list_entries(cache)[0].path)
    made.clear()
    assert built(mix, tmp_path / "second", cache).hash == expected
    assert len(made) == 1
    assert len(list_entries(cache)) == 2
    assert built(mix, tmp_path / "third", cache).hash == expected
    assert len(made) == 1, "the entry was not repaired"
    assert not list((cache / "parts").rglob(".*"))


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: OSError) -> None:
    """Let the next call of a function fail."""
    original = getattr(owner, name)

    def fail(*arguments: Any, **keys: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        raise error

    monkeypatch.setattr(owner, name, fail)


def test_an_entry_that_cannot_be_read_is_made_again(
    mix: MixConfig,
    tmp_path: Path,
    cache: Path,
    made: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = built(mix, tmp_path / "first", cache).hash
    made.clear()
    error = OSError(errno.EIO, "Input/output error")
    fail_once(monkeypatch, part_cache, "sha256_of", error)
    assert built(mix, tmp_path / "second", cache).hash == expected
    assert len(made) == 1
    assert "damaged (Input/output error); the part is made again" in caplog.text


def test_a_full_disk_of_the_build_ends_it_and_costs_no_entry(
    mix: MixConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(mix, tmp_path / "first", cache)
    error = OSError(errno.ENOSPC, "No space left on device", "f")
    fail_once(monkeypatch, part_cache.os, "link", error)
    with pytest.raises(OSError, match="No space left"):
        built(mix, tmp_path / "second", cache)
    assert len(list_entries(cache)) == 2


def test_a_damaged_entry_is_told(
    mix: MixConfig, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(mix, tmp_path / "first", cache)
    flip(entry_files(cache)[0])
    built(mix, tmp_path / "second", cache)
    assert "damaged (" in caplog.text and "the part is made again" in caplog.text


def test_the_entry_of_another_part_is_not_taken(
    mix: MixConfig, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    expected = built(mix, tmp_path / "first", cache).hash
    one, other = sorted(path.parent for path in entry_files(cache) if path.name == ENTRY_FILE)
    shutil.rmtree(one)
    shutil.copytree(other, one)
    made.clear()
    assert built(mix, tmp_path / "second", cache).hash == expected
    assert len(made) == 1


def test_an_entry_that_goes_while_it_is_taken_is_made_again(
    mix: MixConfig,
    tmp_path: Path,
    cache: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = built(mix, tmp_path / "first", cache).hash
    shutil.rmtree(tmp_path / "first")
    made.clear()
    original = part_cache._take_files

    def prune_and_take(*arguments: Any) -> None:
        prune(cache, None, 0)
        original(*arguments)

    monkeypatch.setattr(part_cache, "_take_files", prune_and_take)
    assert built(mix, tmp_path / "second", cache).hash == expected
    assert sorted(made) == ["en", "ja"]


def test_where_links_are_not_possible_files_are_copied(
    mix: MixConfig, tmp_path: Path, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **keys: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(part_cache.os, "link", refuse)
    expected = built(mix, tmp_path / "first", cache).hash
    made.clear()
    assert built(mix, tmp_path / "second", cache).hash == expected and made == []
    shards = [shard_of(tmp_path / name, "en").stat() for name in ("first", "second")]
    assert shards[0].st_ino != shards[1].st_ino and shards[0].st_nlink == 1


def test_a_full_disk_of_the_cache_is_told_and_the_build_goes_on(
    mix: MixConfig,
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = part_cache.write_json

    def write(path: Path, value: Any) -> None:
        if path.name == ENTRY_FILE:
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, value)

    monkeypatch.setattr(part_cache, "write_json", write)
    found = built(mix, tmp_path / "first", cache)
    assert caplog.text.count("parts cannot be kept for other builds (No space left") == 1
    assert entry_files(cache) == []
    monkeypatch.undo()
    assert built(mix, tmp_path / "second", cache).hash == found.hash
    assert len(list_entries(cache)) == 2


@pytest.mark.parametrize("point", ["_keep_files", "_take_files", "sync_directory"])
def test_a_build_killed_anywhere_in_the_cache_leaves_it_whole(
    mix: MixConfig, tmp_path: Path, cache: Path, point: str
) -> None:
    expected = built(mix, tmp_path / "undisturbed").hash
    if point == "_take_files":
        built(mix, tmp_path / "first", cache)
    # the child kills itself with SIGKILL after the named step of the second part
    code = (
        "import os, sys; from pathlib import Path; from unittest import mock\n"
        "from data_pipeline.parts import part_cache\n"
        "from data_pipeline.build.build import build\n"
        "from data_pipeline.config.mix_file import load_mix\n"
        f"original = part_cache.{point}; calls = []\n"
        "def kill(*arguments):\n"
        "    result = original(*arguments); calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "    return result\n"
        f"with mock.patch('data_pipeline.parts.part_cache.{point}', kill):\n"
        "    build(load_mix(sys.argv[1]), sys.argv[2], progress=False,\n"
        "        cache_dir=Path(sys.argv[3]))\n"
    )
    command = [sys.executable, "-c", code]
    command += [str(tmp_path / "in" / "mix.yaml"), str(tmp_path / "out"), str(cache)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert built(mix, tmp_path / "out", cache).hash == expected
    assert built(mix, tmp_path / "again", cache).hash == expected


def test_two_builds_at_once_over_one_cache_give_the_same_manifests(
    mix: MixConfig, tmp_path: Path, cache: Path
) -> None:
    expected = built(mix, tmp_path / "undisturbed").hash
    children = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "data_pipeline", "build", str(tmp_path / "in/mix.yaml")]
        command += ["--out", str(tmp_path / name), "--workers", "1"]
        children.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    for child in children:
        shown, _ = child.communicate()
        assert child.returncode == 0 and f"manifest {expected[:16]}" in shown
    assert len(list_entries(cache)) == 2


def test_shares_of_an_array_use_one_cache(
    mix: MixConfig, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    expected = built(mix, tmp_path / "first", cache).hash
    made.clear()
    for index in range(2):
        build_share(mix, tmp_path / "shared", index, 2, cache_dir=cache)
    assert built(mix, tmp_path / "shared", cache).hash == expected and made == []


def test_the_input_is_hashed_once_for_all_shares_of_an_array_and_the_build_after_them(
    mix: MixConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = input_files.xxh3_of

    def count(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(input_files, "file_hash", count)
    for index in range(3):
        monkeypatch.setattr(input_files, "_HASHED_HERE", {})  # each is a process of its own
        build_share(mix, tmp_path / "out", index, 3, cache_dir=cache)
    monkeypatch.setattr(input_files, "_HASHED_HERE", {})
    built(mix, tmp_path / "out", cache)
    assert sorted(path.name for path in hashed) == ["en.jsonl", "ja.jsonl"]


def test_only_parts_that_no_build_shares_are_pruned(
    mix: MixConfig, make_mix: MakeMix, tmp_path: Path, cache: Path
) -> None:
    built(mix, tmp_path / "kept", cache)
    built(make_mix({"own": make_texts(9, "x")}, folder="b"), tmp_path / "gone", cache)
    build_share(
        make_mix({"work": make_texts(9, "w")}, folder="c"), tmp_path / "work", 0, 1, cache_dir=cache
    )
    shutil.rmtree(tmp_path / "gone")
    assert len(list_entries(cache)) == 4
    assert prune(cache, 1.0, None) == []
    (removed,) = prune(cache, None, 0)
    assert removed.own_bytes > 0 and not removed.path.exists()
    assert [entry.own_bytes for entry in list_entries(cache)] == [0, 0, 0]
    built(mix, tmp_path / "kept")


def test_old_parts_and_leftovers_are_pruned_by_age(
    mix: MixConfig, tmp_path: Path, cache: Path
) -> None:
    built(mix, tmp_path / "gone", cache)
    shutil.rmtree(tmp_path / "gone")
    old, young = list_entries(cache)
    os.utime(old.path / ENTRY_FILE, (0, 0))
    leftover = young.path.parent / ".half.partial"
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    assert [entry.path for entry in prune(cache, 30.0, None)] == [old.path]
    assert not leftover.exists() and young.path.exists()


def test_the_folder_is_beside_the_builds_unless_somebody_names_another(tmp_path: Path) -> None:
    assert default_cache(tmp_path, None, {}) == tmp_path / "part-cache"
    assert default_cache(tmp_path, None, {CACHE_VARIABLE: "/shared"}) == Path("/shared")
    assert default_cache(tmp_path, Path("mine"), {CACHE_VARIABLE: "/shared"}) == Path("mine")


@needs_root
def test_a_cache_of_another_user_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = tmp_path / "part-cache"
    foreign.mkdir()
    os.chown(foreign, ATTACKER, ATTACKER)
    assert open_cache(tmp_path) is None
    assert "no parts are shared with other builds" in caplog.text
    with pytest.raises(ConfigError, match=r"part cache .* belongs to"):
        open_cache(tmp_path / "elsewhere", foreign)


@needs_root
def test_a_worker_that_sees_the_cache_of_another_user_refuses_it(
    mix: MixConfig, tmp_path: Path, cache: Path
) -> None:
    # on another machine the path of the cache may lead to something else
    os.chown(cache, ATTACKER, ATTACKER)
    with pytest.raises(ConfigError, match=r"part cache .* belongs to"):
        built(mix, tmp_path / "out", cache)


def test_nobody_else_can_look_into_a_cache(mix: MixConfig, tmp_path: Path, cache: Path) -> None:
    assert cache.stat().st_mode & 0o777 == 0o700
    # on a machine that did not begin the build a worker makes it
    other = tmp_path / "other"
    inputs = input_files.read_inputs(mix.sources)["ja"]
    (part,) = source_parts(tmp_path / "work", mix, mix.sources[0], inputs, other)
    assert not part_cache.provide_part(part).problem
    assert other.stat().st_mode & 0o777 == 0o700
