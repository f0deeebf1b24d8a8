"""The table tells survived, failed, not run and untested cases apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fault_table import BEGIN, END, FaultTable


def filled() -> FaultTable:
    table = FaultTable()
    table.add("C1", "no orphan", "passed", "", 8.0)
    table.add("C1", "no orphan", "passed", "", 8.0)
    table.add("C2", "same weights", "passed", "", 8.0)
    table.add("C2", "previous one used", "failed", "", 8.0)
    table.add("S5", "requeued", "skipped", "no slurmctld on this machine", 0.0)
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
        FaultTable().add("C99", "", "passed", "", 0.0)
