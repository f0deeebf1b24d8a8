"""The fast tests are those that start no process; what they leave out is named and is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fast import (
    FILES_LEFT_OUT,
    FOLDERS_LEFT_OUT,
    STARTS_PROCESSES,
    TESTS,
    imported_names,
    is_fast,
)


@pytest.mark.parametrize("name", [*FOLDERS_LEFT_OUT, *FILES_LEFT_OUT])
def test_what_is_left_out_by_name_exists(name: str) -> None:
    assert (TESTS / name).exists()


@pytest.mark.parametrize("name", STARTS_PROCESSES)
def test_an_import_of_what_starts_processes_is_found(name: str, tmp_path: Path) -> None:
    module, _, last = name.rpartition(".")
    line = f"from {module} import {last}" if module else f"import {last}"
    file = tmp_path / "test_invented.py"
    file.write_text(f"def test_nothing() -> None:\n    {line}\n")
    assert name in imported_names(file)


@pytest.mark.parametrize("name", ["job/test_network.py", "job/test_launch.py"])
def test_a_file_that_starts_processes_is_not_fast(name: str) -> None:
    assert not is_fast(TESTS / name)


def test_most_rooms_have_fast_tests() -> None:
    rooms = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")}
    fast = {path.relative_to(TESTS).parts[0] for path in filter(is_fast, TESTS.rglob("test_*.py"))}
    assert rooms - fast <= {*FOLDERS_LEFT_OUT, "resilience"}
    assert is_fast(Path(__file__))
