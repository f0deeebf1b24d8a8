"""Whatever dies during a save, the newest complete checkpoint loads, and the weights end the same.

Saves are synchronous unless a test says otherwise, so that it is known which checkpoint is there
when a rank dies.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from cpt.checkpoint.manifest import MANIFEST, read_manifest
from cpt.checkpoint.reader import list_steps, refusal_of, step_folder
from cpt.telemetry.metrics import read_events
from tests.support.checkpoints import flip
from tests.support.launcher import ROOT, launch
from tests.support.service import STEPS, Service, run_to_end, service

pytestmark = pytest.mark.dist
ASYNC = ("--set", "checkpoint.async_save=true")
STREAM = ("--set", "checkpoint.async_save=stream")


def shards(run_dir: Path, step: int = STEPS) -> dict[str, str]:
    """Return the hash of each rank's file; in the same layout, equal weights are equal bytes."""
    files = read_manifest(step_folder(run_dir, step)).files
    return {record.name: record.xxh3_128 for record in files if record.name.endswith(".distcp")}


def hidden(run_dir: Path) -> set[str]:
    return {entry.name for entry in (run_dir / "checkpoints").glob(".*")}


def check_rerun(
    workplace: Path, run: Service, undisturbed: Service, expected_start: int, *arguments: str
) -> None:
    """Check that the same command goes on from the right step and ends with the undisturbed run's
    weights.
    """
    code, again = run_to_end(workplace, run.run_dir.name, *arguments)
    assert code == 0, again.output
    start = f"resuming from {run.run_dir.name}/checkpoints/step-{expected_start:08d}"
    assert (start in again.output) == (expected_start > 0), again.output
    assert shards(run.run_dir) == shards(undisturbed.run_dir)
    assert hidden(run.run_dir) == set(), "temporary folders are removed"


POINTS = ["save_stage", "save_write", "save_hash", "save_manifest", "save_rename", "save_published"]


def ranks_only(workplace: Path, run_dir: Path) -> list[int]:
    """Run two ranks without the launcher, with which the kill matrix would take most of an hour.

    Returns:
        Exit codes by rank.
    """
    arguments = ["--ds_config", str(workplace / "ds.json")]
    arguments += ["--config", str(workplace / "run.yaml")]
    arguments += ["--run_dir", str(run_dir)]
    return launch(ROOT / "cpt" / "run.py", 2, arguments)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.case(
    "C2",
    "resumes from the previous checkpoint, after the rename from the new one; same final weights",
)
def test_kill_at_a_point_of_a_save_loses_nothing_that_was_published(
    workplace, undisturbed, point, rank, monkeypatch
) -> None:
    run_dir = workplace / f"c2-{point}-{rank}"
    monkeypatch.setenv("CPT_ALLOW_FAULTS", "1")
    monkeypatch.setenv("CPT_FAULT", f"{point}:{rank}:4:kill")
    codes = ranks_only(workplace, run_dir)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0, codes
    published = list_steps(run_dir)
    possible = [[2]]
    if point == "save_published":
        possible = [[4, 2]]
    elif point == "save_rename" and rank == 1:
        # Rank 1 has no work of its own there, and rank 0 may have gone on with its part by then.
        possible = [[2], [4, 2]]
    assert published in possible, published
    for step in published:
        assert refusal_of(step_folder(run_dir, step)) is None
    monkeypatch.delenv("CPT_FAULT")
    assert ranks_only(workplace, run_dir) == [0, 0]
    events = read_events(run_dir / "metrics.jsonl")
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, *range(published[0] + 1, STEPS + 1)]
    assert shards(run_dir) == shards(undisturbed.run_dir) and hidden(run_dir) == set()


@pytest.mark.case("C3", "as C2, all ranks at once, in mid save")
def test_power_cut_during_a_save_leaves_the_previous_checkpoint(workplace, undisturbed) -> None:
    code, run = run_to_end(workplace, "c3", fault="save_hash:1:4:killgroup")
    assert code != 0 and list_steps(run.run_dir) == [2], run.output
    assert hidden(run.run_dir) == {".tmp-step-00000004"}, run.output
    check_rerun(workplace, run, undisturbed, 2)


@pytest.mark.case(
    "C4", "half-deleted directory is ignored; its deletion is finished by the next save"
)
def test_crash_while_an_old_checkpoint_is_deleted(workplace) -> None:
    longer = ("--set", "train.total_steps=8")
    code, run = run_to_end(workplace, "c4", *longer, fault="prune:0:2:kill")
    assert code != 0 and list_steps(run.run_dir) == [6, 4, 2], run.output
    half_deleted = step_folder(run.run_dir, 2)
    assert not (half_deleted / MANIFEST).exists() and list(half_deleted.iterdir())
    code, again = run_to_end(workplace, "c4", *longer)
    assert code == 0 and "step-00000006" in again.output, again.output
    assert list_steps(run.run_dir) == [8, 6]


