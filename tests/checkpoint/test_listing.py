"""`cpt checkpoints` says what is there, and of each folder whether a run could go on from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpt.checkpoint.listing import age, checkpoint_table, list_checkpoints, readable
from cpt.checkpoint.manifest import MANIFEST
from cpt.checkpoint.reader import step_folder
from cpt.cli import main
from tests.support.checkpoints import flip, sign_again, write_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    flip(step_folder(tmp_path, 30) / "__0_0.distcp", 7)
    (step_folder(tmp_path, 20) / "__1_0.distcp").unlink()
    (step_folder(tmp_path, 10) / MANIFEST).unlink()
    (tmp_path / "checkpoints" / ".tmp-step-00000050").mkdir()
    (tmp_path / "checkpoints" / ".rejected-step-00000060").mkdir()
    return tmp_path


def conditions(run_dir: Path, *, verify: bool) -> dict[str, str]:
    return {one.folder.name: one.condition for one in list_checkpoints(run_dir, verify=verify)}


def test_every_folder_gets_its_condition(run_dir: Path) -> None:
    found = conditions(run_dir, verify=True)
    assert list(found)[:4] == [f"step-000000{step}" for step in (40, 30, 20, 10)]
    assert found["step-00000040"] == "verified"
    changed = "step-00000030/__0_0.distcp: its content does not match the manifest's hash."
    assert found["step-00000030"] == f"damaged: {changed}"
    missing = "step-00000020/__1_0.distcp: missing, though the manifest lists it."
    assert found["step-00000020"] == f"damaged: {missing}"
    assert found["step-00000010"] == "incomplete: no manifest.json"
    assert found[".tmp-step-00000050"].startswith("incomplete")
    assert "damaged" in found[".rejected-step-00000060"]


def test_quick_look_reads_no_file_and_says_so(run_dir: Path) -> None:
    found = conditions(run_dir, verify=False)
    assert found["step-00000040"] == found["step-00000030"] == "sizes match"
    assert "missing" in found["step-00000020"]


def test_table_shows_step_tokens_size_layout_and_age(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 100)
    listed = list_checkpoints(tmp_path, verify=True)
    lines = checkpoint_table(listed, now=folder.stat().st_mtime + 7300).splitlines()
    head = "step tokens size world sp ep stage saved age verdict"
    assert lines[0].split() == head.split()
    words = lines[1].split()
    assert words[:2] == ["100", "123"] and words[3] == "kB" and words[4:8] == ["2", "2", "1", "3"]
    assert lines[1].endswith("2 h  verified")


@pytest.mark.parametrize("tokens", [{}, [], "7", None, 1.5], ids=repr)
def test_tokens_that_are_no_number_are_left_out(tmp_path: Path, tokens: object) -> None:
    folder = write_checkpoint(tmp_path, 100)
    sign_again(folder, lambda body: body["state"]["progress"].update(tokens=tokens))
    table = checkpoint_table(list_checkpoints(tmp_path, verify=False))
    assert table.splitlines()[1].split()[:2] == ["100", "-"]


def test_command_fails_if_none_is_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", "--run_dir", str(tmp_path)]) == 0
    assert "holds no checkpoint yet" in capsys.readouterr().out
    flip(write_checkpoint(tmp_path, 100) / "__0_0.distcp", 7)
    assert main(["checkpoints", "--run_dir", str(tmp_path)]) == 0
    assert main(["checkpoints", "--run_dir", str(tmp_path), "--verify"]) == 74
    assert main(["checkpoints", "--run_dir", str(tmp_path / "none")]) == 78


def test_listing_needs_no_deepspeed() -> None:
    code = "import sys, cpt.checkpoint.listing; sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0


def test_sizes_and_ages_are_readable() -> None:
    assert [readable(size) for size in (0, 999, 1500)] == ["0 B", "999 B", "1.5 kB"]
    assert [readable(size) for size in (2_000_000, 3 * 10**12)] == ["2.0 MB", "3.0 TB"]
    assert [age(s) for s in (-1, 5, 300, 10_000, 300_000)] == ["0 s", "5 s", "5 min", "3 h", "3 d"]
