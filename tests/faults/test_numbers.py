"""Numbers that are not finite, and spikes, in a run started as users start it."""

from __future__ import annotations

from typing import Any

import pytest

from cpt.checkpoint.given_up_batches import read_rollbacks
from cpt.checkpoint.manifest import PARTS, read_manifest
from cpt.checkpoint.reader import list_steps, step_folder
from tests.dist.test_layout_parity import stored_tensors
from tests.support.service import run_to_end
from tests.support.tensors import differing

pytestmark = pytest.mark.dist

LONG = ("--set", "train.total_steps=12")


def nan_at(*steps: int) -> str:
    """Return the faults that make rank 1's loss NaN at these steps, as often as each is named."""
    return ",".join(f"forward:1:{step}:nan" for step in steps)


@pytest.mark.case(
    "N3", "rollback to the newest checkpoint, batches given up and recorded, also after a restart"
)
@pytest.mark.case("N1", "logged with row ids; schedule and rows go on")
def test_three_in_a_row_roll_back_give_up_their_batches_and_stay_given_up(workplace) -> None:
    code, run = run_to_end(
        workplace, "rolled", *LONG, "--set", "train.stop_at_step=8", fault=nan_at(2, 5, 6, 7)
    )
    assert code == 0, run.output
    skipped = run.events("skipped_update")
    (rollback,) = run.events("rollback")
    assert [event["step"] for event in skipped] == [2, 5, 6, 7]
    assert [event["in_a_row"] for event in skipped] == [1, 1, 2, 3]
    assert [len(event["rows"]) for event in skipped] == [2, 2, 2, 2]
    assert "not finite at step 7: loss nan" in run.output
    assert "(3 in a row, 4 in all); rows " in run.output
    wanted = {"from_step": 7, "to_step": 4, "first_batch": 4, "last_batch": 7}
    assert read_rollbacks(run.run_dir) == [wanted] and wanted.items() <= rollback.items()
    assert "rolled back from step 7 to step-00000004; batches 4 to 6 are given up." in run.output
    assert run.step_numbers() == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    progress = state_of(run, 8)["progress"]
    assert (progress["updates"], progress["skip_ranges"]) == (7, [[4, 7]])
    code, run = run_to_end(workplace, "rolled", *LONG)
    assert code == 0 and state_of(run, 12)["progress"]["skip_ranges"] == [[4, 7]], run.output
    rates = {event["step"]: event["lr"] for event in run.steps()}
    assert len(set(rates.values())) == 12, "the schedule follows the steps"


def state_of(run: Any, step: int) -> dict[str, Any]:
    return read_manifest(step_folder(run.run_dir, step)).state


@pytest.mark.case("N3", "second rollback: exit 70, newest checkpoint intact")
def test_second_rollback_ends_the_run_with_70(workplace) -> None:
    code, run = run_to_end(workplace, "twice", *LONG, fault=nan_at(5, 6, 7, 5, 6, 7))
    assert code == 70 and "rolled back 1 times already (train.max_rollbacks)" in run.output, (
        run.output
    )
    assert list_steps(run.run_dir)[0] == 4


@pytest.mark.case("N3", "nothing to roll back to: exit 70")
def test_without_a_checkpoint_three_in_a_row_end_the_run_with_70(workplace) -> None:
    code, run = run_to_end(
        workplace, "none", "--set", "checkpoint.interval_steps=0", fault=nan_at(1, 2, 3)
    )
    assert code == 70 and "there is no checkpoint to roll back to" in run.output, run.output
    assert "look at its first weights (model.init " in run.output, run.output
    assert list_steps(run.run_dir) == []


@pytest.mark.case(
    "N3", "killed between rollback and next checkpoint: the batches stay given up, same weights"
)
def test_kill_after_a_rollback_does_not_forget_it(workplace) -> None:
    second_visit = "optimizer_step:1:5:scale=1,optimizer_step:1:5:kill"
    code, run = run_to_end(workplace, "kept", *LONG, fault=nan_at(5, 6, 7))
    assert code == 0, run.output
    code, killed = run_to_end(
        workplace, "forgetful", *LONG, fault=f"{nan_at(5, 6, 7)},{second_visit}"
    )
    assert code != 0 and killed.events("rollback") and list_steps(killed.run_dir)[0] == 4
    code, killed = run_to_end(workplace, "forgetful", *LONG)
    assert code == 0, killed.output
    for part in PARTS:
        expected = stored_tensors(step_folder(run.run_dir, 12), part)
        got = stored_tensors(step_folder(killed.run_dir, 12), part)
        assert differing(expected, got) == []


@pytest.mark.case("N4", "in a run: logged with rows and limits, nothing else happens")
def test_spike_is_logged_with_its_rows_and_the_run_goes_on(workplace) -> None:
    steps = (
        "--set",
        "train.total_steps=22",
        "--set",
        "train.schedule=constant",
        "--set",
        "checkpoint.interval_steps=0",
    )
    code, run = run_to_end(workplace, "spike", *steps, fault="forward:*:20:scale=50")
    assert code == 0, run.output
    (spike,) = run.events("spike")
    assert spike["step"] == 20 and len(spike["rows"]) == 2 and spike["loss"] > spike["loss_limit"]
    assert "spike at step 20: loss " in run.output and len(run.steps()) == 22
