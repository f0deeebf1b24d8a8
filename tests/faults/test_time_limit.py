"""A real Slurm and a real time limit: nobody but Slurm sends the signal."""

from __future__ import annotations

import pytest

from tests.support.service import STEPS, run_to_end
from tests.support.slurm_cluster import (
    make_slurm_workplace,
    require_slurm,
    running_cluster,
    submit_training,
    tensor_hashes,
)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]


@pytest.mark.case(
    "S5",
    "a true time limit of four minutes: saved before it, as often as needed; weights bit-identical",
)
def test_run_longer_than_its_time_limit_finishes(tmp_path) -> None:
    """Slurm sends SIGUSR1 60 to 120 s before the end; the steps take 30 s each, 180 s together."""
    require_slurm()
    make_slurm_workplace(tmp_path)
    sleeps = ",".join(f"forward:*:{step}:sleep=30" for step in range(1, STEPS + 1))
    options = ("--gpus-per-node=2", "--time=4", "--signal=B:USR1@60")
    with running_cluster() as cluster:
        job = submit_training(
            cluster, tmp_path, "limited", *options, CPT_FAULT=sleeps, CPT_MAX_RESTARTS="8"
        )
        fields = cluster.wait(job, timeout_seconds=900)
        output = cluster.output(job)
    assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) >= 1, output
    assert output.count("saved and queued again") == int(fields["Restarts"])
    # The last signal may come too late to matter.
    assert output.count("got SIGUSR1: wrote") >= int(fields["Restarts"])
    code, whole = run_to_end(tmp_path, "whole")
    assert code == 0, whole.output
    assert tensor_hashes(tmp_path / "limited") == tensor_hashes(whole.run_dir)
