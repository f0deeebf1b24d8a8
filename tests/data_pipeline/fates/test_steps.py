"""A step of the last stage removes what other inputs left of it, and nothing of other steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.fates.steps import Step


def test_a_step_removes_its_own_folders_and_not_those_of_a_longer_name(tmp_path: Path) -> None:
    other = Step.begin(tmp_path, "pack-a-train-train", 1)  # of the source "a-train"
    before = Step.begin(tmp_path, "pack-a-train", 1)
    step = Step.begin(tmp_path, "pack-a-train", 2)
    assert step.tasks_folder.is_dir()
    assert not before.folder.exists()
    assert other.tasks_folder.is_dir()


def test_files_of_tasks_go_though_a_kill_fell_behind_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step.begin(tmp_path, "near", 1)
    (step.tasks_folder / "pairs-00000").write_bytes(b"large")

    def kill(*arguments: object, **keys: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            step.finish(np.array([3, 1]))
    again = Step.begin(tmp_path, "near", 1)
    result = again.result()
    assert result is not None
    assert result.tolist() == [3, 1]
    assert list(again.tasks_folder.iterdir()) == []
