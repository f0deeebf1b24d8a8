"""The fast tests are those that start no process; what they leave out is named and is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fast import FILES_LEFT_OUT, FOLDERS_LEFT_OUT, STARTS_PROCESSES, TESTS, is_fast


@pytest.mark.parametrize("name", [*FOLDERS_LEFT_OUT, *FILES_LEFT_OUT])
def test_what_is_left_out_by_name_exists(name: str) -> None:
    assert (TESTS / name).exists()


@pytest.mark.parametrize("module", STARTS_PROCESSES)
def test_a_file_that_starts_processes_is_not_fast(module: str) -> None:
    importers = [
        path for path in TESTS.rglob("test_*.py") if f"import {module}" in path.read_text()
    ]
    assert not any(is_fast(path) for path in importers)


def test_most_rooms_have_fast_tests() -> None:
    rooms = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")}
    fast = {path.relative_to(TESTS).parts[0] for path in filter(is_fast, TESTS.rglob("test_*.py"))}
    assert rooms - fast <= {*FOLDERS_LEFT_OUT, "resilience"}
    assert is_fast(Path(__file__))
