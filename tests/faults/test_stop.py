"""Whoever is asked to stop, whenever: all ranks leave together with 75, one checkpoint or none, and
nobody stays.
"""

from __future__ import annotations

import os
import signal

import pytest

from cpt.checkpoint.reader import list_steps, refusal_of, step_folder
from cpt.resilience.processes import parent_of
from tests.support.service import Service, run_to_end, service

pytestmark = pytest.mark.dist
GUARD = (
    "--set",
    "guard.enabled=true",
    "--set",
    "guard.interval_steps=2",
    "--set",
    "guard.policy=warn",
)
NO_SAVES = ("--set", "checkpoint.interval_steps=0")


def check_stopped(code: int, run: Service, steps: list[int]) -> None:
    """Check for exit code 75 and complete checkpoints of these steps, newest first.

    The newest must be of the last step that was done.
    """
    assert code == 75, run.output
    assert list_steps(run.run_dir) == steps, run.output
    for step in steps:
        assert refusal_of(step_folder(run.run_dir, step)) is None
    done = run.step_numbers()
    assert (done[-1:] or [0]) == (steps[:1] or [0])


@pytest.mark.parametrize(
    ("name", "signal_name"),
    [
        pytest.param(
            "term",
            "SIGTERM",
            marks=pytest.mark.case("S1", "both ranks save the same step and exit 75"),
        ),
        pytest.param(
            "usr1",
            "SIGUSR1",
            marks=pytest.mark.case("S2", "both ranks save the same step and exit 75"),
        ),
    ],
)
def test_signal_to_one_rank_stops_all_after_that_step(workplace, name, signal_name) -> None:
    code, run = run_to_end(workplace, f"stop-{name}", *NO_SAVES, fault=f"forward:1:3:{name}")
    check_stopped(code, run, [3])
    assert f"stopped on request after step 3: {signal_name} (rank 1). Saved" in run.output


@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="SIGHUP is ignored, as by nohup"
)
def test_closed_terminal_stops_all_ranks_after_the_step_in_progress(workplace) -> None:
    """A terminal that is closed sends SIGHUP to the whole group."""
    with service(workplace, "stop-hangup", *NO_SAVES, fault="forward:*:3:sleep=3") as run:
        run.wait_for("fault injected: forward")
        for pid in run.rank_pids().values():
            os.kill(pid, signal.SIGHUP)
        code = run.wait()
        run.check_nothing_left()
    check_stopped(code, run, [3])
    assert "stopped on request after step 3: SIGHUP" in run.output


@pytest.mark.case("S3", "all ranks save the same step and exit 75; the file is consumed")
def test_stop_file_stops_all_ranks(workplace) -> None:
    with service(workplace, "stop-file", *NO_SAVES, fault="forward:*:2:sleep=3") as run:
        run.wait_for("fault injected: forward")
        (run.run_dir / "STOP").touch()
        code = run.wait()
        run.check_nothing_left()
    check_stopped(code, run, [2])
    assert not (run.run_dir / "STOP").exists()


@pytest.mark.parametrize(
    ("name", "fault", "steps", "words"),
    [
        ("loading", "load:1:0:term", [], "before the checkpoint was loaded|before the first step"),
        ("first", "before_first_step:0:0:usr1", [], "before the first step"),
        ("save", "save_write:1:2:term", [2], "after step 2"),
        ("twice", "forward:1:2:term,save_write:1:2:term,save_hash:0:2:usr1", [2], "after step 2"),
    ],
)
@pytest.mark.case("S4", "before step 1, during a save, twice: one checkpoint or none, exit 75")
def test_stop_at_any_time_leaves_one_checkpoint_or_none(
    workplace, name, fault, steps, words
) -> None:
    code, run = run_to_end(workplace, f"stop-{name}", fault=fault)
    check_stopped(code, run, steps)
    assert any(f"stopped on request {where}" in run.output for where in words.split("|")), (
        run.output
    )


@pytest.mark.case("S4", "during evaluation: it is broken off, the step is saved")
def test_stop_during_evaluation_breaks_it_off(workplace) -> None:
    options = (*GUARD, *NO_SAVES)
    code, run = run_to_end(workplace, "stop-evaluation", *options, fault="evaluate:1:2:term")
    check_stopped(code, run, [2])
    assert {event["step"] for event in run.events("guard")} == {0}


@pytest.mark.case(
    "S2", "a save that takes longer than its budget ends with 74; the previous checkpoint is intact"
)
def test_stop_save_that_takes_too_long_is_given_up(workplace) -> None:
    budget = ("--set", "checkpoint.stop_budget_seconds=4")
    fault = "forward:1:3:usr1,save_write:1:3:sleep=120"
    code, run = run_to_end(workplace, "budget", *budget, fault=fault)
    told = "saving step 3 before leaving took longer than 4 s"
    assert code == 74 and told in run.output, run.output
    assert list_steps(run.run_dir) == [2] and refusal_of(step_folder(run.run_dir, 2)) is None


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param(
            "deepspeed",
            signal.SIGTERM,
            marks=pytest.mark.case("S6", "ranks save and leave; no orphans"),
        ),
        pytest.param(
            "deepspeed", signal.SIGKILL, marks=pytest.mark.case("S6", "the same with SIGKILL")
        ),
        pytest.param(
            "launch",
            signal.SIGKILL,
            marks=pytest.mark.case("S8", "ranks save and leave; no orphans"),
        ),
        pytest.param(
            "launch", signal.SIGTERM, marks=pytest.mark.case("S8", "the same with SIGTERM")
        ),
    ],
)
def test_lost_launcher_leaves_no_orphans_and_a_checkpoint(workplace, victim, number) -> None:
    name = f"lost-{victim}-{number}"
    with service(workplace, name, *NO_SAVES, "--set", "train.total_steps=400") as run:
        run.wait_for("tokens/s")
        launcher = parent_of(run.rank_pids()[0])
        assert launcher is not None
        os.kill(run.process.pid if victim == "deepspeed" else launcher, number)
        run.check_nothing_left(within_seconds=60)
    steps = list_steps(run.run_dir)
    assert len(steps) == 1 and refusal_of(step_folder(run.run_dir, steps[0])) is None, run.output
    assert run.steps()[-1]["step"] == steps[0]
