"""A user's own function for every text: what it changes, leaves out, and does wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.build.build import build
from data_pipeline.build.found_builds import NotBuilt, find_build, load_built_mix
from data_pipeline.build.origin import compare
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.mixture.ledger import Ledger, resume_ledger
from data_pipeline.reading import hooks
from data_pipeline.reading.sources import read_texts
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import MakeMix, make_texts

CODE = """
def clean(text, record):
    number = int(record["id"])
    if number % 3 == 0:
        return None
    if number == 4:
        raise ValueError("the name of a person: " + text)
    if number == 5:
        return 7
    return text.replace("en", "XX")
"""
Hooked = Callable[[str], MixConfig]


@pytest.fixture
def hooked(make_mix: MakeMix, tmp_path: Path) -> Hooked:
    """Return a function that loads a mix of ten documents with some code as its hook."""

    def load(code: str) -> MixConfig:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        (folder / "clean.py").write_text(code)
        keys = {"en": {"hook": "clean.py:clean"}}
        return make_mix({"en": make_texts(10, "en")}, sources=keys, max_reject_share=0.5)

    return load


def test_a_hook_changes_texts_and_leaves_documents_out(hooked: Hooked) -> None:
    tally = Tally()
    texts = list(read_texts(hooked(CODE).sources[0], tally))
    assert len(texts) == 4 and all(text.startswith("XX ") for text in texts)
    assert dict(tally.filtered) == {hooks.DROPPED: 4}
    assert dict(tally.rejects) == {
        "the hook raised ValueError": 1,
        "the hook returned int, not text": 1,
    }
    assert "person" not in tally.describe_rejects()


@pytest.mark.parametrize("call", ["sys.exit()", "raise SystemExit(0)"])
def test_a_hook_that_exits_costs_its_document_and_not_the_build(hooked: Hooked, call: str) -> None:
    code = (
        "import sys\ndef clean(text, record):\n"
        f"    if int(record['id']) == 4:\n        {call}\n    return text\n"
    )
    tally = Tally()
    assert len(list(read_texts(hooked(code).sources[0], tally))) == 9
    assert dict(tally.rejects) == {"the hook raised SystemExit": 1}


def test_a_hook_whose_file_exits_is_no_hook(hooked: Hooked) -> None:
    mix = hooked("import sys\nsys.exit(0)\ndef clean(text, record):\n    return text\n")
    with pytest.raises(DataError, match="cannot be run as a hook: SystemExit"):
        list(read_texts(mix.sources[0], Tally()))


def test_a_hook_that_fails_too_often_stops_the_build(hooked: Hooked, tmp_path: Path) -> None:
    mix = hooked("def clean(text, record):\n    raise KeyError(text)\n")
    with pytest.raises(DataError, match=r"10 of 10 documents .*the hook raised KeyError"):
        build(mix, tmp_path / "out", workers=1)


def test_the_code_of_a_hook_belongs_to_the_fingerprint_and_its_place_does_not(
    hooked: Hooked, tmp_path: Path
) -> None:
    first = build(hooked(CODE), tmp_path / "first", workers=1)
    assert first.sources[0].dropped["filtered: " + hooks.DROPPED] == {"documents": 4}
    other = build(hooked(CODE.replace("XX", "YY")), tmp_path / "other", workers=1)
    assert other.fingerprint != first.fingerprint and other.row_hashes() != first.row_hashes()
    (tmp_path / "moved").mkdir()
    for path in (tmp_path / "in").iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "moved" / "clean.py").write_text(CODE)
    moved = load_mix(tmp_path / "moved" / "mix.yaml")
    assert build(moved, tmp_path / "again", workers=1).fingerprint == first.fingerprint


def test_a_whole_build_and_a_run_need_no_file_of_the_hook(hooked: Hooked, tmp_path: Path) -> None:
    mix = hooked(CODE)
    built = build(mix, tmp_path / "out", workers=1)
    rows = built.row_hashes()
    stored = Ledger.start(mix, rows).to_json()
    path = tmp_path / "in" / "mix.yaml"
    with pytest.raises(NotBuilt):
        find_build(mix, tmp_path / "none")

    os.rename(tmp_path / "in" / "clean.py", tmp_path / "gone.py")
    found = load_built_mix(path, tmp_path / "out")
    assert find_build(found, tmp_path / "out") == tmp_path / "out"
    assert compare(built, found, read_contents=True).absent == ("en",)
    assert resume_ledger(stored, found, 5, accept_change=False, rows=rows).to_json() == stored

    path.write_text(path.read_text().replace("clean.py:clean", "clean.py:other"))
    other = load_built_mix(path, tmp_path / "out")
    (line,) = compare(built, other, read_contents=True).differences
    assert line.startswith("sources[en].hook: ")
    path.write_text(path.read_text().replace("clean.py:other", "clean.py:clean"))
    (tmp_path / "in" / "en.jsonl").write_text('{"text": "more"}\n')
    (line,) = compare(built, found, read_contents=False).differences
    assert line.startswith("sources[en].path: en.jsonl has ")


def test_a_run_goes_on_with_the_hook_in_another_folder_and_not_with_another_function(
    hooked: Hooked, tmp_path: Path
) -> None:
    mix = hooked(CODE + "def other(text, record):\n    return text\n")
    stored = Ledger.start(mix).to_json()
    shutil.copytree(tmp_path / "in", tmp_path / "moved")
    path = tmp_path / "moved" / "mix.yaml"
    assert resume_ledger(stored, load_mix(path), 5, accept_change=False).to_json() == stored
    path.write_text(path.read_text().replace("clean.py:clean", "clean.py:other"))
    with pytest.raises(ConfigError, match=r'sources\[en\]\.hook: "clean" -> "other"'):
        resume_ledger(stored, load_mix(path), 5, accept_change=False)


def test_a_hook_that_is_edited_after_the_mix_was_read_is_not_run(
    hooked: Hooked, tmp_path: Path
) -> None:
    mix = hooked("def clean(text, record):\n    return text + '.'\n")
    (tmp_path / "in" / "clean.py").write_text(CODE + "# edited\n")
    with pytest.raises(DataError, match="was changed while it was in use"):
        list(read_texts(mix.sources[0], Tally()))


def test_a_hook_that_others_may_write_to_is_refused_unread(hooked: Hooked, tmp_path: Path) -> None:
    mix = hooked(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef clean(text, record):\n    return text\n"
    )
    os.chmod(tmp_path / "in" / "clean.py", 0o666)
    with pytest.raises(ConfigError, match=r"hook .*clean\.py"):
        list(read_texts(mix.sources[0], Tally()))
    assert not (tmp_path / "ran").exists()


def test_reading_a_mix_runs_no_hook_and_leaves_nothing_beside_it(
    hooked: Hooked, tmp_path: Path
) -> None:
    mix = hooked("raise SystemError\ndef clean(text, record):\n    return text\n")
    with pytest.raises(DataError, match="cannot be run as a hook: SystemError"):
        list(read_texts(mix.sources[0], Tally()))
    assert not (tmp_path / "in" / "__pycache__").exists()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("clean.py", r"must be FILE\.py:FUNCTION"),
        ("none.py:clean", "is no file"),
        ("clean.py:other", "does not define"),
        ("mix.yaml:clean", r"must be FILE\.py:FUNCTION"),
    ],
)
def test_a_hook_that_cannot_be_one_is_refused_when_the_mix_is_read(
    make_mix: MakeMix, tmp_path: Path, hook: str, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "clean.py").write_text(CODE)
    with pytest.raises(ConfigError, match=message):
        make_mix({"en": make_texts(3, "en")}, sources={"en": {"hook": hook}})
