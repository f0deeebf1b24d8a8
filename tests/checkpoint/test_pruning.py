"""Pruning keeps the newest sound checkpoints and every n-th for good, whatever else goes wrong."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from cpt.checkpoint import pruning
from cpt.checkpoint.loading import set_newer_aside
from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.pruning import Retention, prune
from cpt.checkpoint.reader import list_steps, refusal_of, step_folder
from cpt.config import CheckpointSection
from tests.support.checkpoints import EndlessReading, flip, write_checkpoint


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


def test_in_haste_a_checkpoint_is_taken_for_sound_by_the_sizes_of_its_files(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(step_folder(run_dir, 30) / "__0_0.distcp", "ab") as file:
        file.write(b"more")
    reading = EndlessReading()
    kept = Retention(run_dir, CheckpointSection(keep_last=3))
    with monkeypatch.context() as slow:
        slow.setattr(pruning, "refusal_of", reading)
        kept.note_published(40)
        assert reading.began.wait(60)
        kept.hurry()
    assert list_steps(run_dir) == [40, 30, 20, 10], "three are sound besides 30"
    write_checkpoint(run_dir, 50)
    with monkeypatch.context() as slow:
        slow.setattr(pruning, "refusal_of", reading)
        kept.note_published(50)
        kept.hurry()
    assert list_steps(run_dir) == [50, 40, 30, 20]


def test_a_system_without_threads_is_a_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kept = Retention(run_dir, CheckpointSection())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with caplog.at_level(logging.WARNING):
        kept.note_published(40)
        kept.close()
    assert "older checkpoints are not deleted now: can't start new thread" in caplog.text
    assert list_steps(run_dir) == [40, 30, 20, 10]


def test_exports_of_steps_set_aside_outlive_their_checkpoints(run_dir: Path, caplog) -> None:
    export = run_dir / "export" / "step-00000040"
    for turn in ("first", "second"):
        export.mkdir(parents=True)
        (export / "model.safetensors").write_text(turn)
        with caplog.at_level(logging.WARNING):
            set_newer_aside(run_dir, 30, "30")
        assert "its export is set aside as export/.superseded-step-00000040" in caplog.text
        write_checkpoint(run_dir, 40)
        prune_to(run_dir, 40)
    assert not list((run_dir / "checkpoints").glob(".*")), "the run has come to step 40 again"
    left = {path.name: path for path in (run_dir / "export").iterdir()}
    assert left.keys() == {".superseded-step-00000040", ".superseded-step-00000040-2"}
    texts = [(left[name] / "model.safetensors").read_text() for name in sorted(left)]
    assert texts == ["first", "second"]
