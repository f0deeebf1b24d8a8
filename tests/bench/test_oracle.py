"""`make oracle` tells what failed and what was left out; all that it installs is pinned by hash."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.oracle import run
from bench.oracle.run import CHECKS, HERE, Check, row_of, table

CHECK = Check(name="a program", script="program", packages=())


def test_every_check_has_a_script_and_hashed_requirements() -> None:
    for check in CHECKS:
        assert (HERE / "checks" / f"{check.script}.py").is_file(), check.name
        if not check.requirements:
            continue
        text = (HERE / "requirements" / f"{check.requirements}.txt").read_text("utf-8")
        blocks = re.findall(
            r"^([\w.-]+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M
        )
        assert len(blocks) == len(re.findall(r"^\w", text, re.M)) > 0, check.name


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("import sys; print(len(sys.argv)); print('equal | alike')", "equal | alike"),
        ("raise ValueError('row 3 differs')", "FAILED: ValueError: row 3 differs"),
    ],
    ids=["equal", "different"],
)
def test_a_check_gives_its_last_line_and_fails_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, result: str
) -> None:
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "program.py").write_text(script)
    monkeypatch.setattr(run, "HERE", tmp_path)
    found = row_of(CHECK, tmp_path, tmp_path, {})
    assert found[:3] == ("a program", "", result)
    assert result.replace("|", "\\|") in table([found])


def test_what_cannot_be_had_is_left_out_with_its_reason(tmp_path: Path) -> None:
    reason = "No matching distribution found for program"
    assert row_of(CHECK, tmp_path, tmp_path, {"a program": reason})[2] == f"left out: {reason}"
    absent = Check(name="a program", script="program", packages=("no-such-program",))
    found = row_of(absent, tmp_path, tmp_path, {})
    assert found[2] == "left out: no-such-program is not installed"