@pytest.mark.case(
    "C14", "the step being written is not listed, the previous one loads, same final weights"
)
@pytest.mark.parametrize(
    ("way", "fault"),
    [
        (ASYNC, "save_copy:0:4:kill"),
        (ASYNC, "save_hash:1:4:killgroup"),
        (STREAM, "save_write:1:4:kill"),
        pytest.param(ASYNC, "save_stage:1:4:kill", marks=pytest.mark.slow),
        pytest.param(ASYNC, "save_write:0:4:kill", marks=pytest.mark.slow),
        pytest.param(ASYNC, "save_manifest:0:4:kill", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1].partition("=")[2],
)
def test_kill_during_an_asynchronous_save(workplace, undisturbed, way, fault) -> None:
    name = f"c14-{fault.replace(':', '-')}-{len(way[1])}"
    # step 2 is read so late that step 3 would have changed it, did its update not wait
    late = "save_copy:1:2:sleep=3" if way == ASYNC else "save_write:1:2:sleep=3"
    code, run = run_to_end(workplace, name, *way, fault=f"{late},{fault}")
    published = list_steps(run.run_dir)
    assert code != 0 and 4 not in published and published in ([2], []), run.output
    check_rerun(workplace, run, undisturbed, published[0] if published else 0, *way)


@pytest.mark.case(
    "C14", "a write that fails in the background is told at a step boundary; training goes on"
)
def test_background_write_that_fails_is_told_and_training_goes_on(workplace, undisturbed) -> None:
    code, run = run_to_end(workplace, "c14-full", *ASYNC, fault="save_write:1:2:enospc")
    assert code == 0, run.output
    assert "the checkpoint of step 2 was not saved, the run goes on" in run.output, run.output
    assert "no space left" in run.output
    failed = run.events("checkpoint_failed")
    assert [event["step"] for event in failed] == [2]
    assert list_steps(run.run_dir) == [6, 4] and hidden(run.run_dir) == set()
    assert shards(run.run_dir) == shards(undisturbed.run_dir), (
        "an asynchronous save changes no weight"
    )


@pytest.mark.case(
    "C15", "never two in flight, published in the order of steps; a stop publishes both"
)
def test_overlapping_saves_and_a_stop_in_the_middle_of_one(workplace) -> None:
    every_step = (
        *ASYNC,
        "--set",
        "checkpoint.interval_steps=1",
        "--set",
        "checkpoint.keep_last=10",
    )
    faults = "save_write:1:1:sleep=8,save_write:1:3:sleep=8,forward:1:4:usr1"
    code, run = run_to_end(workplace, "c15", *every_step, fault=faults)
    assert code == 75
    assert "waiting for the checkpoint of step 1, still being written by ranks [1]" in run.output
    assert [event["step"] for event in run.events("checkpoint")] == [1, 2, 3, 4]
    assert list_steps(run.run_dir) == [4, 3, 2, 1]
    for step in (1, 2, 3, 4):
        assert refusal_of(step_folder(run.run_dir, step)) is None


@pytest.fixture
def copy_of_undisturbed(
    workplace: Path, undisturbed: Service, request: pytest.FixtureRequest
) -> Path:
    run_dir = workplace / request.node.name
    shutil.copytree(undisturbed.run_dir, run_dir)
    return run_dir


@pytest.mark.case(
    "C8", "exit 74 with each reason, nothing overwritten; a chosen step is not replaced by another"
)
def test_nothing_but_damaged_checkpoints_ends_the_run(workplace, copy_of_undisturbed) -> None:
    run_dir = copy_of_undisturbed
    flip(step_folder(run_dir, 6) / "__1_0.distcp", 1000)
    longer = ("--set", "train.total_steps=8", "--set", "train.accept_schedule_change=true")
    code, run = run_to_end(workplace, run_dir.name, "--resume", "6", *longer)
    assert code == 74 and "step-00000006/__1_0.distcp" in run.output, run.output
    assert list_steps(run_dir) == [6, 4]
    flip(step_folder(run_dir, 4) / ".metadata", 100)
    code, run = run_to_end(workplace, run_dir.name, *longer)
    assert code == 74
    assert "step-00000006/__1_0.distcp" in run.output
    assert "step-00000004/.metadata" in run.output
    assert "Training does not restart at step 0" in run.output and list_steps(run_dir) == [6, 4]


@pytest.mark.case(
    "C11", "the second job exits 78 and names host and pid; a dead job's lock is taken over"
)
def test_two_jobs_on_one_run_directory(workplace) -> None:
    with service(workplace, "c11", fault="forward:0:2:sleep=60") as first:
        first.wait_for("fault injected: forward")
        code, second = run_to_end(workplace, "c11")
        holder = f"in use by process {first.rank_pids()[0]} on "
        assert code == 78 and holder in second.output, second.output
        assert first.process.poll() is None
    code, third = run_to_end(workplace, "c11")
    assert code == 0 and "was left by process" in third.output, third.output
