"""One workplace for all fault tests, and one undisturbed run to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.service import Service, make_workplace, run_to_end


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with mix, run YAML, DeepSpeed JSON and built data."""
    return make_workplace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def undisturbed(workplace: Path) -> Service:
    """Return a run that nothing happened to."""
    code, run = run_to_end(workplace, "undisturbed")
    assert code == 0, run.output
    return run
