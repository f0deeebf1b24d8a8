"""The table tells survived, failed, not run and untested cases apart, and keeps earlier runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fault_table import BEGIN, END, FaultTable, update

CRASH = "tests/faults/test_crash.py"
STOP = "tests/faults/test_stop.py"


def run_of(file: str, *outcomes: tuple[str, str, str]) -> FaultTable:
    """A finished run of one file: (case, check, outcome) of each test."""
    table = FaultTable()
    for case, check, outcome in outcomes:
        reason = "no slurmctld on this machine" if outcome == "skipped" else ""
        table.expect(file)
        table.add(file, case, check, outcome, reason)
        table.reported(file)
    return table


def filled() -> FaultTable:
    table = run_of(
        CRASH,
        ("C1", "no orphan", "passed"),
        ("C1", "no orphan", "passed"),
        ("C2", "same weights", "passed"),
        ("C2", "previous one used", "failed"),
    )
    table.add(STOP, "S5", "requeued", "skipped", "no slurmctld on this machine")
    return table


def test_each_verdict_has_its_word() -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in filled().markdown().splitlines()[2:]}
    assert rows["C1"] == "| C1 | SIGKILL to one rank in the forward pass | yes | no orphan |"
    assert "**NO** (1 of 2 tests failed) | same weights; previous one used |" in rows["C2"]
    assert "not run: no slurmctld on this machine" in rows["S5"]
    assert "**no test**" in rows["C3"]


def test_one_failed_test_makes_its_case_fail() -> None:
    assert filled().summary().startswith("1 of ") and "failed: ['C2']" in filled().summary()


def test_only_the_part_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nSTALE\n{END}\nafter\n")
    filled().write(page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}\nafter\n")
    assert "STALE" not in text


def test_unknown_case_is_an_error() -> None:
    with pytest.raises(AssertionError, match="C99"):
        FaultTable().add(CRASH, "C99", "", "passed", "")


def test_run_of_one_file_replaces_its_outcomes_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    update(run_of(CRASH, ("C1", "no orphan", "failed"), ("C2", "same weights", "passed")), path)
    update(run_of(STOP, ("S1", "saved", "passed")), path)
    table = update(run_of(CRASH, ("C1", "no orphan", "passed")), path)
    evidence = table.evidence()
    assert (evidence["C1"].passed, evidence["C1"].failed) == (1, 0)
    assert evidence["C2"].passed == 0
    assert evidence["S1"].passed == 1


def test_run_that_was_cut_off_in_a_file_leaves_its_outcomes_alone(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    update(run_of(CRASH, ("C1", "no orphan", "passed")), path)
    cut = run_of(CRASH, ("C1", "no orphan", "failed"))
    cut.expect(CRASH)
    assert update(cut, path).evidence()["C1"].failed == 0


def test_outcomes_of_a_file_that_is_gone_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    update(run_of("tests/faults/test_gone.py", ("C1", "no orphan", "passed")), path)
    assert update(FaultTable(), path).files == {}
