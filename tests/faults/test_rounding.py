"""A run with rounded experts that is killed, or rolls back, ends as one that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.checkpoint.manifest import PARTS, read_manifest
from cpt.checkpoint.reader import list_steps, step_folder
from cpt.checkpoint.run_state import quantized_by
from tests.dist.test_layout_parity import stored_tensors
from tests.support.service import STEPS, Service, run_to_end
from tests.support.tensors import differing

pytestmark = pytest.mark.dist

ROUNDED = (
    "--set",
    "train.quantize={experts: mxfp4, start_step: 3, exponent: ceil}",
)
SKIPPED = ",".join(f"forward:1:{step}:nan" for step in (5, 6, 7))
LONG = (*ROUNDED, "--set", "train.total_steps=10")


def assert_same_state(run: Service, other: Service, step: int) -> None:
    for part in PARTS:
        expected = stored_tensors(step_folder(run.run_dir, step), part)
        got = stored_tensors(step_folder(other.run_dir, step), part)
        assert differing(expected, got) == []


@pytest.fixture(scope="module")
def rounded(workplace: Path) -> Service:
    """Return a run that nothing happened to, whose experts are rounded after its third step."""
    code, run = run_to_end(workplace, "rounded", *ROUNDED)
    assert code == 0, run.output
    return run


def test_rounding_begins_in_the_middle_and_the_checkpoints_tell(
    workplace: Path, rounded: Service, undisturbed: Service
) -> None:
    told = "after step 3: experts are rounded to MXFP4 from here on, exponents by the rule ceil"
    assert rounded.output.count(told) == 1
    losses = [event["loss"] for event in rounded.steps()]
    plain = [event["loss"] for event in undisturbed.steps()]
    same = [number for number in range(STEPS) if losses[number] == plain[number]]
    assert same == [0, 1, 2]
    rules = {}
    for step in list_steps(rounded.run_dir):
        rules[step] = quantized_by(read_manifest(step_folder(rounded.run_dir, step)))
    assert rules == {4: "ceil", 6: "ceil"}


@pytest.mark.case("C1", "killed between an update and its rounding: same final weights")
def test_kill_between_update_and_rounding_changes_no_bit(workplace: Path, rounded: Service) -> None:
    code, killed = run_to_end(workplace, "killed", *ROUNDED, fault="rounding:1:5:kill")
    assert code != 0 and list_steps(killed.run_dir)[0] == 4
    code, killed = run_to_end(workplace, "killed", *ROUNDED)
    assert code == 0, killed.output
    assert "after step 4: experts are rounded to MXFP4 from here on" in killed.output
    assert_same_state(rounded, killed, STEPS)


@pytest.mark.case("N3", "with rounded experts: the weights gone back to are rounded, too")
def test_rollback_rounds_again_as_a_start_does(workplace: Path) -> None:
    code, run = run_to_end(workplace, "rolled_rounded", *LONG, fault=SKIPPED)
    assert code == 0 and run.events("rollback"), run.output
    after = "optimizer_step:1:5:scale=1,optimizer_step:1:5:kill"
    code, killed = run_to_end(workplace, "rolled_killed", *LONG, fault=f"{SKIPPED},{after}")
    assert code != 0 and killed.events("rollback") and list_steps(killed.run_dir)[0] == 4
    code, killed = run_to_end(workplace, "rolled_killed", *LONG)
    assert code == 0, killed.output
    assert_same_state(run, killed, 10)
