"""A run is finished when its newest manifest holds the planned last step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpt.checkpoint.manifest import Manifest, write_manifest
from cpt.checkpoint.status import check_finished
from cpt.cli import main
from cpt.errors import CheckpointError, InternalError


def run_with(run_dir: Path, plan: str, *steps: int) -> Path:
    run_dir.mkdir()
    (run_dir / "config.resolved.yaml").write_text(f"train:\n  {plan}\n")
    for step in steps:
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_manifest(
            folder, Manifest(step=step, files=(), tensors={}, layout={}, versions={}, state={})
        )
    return run_dir


@pytest.mark.parametrize("plan", ["total_steps: 30", "{total_steps: 90, stop_at_step: 30}"])
def test_run_is_finished_when_its_planned_last_step_is_saved(
    tmp_path: Path, plan: str, capsys
) -> None:
    assert main(["status", "--run_dir", str(run_with(tmp_path / "done", plan, 15, 30))]) == 0
    out = capsys.readouterr().out
    assert "finished, step 30 of 30 is saved" in out
    assert "state  finished" in out
    assert main(["status", "--run_dir", str(run_with(tmp_path / "half", plan, 15))]) == 70
    told = capsys.readouterr()
    assert "not finished; saved is step 15 of 30" in told.err
    assert "0 of 30, saved step 15" in told.out
    with pytest.raises(InternalError, match="saved is step 0 of 30"):
        check_finished(run_with(tmp_path / "fresh", plan))


def test_run_without_plan_or_with_a_damaged_manifest_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="no plan to compare with"):
        check_finished(tmp_path)
    damaged = run_with(tmp_path / "damaged", "total_steps: 30", 30)
    (damaged / "checkpoints" / "step-00000030" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError):
        check_finished(damaged)


def test_answer_needs_no_torch() -> None:
    modules = "sys, cpt.cli, cpt.checkpoint.status, cpt.telemetry.overview_text"
    code = f"import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
