"""A build knows the rules and files that it was made from, and tells what differs by now."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.build import found_builds, origin
from data_pipeline.build.build import build
from data_pipeline.build.found_builds import find_build, found_or_default, matching_builds
from data_pipeline.build.origin import compare, fingerprint, read_origin
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.reading import input_files
from data_pipeline.store.manifest import BuildManifest, read_manifest
from tests.data_pipeline.inputs import MakeMix, make_texts, write_jsonl
from tests.support.records import write_jsonl as write_records

TEXTS = {"en": make_texts(20, "en"), "ja": make_texts(20, "ja")}


@pytest.fixture
def built(make_mix: MakeMix, tmp_path: Path) -> BuildManifest:
    build(make_mix(TEXTS), tmp_path / "out", progress=False)
    return read_manifest(tmp_path / "out")


def edited(make_mix: MakeMix, **keys: Any) -> MixConfig:
    """Return the mix of the same files with other settings."""
    return make_mix(TEXTS, **keys)


def test_the_build_of_the_same_mix_differs_in_nothing(
    built: BuildManifest, make_mix: MakeMix
) -> None:
    mix = make_mix(TEXTS, weights={"en": 0.9, "ja": 0.1}, seed=9)
    for read_contents in (False, True):
        found = compare(built, mix, read_contents=read_contents)
        assert (found.differences, found.absent) == ((), ())
    assert built.fingerprint == fingerprint(mix)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"near_duplicates": 0.7}, "near_duplicates: 0.0 in the build, 0.7 in the mix"),
        ({"seq_len": 64}, "seq_len: 32 in the build, 64 in the mix"),
        ({"packing": "concatenate"}, 'packing: "best_fit" in the build, "concatenate" in the mix'),
        (
            {"sources": {"ja": {"normalise": ["nfkc"]}}},
            'sources[ja].normalise: [] in the build, ["nfkc"] in the mix',
        ),
        (
            {"sources": {"ja": {"normalise": ["width"]}}},
            'sources[ja].step_versions: none in the build, {"width": 3} in the mix',
        ),
        (
            {"sources": {"en": {"text_field": "title"}}},
            'sources[en].text_field: "text" in the build, "title" in the mix',
        ),
        ({"held_out_share": {"en": 0.5}}, "sources[en].held_out_share: 0.0 in the build, 0.5"),
        ({"sources": {"en": {"name": "fr"}}}, "sources[fr]: in the mix, not in the build"),
        ({"sources": {"en": {"name": "fr"}}}, "sources[en]: in the build, not in the mix"),
    ],
)
def test_a_changed_rule_is_named(
    built: BuildManifest, make_mix: MakeMix, keys: dict[str, Any], line: str
) -> None:
    found = compare(built, edited(make_mix, **keys), read_contents=False)
    assert any(difference.startswith(line) for difference in found.differences)


def test_sources_in_another_order_are_named(built: BuildManifest, make_mix: MakeMix) -> None:
    mix = make_mix({"ja": TEXTS["ja"], "en": TEXTS["en"]})
    lines = compare(built, mix, read_contents=True).differences
    assert lines == ("sources: the build has them in the order en, ja",)


def same_size(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"river", b"RIVER"))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 3)


def renamed(path: Path) -> None:
    path.rename(path.with_name("other.jsonl"))


@pytest.mark.parametrize(
    ("change", "read_contents", "words"),
    [
        (longer, False, ["en.jsonl has ", " in the build"]),
        (longer, True, ["en.jsonl has ", " in the build"]),
        (same_size, False, []),
        (same_size, True, ["en.jsonl has other content than in the build"]),
        (renamed, False, ["en.jsonl is in the build, and not here", "other.jsonl is here"]),
    ],
)
def test_a_changed_file_is_named(
    make_mix: MakeMix,
    tmp_path: Path,
    change: Callable[[Path], None],
    read_contents: bool,
    words: list[str],
) -> None:
    sources = {"en": {"path": "*n.jsonl"}}
    if change is renamed:
        sources = {"en": {"path": "[eo]*.jsonl"}}
    mix = make_mix({"en": TEXTS["en"]}, sources=sources)
    manifest = build(mix, tmp_path / "out", progress=False)
    change(tmp_path / "in" / "en.jsonl")
    text = "\n".join(compare(manifest, mix, read_contents=read_contents).differences)
    for word in words:
        assert word in text
    assert bool(text) == bool(words)


def test_many_files_are_counted_and_only_some_are_named(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        write_jsonl(tmp_path / "in" / "many" / f"{number}.jsonl", make_texts(3, f"x{number}"))
    mix = make_mix({"en": ["unused"]}, sources={"en": {"path": "many/*.jsonl"}})
    manifest = build(mix, tmp_path / "out", progress=False)
    for path in (tmp_path / "in" / "many").iterdir():
        longer(path)
    lines = compare(manifest, mix, read_contents=False).differences
    assert len(lines) == 6 and lines[-1] == "sources[en].path: 7 more files differ"
    monkeypatch.setattr(origin, "MAX_LISTED_FILES", 5)
    manifest = build(mix, tmp_path / "other", progress=False)
    assert not manifest.inputs["en"].listed
    assert not compare(manifest, mix, read_contents=True).differences
    (tmp_path / "in" / "many" / "0.jsonl").unlink()
    (line,) = compare(manifest, mix, read_contents=False).differences
    assert "11 files of" in line and "12 files of" in line


def test_a_build_without_its_raw_files_is_compared_by_its_rules(
    built: BuildManifest, make_mix: MakeMix, tmp_path: Path
) -> None:
    make_mix(TEXTS)
    path = tmp_path / "in" / "mix.yaml"
    shutil.move(tmp_path / "in" / "en.jsonl", tmp_path / "en.jsonl")
    with pytest.raises(ConfigError, match="matches no file"):
        load_mix(path)
    mix = load_mix(path, need_files=False)
    found = compare(built, mix, read_contents=True)
    assert (found.differences, found.absent) == ((), ("en",))
    content = yaml.safe_load(path.read_text())
    content["near_duplicates"] = 0.9
    path.write_text(yaml.safe_dump(content))
    found = compare(built, load_mix(path, need_files=False), read_contents=True)
    assert found.differences == ("near_duplicates: 0.0 in the build, 0.9 in the mix",)


def without_copies_by(manifest: BuildManifest) -> BuildManifest:
    """Return a manifest as it was before copies of stored conversations were found."""
    rules = json.loads(json.dumps(manifest.rules))
    del rules["sources"][1]["copies_by"]
    return dataclasses.replace(manifest, rules=rules)


def test_a_build_from_before_copies_of_stored_conversations_were_found_is_told(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    records = []
    for number in range(6):
        question = {"role": "user", "content": f"Q{number}"}
        records.append({"messages": [question, {"role": "assistant", "content": "A"}]})
    write_records(tmp_path / "chat.jsonl", records[:3])
    write_records(tmp_path / "more.jsonl", records)
    chat = {"path": str(tmp_path / "chat.jsonl"), "format": "harmony"}
    more = {**chat, "path": str(tmp_path / "more.jsonl")}
    make: Callable[..., MixConfig] = functools.partial(make_mix, seq_len=256)
    build(make({"en": ["-"]}, sources={"en": more}), tmp_path / "chats", progress=False)
    build(make({"en": TEXTS["en"]}), tmp_path / "texts", progress=False)
    chats = {"path": str(tmp_path / "chats"), "format": "build"}
    texts = {**chats, "path": str(tmp_path / "texts")}
    for sources in ({"en": chat, "ja": texts}, {"en": texts, "ja": chats}):
        mix = make({"en": ["-"], "ja": ["-"]}, sources=sources)
        assert not any("copies_by" in rules for rules in read_origin(mix).rules["sources"])

    mix = make({"en": ["-"], "ja": ["-"]}, sources={"en": chat, "ja": chats})
    manifest = build(mix, tmp_path / "out", progress=False)
    assert compare(manifest, mix, read_contents=True).differences == ()
    (line,) = compare(without_copies_by(manifest), mix, read_contents=True).differences
    assert line == 'sources[ja].copies_by: none in the build, "tokens" in the mix'
    (tmp_path / "chats").chmod(0o775)  # readable, but no longer ours alone
    for of_build in (manifest, without_copies_by(manifest)):
        assert compare(of_build, mix, read_contents=True).differences == ()
    shutil.rmtree(tmp_path / "chats")
    mix = load_mix(tmp_path / "in" / "mix.yaml", need_files=False)
    for of_build in (manifest, without_copies_by(manifest)):
        assert compare(of_build, mix, read_contents=True).differences == ()


def test_build_refuses_another_build_and_says_what_differs(
    make_mix: MakeMix, tmp_path: Path
) -> None:
    build(make_mix(TEXTS), tmp_path / "out", progress=False)
    with pytest.raises(
        DataError, match=r"another mix .*\n  near_duplicates: 0.0 in the build, 0.7"
    ):
        build(make_mix(TEXTS, near_duplicates=0.7), tmp_path / "out", progress=False)


def test_a_build_of_an_earlier_version_is_known_by_its_fingerprint(
    built: BuildManifest, make_mix: MakeMix, tmp_path: Path
) -> None:
    content = built.content()
    del content["rules"], content["inputs"]
    for domain in content["guard_domains"]:
        del domain["ignored_keys"]
    from data_pipeline.store import manifest as module

    content["checksum"] = module._checksum(content)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(content))
    old = read_manifest(tmp_path / "out")
    mix = make_mix(TEXTS)
    assert not compare(old, mix, read_contents=True).differences
    assert "an earlier version" in compare(old, mix, read_contents=False).differences[0]
    assert compare(old, make_mix(TEXTS, seq_len=64), read_contents=True).differences
    assert BuiltData.open(tmp_path / "out", mix=mix).source_names == ("en", "ja")


def test_an_unreadable_file_is_bad_data(make_mix: MakeMix, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    mix = make_mix(TEXTS)
    monkeypatch.setattr(input_files, "file_hash", refuse)
    with pytest.raises(DataError, match=r"en.jsonl: cannot be read: Permission denied.*'en'"):
        fingerprint(mix)


def test_default_builds_are_found_by_names_and_sizes(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found_builds, "DEFAULT_ROOT", tmp_path / "data")
    mix = make_mix(TEXTS)
    assert matching_builds(mix) == []
    data = tmp_path / "data"
    build(mix, data / "a-persons-choice", progress=False)
    build(make_mix(TEXTS, seq_len=64), data / "mix-2", progress=False)
    (data / "mix-3").mkdir()
    (data / "mix-3" / "manifest.json").write_text("{")
    assert matching_builds(make_mix(TEXTS)) == [data / "a-persons-choice"]
    # the same build twice is taken once, by the name of the mix
    shutil.copytree(data / "a-persons-choice", data / "mix")
    assert matching_builds(make_mix(TEXTS)) == [data / "mix"]
    # what others may write to is not read, and refused only where its name is that of the mix
    (data / "a-persons-choice").chmod(0o777)
    assert matching_builds(make_mix(TEXTS)) == [data / "mix"]
    (data / "mix").chmod(0o777)
    with pytest.raises(ConfigError, match="mix"):
        matching_builds(make_mix(TEXTS))
    (data / "mix").chmod(0o755)
    longer(tmp_path / "in" / "en.jsonl")
    assert matching_builds(mix) == []


def test_of_two_builds_of_one_mix_with_other_texts_none_is_taken(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.store import manifest as module

    data = tmp_path / "data"
    monkeypatch.setattr(found_builds, "DEFAULT_ROOT", data)
    mix = make_mix(TEXTS)
    content = build(mix, data / "mix", progress=False).content()
    shutil.copytree(data / "mix", data / "other")
    assert found_or_default(mix) == find_build(mix) == data / "mix"
    # as if a version that reads the files in another way had made it
    content["sources"][0]["held_out_hash"] = 64 * "0"
    content["checksum"] = module._checksum(content)
    (data / "other" / "manifest.json").write_text(json.dumps(content))
    for look in (found_or_default, find_build):
        with pytest.raises(ConfigError, match=r"data/mix, .*data/other: .* and their texts differ"):
            look(mix)
    assert matching_builds(mix) == [data / "mix", data / "other"]


def test_files_are_looked_at_only_for_builds_of_the_same_sources(
    make_mix: MakeMix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found_builds, "DEFAULT_ROOT", tmp_path / "data")
    build(make_mix({"fr": TEXTS["en"]}), tmp_path / "data" / "french", progress=False)
    mix = make_mix(TEXTS)
    monkeypatch.setattr(found_builds, "compare", None)
    assert matching_builds(mix) == []
