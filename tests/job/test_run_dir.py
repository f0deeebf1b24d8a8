"""A run directory is tried before anything is loaded, and its room is told."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpt.config import CheckpointSection, RunConfig
from cpt.errors import StorageError
from cpt.job.run_dir import RoomNeeded, existing_folder, probe, room_needed

NUMELS = {"a": 1000}


def needed(
    *,
    last: int = 100,
    step: int = 0,
    existing: Collection[int] = (),
    export: bool = False,
    **kept: Any,
) -> RoomNeeded:
    config = SimpleNamespace(
        checkpoint=CheckpointSection(**kept),
        train=SimpleNamespace(total_steps=last, stop_at_step=None, freeze=()),
        telemetry=SimpleNamespace(export_at_end=export),
    )
    return room_needed(cast(RunConfig, config), NUMELS, step, existing)


@pytest.mark.parametrize(
    ("kept", "count"),
    [
        pytest.param({}, 1, id="only-the-last"),
        pytest.param({"interval_steps": 60}, 2, id="fewer-than-are-kept"),
        pytest.param({"interval_steps": 10}, 3, id="one-more-than-is-kept"),
        pytest.param({"interval_steps": 10, "keep_last": 4}, 5, id="more-are-kept"),
        pytest.param({"interval_steps": 10, "keep_every_steps": 20}, 6, id="kept-for-good"),
        pytest.param({"interval_steps": 10, "existing": (80, 90), "step": 90}, 1, id="there"),
        pytest.param({"interval_steps": 10, "existing": (80, 90), "step": 80}, 1, id="gone-back"),
        pytest.param({"interval_steps": 0, "existing": (100,), "step": 100}, 1, id="done"),
    ],
)
def test_checkpoints_that_lie_there_at_one_time_are_counted(
    kept: dict[str, Any], count: int
) -> None:
    found = needed(**kept)
    assert found.num_checkpoints == count
    assert found.total_bytes == count * 12 * 1000


def test_checkpoints_kept_for_good_and_the_export_are_told() -> None:
    found = needed(interval_steps=10, keep_every_steps=20, export=True)
    # 20, 40 and 60 for good; 80, 90 and 100 are the newest
    assert found.num_for_good == 3
    assert found.total_bytes == 6 * 12_000 + 2_000
    told = found.describe(free_bytes=5_000_000)
    assert told == "6 x 0.0 MB (3 kept for good) + export 0.0 MB; 5.0 MB free"


def test_run_with_room_for_its_first_checkpoint_alone_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=30_000))
    room = needed(interval_steps=10)
    room.warn_if_tight(tmp_path / "run", 2)
    assert "later saves will fail" in caplog.text and str(tmp_path) in caplog.text
    caplog.clear()
    needed(interval_steps=60).warn_if_tight(tmp_path / "run", 2)
    assert not caplog.text


def test_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    assert existing_folder(run_dir) == tmp_path
    probe(run_dir, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_takes_no_file_is_refused() -> None:
    """No permission bit tells that of /proc, not even to root."""
    run_dir = Path("/proc/runs/a")
    with pytest.raises(StorageError, match=r"run directory /proc/runs/a: /proc: .* --run_dir"):
        probe(run_dir, existing_folder(run_dir))
