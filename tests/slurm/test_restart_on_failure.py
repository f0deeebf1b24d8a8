"""A job that failed is started again as often as the setting says, without the node at fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.job_scripts import Bench


def failure(exit_code: int, *, rank: int = 1, signal: int = 0, node: str = "n2") -> str:
    """Return last_failure.json as a run writes it."""
    values = {"exit_code": exit_code, "cause": 'rank 1: "a, b"', "step": 7, "rank": rank}
    values |= {"host": "n2.cluster", "node": node, "signal": signal, "time": 1.5}
    return json.dumps(values, indent=2)


def save_checkpoint(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def fail(bench: Bench, code: int, **variables: str) -> tuple[bool, str]:
    """Run a job that fails; return whether it was queued again, and what it said."""
    (bench.folder / "calls").unlink(missing_ok=True)
    settings = {"CPT_RESTART_ON_FAILURE": "1", "SLURM_JOB_NODELIST": "n1,n2"}
    ended, output = bench.run(
        "train.sbatch", **{**settings, "DEEPSPEED_EXIT": str(code), **variables}
    )
    assert ended == code, output
    return "requeue 17" in bench.calls("scontrol"), output


@pytest.mark.parametrize(
    ("code", "again"), [(70, True), (71, True), (247, True), (78, False), (65, False), (74, False)]
)
def test_only_errors_that_another_start_may_not_have_are_tried_again(
    bench: Bench, code: int, again: bool
) -> None:
    queued, output = fail(bench, code)
    assert queued == again, output
    assert (f"failed with {code} and queued again" in output) == again
    assert not fail(bench, code, CPT_RESTART_ON_FAILURE="0")[0]


def test_failing_again_without_a_newer_checkpoint_is_the_end(bench: Bench) -> None:
    save_checkpoint(bench.run_dir, 40)
    assert fail(bench, 70)[0]
    queued, output = fail(bench, 70, SLURM_RESTART_COUNT="1")
    assert not queued and "failed 2 times with step 40 as the newest checkpoint" in output, output
    save_checkpoint(bench.run_dir, 60)
    assert fail(bench, 70, SLURM_RESTART_COUNT="1")[0]
    queued, output = fail(bench, 71, SLURM_RESTART_COUNT="2")
    assert not queued
    queued, output = fail(bench, 71, SLURM_RESTART_COUNT="2", CPT_RESTART_ON_FAILURE="2")
    assert queued
    # a person's new job begins anew, and the cap on all restarts holds
    assert fail(bench, 70)[0]
    queued, output = fail(bench, 247, SLURM_RESTART_COUNT="20", CPT_RESTART_ON_FAILURE="9")
    assert not queued and "20 restarts used of CPT_MAX_RESTARTS=20" in output


@pytest.mark.parametrize(
    ("written", "excluded"),
    [
        (failure(70, signal=9), "n2"),
        (failure(71), "n2"),
        (failure(71, rank=0, node=""), "n2"),  # by its host name, without the domain
        (failure(70, rank=1), "n2"),
        (failure(70, rank=0), None),  # an error of all ranks is no node's
        (failure(71, node="n7"), None),  # not of this job
        (failure(71, node="n2; touch x"), None),
        ("{", None),
    ],
    ids=["killed", "hung", "by-host", "one-rank", "all-ranks", "foreign", "odd-name", "damaged"],
)
def test_node_that_is_known_to_be_at_fault_is_excluded(
    bench: Bench, written: str, excluded: str | None
) -> None:
    queued, output = fail(bench, 247, FAILURE=written)
    assert queued, output
    updates = [call for call in bench.calls("scontrol") if call.startswith("update")]
    assert updates == ([] if excluded is None else [f"update JobId=17 ExcNodeList={excluded}"])


def test_nodes_that_were_excluded_before_stay_so(bench: Bench) -> None:
    fail(bench, 71, FAILURE=failure(71), EXCLUDED="n[5-6]")
    assert "update JobId=17 ExcNodeList=n[5-6],n2" in bench.calls("scontrol")


def test_failure_of_an_earlier_start_blames_no_node_now(bench: Bench) -> None:
    bench.run_dir.mkdir()
    (bench.run_dir / "last_failure.json").write_text(failure(71))
    queued, output = fail(bench, 70)
    assert queued and not [call for call in bench.calls("scontrol") if "update" in call], output


def test_job_that_was_canceled_does_not_come_back(bench: Bench) -> None:
    process = bench.start(
        "train.sbatch",
        DEEPSPEED_OBEYS=str(bench.run_dir),
        DEEPSPEED_EXIT="70",
        CPT_RESTART_ON_FAILURE="1",
    )
    bench.wait_for("deepspeed")
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 70 and "told to end (SIGTERM): no other start" in output
    assert "requeue 17" not in bench.calls("scontrol")


def test_job_on_all_ranks_of_a_command_is_not_tried_again(bench: Bench) -> None:
    words = ("evaluate", "--out", str(bench.folder / "now.json"))
    code, output = bench.run(
        "offline.sbatch", *words, DEEPSPEED_EXIT="70", CPT_RESTART_ON_FAILURE="1"
    )
    assert code == 70 and "not queued again" in output


def test_link_in_place_of_the_list_of_failed_starts_is_not_written_through(bench: Bench) -> None:
    victim = bench.folder / "victim"
    victim.write_text("mine\n", encoding="utf-8")
    bench.run_dir.mkdir()
    (bench.run_dir / "failed-starts").symlink_to(victim)
    again, _ = fail(bench, 70, SLURM_RESTART_COUNT="1")
    assert not again
    assert victim.read_text(encoding="utf-8") == "mine\n"
