"""A Slurm cluster for all tests of this folder.

A machine without Slurm skips them and says so; it fails if CI promised to install one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.job_scripts import Bench, make_bench
from tests.support.slurm_cluster import (
    MISSING,
    Cluster,
    make_slurm_workplace,
    require_slurm,
    running_cluster,
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Stand-ins for what a machine without a cluster lacks."""
    return make_bench(tmp_path)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two make-believe GPUs each."""
    require_slurm()
    with running_cluster() as started:
        yield started


@pytest.fixture(scope="session")
def slurm_workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mix, run YAML, DeepSpeed JSON, built data, and env.sh for the job templates."""
    return make_slurm_workplace(tmp_path_factory.mktemp("slurm"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    num_skipped = sum(MISSING in str(report.longrepr) for report in reports)
    if num_skipped:
        text = f"{num_skipped} SLURM TESTS DID NOT RUN: {MISSING}. "
        text += "Debian: apt-get install slurm-wlm munge"
        terminalreporter.write_line(text, red=True, bold=True)
