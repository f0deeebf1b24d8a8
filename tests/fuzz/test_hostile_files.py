"""Files that others made end in a message, in time; `bench/prove/fuzz.py` tries many more."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.support.fuzzing.attack import Target, attack, hostile_content
from tests.support.fuzzing.targets import TARGETS

QUICK = (
    "checkpoint manifest",
    "range index",
    "metadata of format 1",
    "build manifest",
    "config.json",
    "prompts",
    "JSONL",
    "conversations",
    "gzip",
    "lock",
)
"""Kinds of which many files are read in a second."""
CASES = range(25)


@pytest.mark.parametrize("name", QUICK)
def test_hostile_file_ends_in_a_message(name: str, tmp_path: Path) -> None:
    (target,) = [target for target in TARGETS if target.name == name]
    assert attack(target, tmp_path, CASES) == []


def make_file(folder: Path) -> Path:
    (folder / "file.json").write_text('{"a": 1, "b": [2, 3]}')
    return folder / "file.json"


def test_bug_of_a_reader_and_a_file_written_elsewhere_are_found(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        raise KeyError("a")

    def write(folder: Path) -> None:
        (folder.parent / "victim" / "file").write_text("changed")

    for number, reader in enumerate((read, write)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert attack(Target(name="x", make=make_file, read=reader), folder, range(1))


def test_same_number_makes_the_same_file_and_another_makes_another(tmp_path: Path) -> None:
    target = Target(name="x", make=make_file, read=lambda folder: None)
    good = make_file(tmp_path).read_bytes()
    made = [hostile_content(target, tmp_path, good, number) for number in range(50)]
    assert made == [hostile_content(target, tmp_path, good, number) for number in range(50)]
    assert len(set(made)) > 25


def test_unknown_kind_of_file_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Path(__file__).resolve().parents[2] / "bench" / "prove" / "fuzz.py"
    monkeypatch.setattr(sys, "argv", [str(program), "--target", "nosuch"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(program))["main"]()
    assert end.value.code == 2
    assert "invalid choice: 'nosuch'" in capsys.readouterr().err
