"""A Slurm for all tests of this folder; a machine without one is told so, and fails where CI promised to install it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import make_workplace
from tests.support.slurm_cluster import Cluster, missing_programs, running_cluster, write_settings

MISSING = "no Slurm on this machine"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two make-believe GPUs each."""
    if missing := missing_programs():
        reason = f"{MISSING} ({', '.join(missing)} not found). Debian: apt-get install slurm-wlm munge"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with running_cluster() as started:
        yield started


@pytest.fixture(scope="session")
def slurm_workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mix, run YAML, DeepSpeed JSON, built data, and env.sh for the job templates."""
    folder = make_workplace(tmp_path_factory.mktemp("slurm"))
    ds = json.loads((folder / "ds.json").read_text())
    ds["expert_parallel"]["autoep_size"] = 2  # `auto` stays within a node, and jobs differ in their nodes
    (folder / "ds.json").write_text(json.dumps(ds))
    write_settings(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if MISSING in str(report.longrepr)]
    if skipped:
        text = f"{len(skipped)} SLURM TESTS DID NOT RUN: {MISSING}. Debian: apt-get install slurm-wlm munge"
        terminalreporter.write_line(text, red=True, bold=True)
