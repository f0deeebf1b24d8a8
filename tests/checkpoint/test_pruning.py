"""Pruning keeps the newest sound checkpoints and every n-th for good, whatever else goes wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.pruning import prune
from cpt.checkpoint.reader import list_steps, refusal_of, step_folder
from tests.support.checkpoints import flip, write_checkpoint


def prune_to(
    run_dir: Path, newest: int, keep_last: int = 2, every: int = 0, loaded: int | None = None
) -> list[int]:
    """Prune, with soundness read from disk, and return the steps that are left."""
    protected = {newest}
    if loaded is not None:
        protected.add(loaded)
    prune(
        run_dir,
        newest=newest,
        keep_last=keep_last,
        keep_every_steps=every,
        protected=protected,
        is_sound=lambda step: refusal_of(step_folder(run_dir, step)) is None,
    )
    return list_steps(run_dir)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    return tmp_path


def test_pruning_keeps_the_newest(run_dir: Path) -> None:
    assert prune_to(run_dir, 40) == [40, 30]


def test_every_nth_is_kept_for_good(run_dir: Path) -> None:
    assert prune_to(run_dir, 40, every=20) == [40, 30, 20]
    write_checkpoint(run_dir, 50)
    assert prune_to(run_dir, 50, every=20) == [50, 40, 20]


def test_what_was_just_written_and_what_was_loaded_is_kept(run_dir: Path) -> None:
    assert prune_to(run_dir, 40, loaded=10) == [40, 30, 10]


@pytest.mark.case("C9", "the two newest sound ones survive; incomplete ones do not count and go")
def test_incomplete_and_damaged_directories_are_not_counted(run_dir: Path) -> None:
    (step_folder(run_dir, 20) / MANIFEST).unlink()
    flip(step_folder(run_dir, 30) / "__0_0.distcp", 5)
    assert prune_to(run_dir, 40) == [40, 30, 10], (
        "40 and 10 are sound; 30 is damaged and stays to be looked at"
    )
    write_checkpoint(run_dir, 50)
    assert prune_to(run_dir, 50) == [50, 40]


@pytest.mark.case("C4", "directory without manifest is ignored; its deletion is finished next time")
def test_interrupted_deletion_is_finished(run_dir: Path) -> None:
    (step_folder(run_dir, 10) / MANIFEST).unlink()
    (step_folder(run_dir, 10) / "__1_0.distcp").unlink()
    assert prune_to(run_dir, 40, keep_last=3) == [40, 30, 20]


def test_soundness_is_asked_only_where_it_decides(run_dir: Path) -> None:
    asked: list[int] = []

    def note(step: int) -> bool:
        asked.append(step)
        return True

    prune(run_dir, newest=40, keep_last=2, keep_every_steps=0, protected={40}, is_sound=note)
    assert asked == [40, 30]


@pytest.mark.case("C9", "a deletion that fails is a warning")
def test_failing_deletion_warns(run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.WARNING):
        assert prune_to(run_dir, 40) == [40, 30, 20, 10]
    assert "could not delete" in caplog.text and "Read-only file system" in caplog.text


def test_set_aside_ones_go_once_they_are_replaced(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    names = [
        ".rejected-step-00000050",
        ".superseded-step-00000040",
        ".superseded-step-00000060-2",
        ".tmp-step-00000070",
    ]
    for name in names:
        (checkpoints / name).mkdir()
    prune_to(run_dir, 40)
    left = {entry.name for entry in checkpoints.glob(".*")}
    assert left == {".superseded-step-00000060-2", ".tmp-step-00000070"}
