"""A run directory is tried before anything is loaded, and its room is told."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpt.config import CheckpointSection, GuardSection, RunConfig
from cpt.errors import ConfigError, StorageError
from cpt.job.run_dir import RoomNeeded, existing_folder, make_run_dir, probe, room_needed
from cpt.telemetry.metrics import append_bytes
from data_pipeline.commands import prepare_process
from data_pipeline.store.files import make_folder, write_text
from data_pipeline.store.ownership import RUN_FOLDERS, SHARED_VARIABLE, foreign_problems
from tests.support.other_users import (
    ATTACKER,
    VICTIM,
    as_user,
    common_folder,
    needs_root,
    owned_folder,
    owned_link,
)

NUMELS = {"a": 1000}
ACTS = GuardSection(interval_steps=10)
WARNS = GuardSection(interval_steps=10, policy="warn")


def needed(
    *,
    last: int = 100,
    step: int = 0,
    existing: Collection[int] = (),
    export: bool = False,
    guard: GuardSection | None = None,
    **kept: Any,
) -> RoomNeeded:
    config = SimpleNamespace(
        checkpoint=CheckpointSection(**kept),
        train=SimpleNamespace(total_steps=last, stop_at_step=None, freeze=(), optimizer="adamw"),
        telemetry=SimpleNamespace(export_at_end=export),
        guard=guard or GuardSection(enabled=False),
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
        pytest.param({"interval_steps": 10, "existing": (10, 20), "step": 20}, 2, id="came-from"),
        pytest.param({"interval_steps": 10, "guard": ACTS}, 4, id="guard-goes-back"),
        pytest.param({"interval_steps": 10, "guard": WARNS}, 3, id="guard-only-warns"),
        pytest.param({"interval_steps": 10, "guard": GuardSection()}, 3, id="guard-never-looks"),
        pytest.param({"interval_steps": 60, "guard": ACTS}, 2, id="all-are-kept"),
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


@needs_root
def test_run_directory_of_another_user_is_refused_and_no_link_in_it_is_written_through() -> None:
    """Finding 2: the victim's own file must not get a line of the run."""
    with common_folder() as common:
        home = owned_folder(common / "home", VICTIM, 0o700)
        secret = home / "startup-file"
        secret.write_text("mine\n", encoding="utf-8")
        os.chown(secret, VICTIM, VICTIM)
        run = owned_folder(common / "run", ATTACKER, 0o2777)
        owned_link(run / "metrics.jsonl", secret, ATTACKER)

        def use() -> list[str]:
            told = []
            for action in (
                lambda: make_run_dir(run),
                lambda: append_bytes(run / "metrics.jsonl", b"{}\n"),
                lambda: write_text(run / "metrics.jsonl", "replaced"),
            ):
                try:
                    action()
                except (ConfigError, OSError) as error:
                    told.append(str(error))
            return told

        told = as_user(VICTIM, use)
        assert f"belongs to uid {ATTACKER}" in told[0]
        assert "symbolic link" in told[1]
        # what is replaced as a whole replaces the link, not what it leads to
        assert len(told) == 2
        assert secret.read_text(encoding="utf-8") == "mine\n"


@needs_root
def test_group_writable_directory_of_the_user_is_refused_unless_it_is_named_as_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o2770)
    with pytest.raises(ConfigError, match="may be written to by its group"):
        make_run_dir(run)
    monkeypatch.setenv(SHARED_VARIABLE, str(tmp_path))
    make_run_dir(run)
    assert list(run.iterdir()) == []


def test_what_is_made_under_a_loose_umask_passes_the_check(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = tmp_path / "runs" / "own"
        make_run_dir(run)
        make_folder(run / "guard" / "looks")
        write_text(run / "guard" / "looks" / "one.json", "{}")
        append_bytes(run / "metrics.jsonl", b"{}\n")
        prepare_process()
        (run / "made-by-a-library").mkdir()
    finally:
        os.umask(before)
    for path in (run.parent, *run.parent.rglob("*")):
        assert path.stat().st_mode & 0o022 == 0, path
    assert foreign_problems(run, "run directory", RUN_FOLDERS) == []
