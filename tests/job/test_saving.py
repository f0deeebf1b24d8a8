"""A save that fails or is slow ends nothing, and the guard can go back to what was really saved."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.checkpoint.save_in_progress import Published
from cpt.config import GuardSection
from cpt.errors import RequeueRequested, StorageError
from cpt.guard.ladder import GuardState
from cpt.job import saving
from cpt.job.guard_levers import note_green
from cpt.job.job import Job
from cpt.job.progress import write_guard_rollbacks
from cpt.job.saving import ACCOUNT_SECONDS, end, leave, periodic_save
from cpt.resilience.stop import StopRequest


class FakeSaver:
    """Notes what is asked of it; the save in flight fails if it is told to."""

    way = "copy"

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.kept: int | None = None
        self.step_in_flight: int | None = None
        self.fails = False
        self.is_kept_in_flight = False

    def finish(self) -> Published | None:
        self.calls.append("finish")
        step, self.step_in_flight = self.step_in_flight, None
        if step is None:
            return None
        if self.fails:
            raise StorageError("no space left")
        if self.is_kept_in_flight:
            self.kept = step
        return self._published(step)

    def start(self, step: int, state: Any, *, keep: bool) -> None:
        self.calls.append(("start", step, keep))
        self.step_in_flight, self.is_kept_in_flight = step, keep

    def save_now(self, step: int, state: Any, *, keep: bool, in_haste: bool) -> Published:
        self.calls.append(("save_now", step, keep, in_haste))
        return self._published(step)

    def keep(self, step: int) -> None:
        self.kept = step

    def close_in_haste(self, max_seconds: float) -> None:
        self.calls.append(("close", max_seconds))

    def expected_bytes(self) -> int:
        return 0

    def _published(self, step: int) -> Published:
        return Published(
            step=step,
            folder=Path(f"step-{step:08d}"),
            seconds=1.0,
            blocked_seconds=0.0,
            update_wait_seconds=0.0,
            way="copy",
            num_bytes=0,
            linked_bytes=0,
        )


def job_at(step: int, state: GuardState) -> Any:
    """Return a run of one process that is at a step."""
    calls: list[Any] = []
    events: list[dict[str, Any]] = []
    return SimpleNamespace(
        calls=calls,
        events=events,
        saver=FakeSaver(calls),
        guard=SimpleNamespace(state=state),
        progress=SimpleNamespace(step=step),
        state=dict,
        clock=SimpleNamespace(enter=lambda phase, step: calls.append(phase)),
        topology=SimpleNamespace(rank=0, control_group=None),
        telemetry=SimpleNamespace(log=events.append),
        report=None,
        ledger=None,
        stop=StopRequest({}),
        config=SimpleNamespace(
            checkpoint=SimpleNamespace(stop_budget_seconds=50),
            guard=GuardSection(interval_steps=10),
        ),
    )


def test_a_failed_save_leaves_the_guard_the_green_checkpoint_that_there_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = job_at(10, GuardState(green=True))
    for step in (10, 20):
        job.progress.step = step
        note_green(job)
        periodic_save(job)
    assert job.saver.kept == 10 and job.guard.state.green_step == 20
    job.saver.fails = True
    job.guard.state = GuardState(green=False, green_step=20)
    job.progress.step = 30
    note_green(job)
    with caplog.at_level(logging.ERROR):
        periodic_save(job)
    assert "the checkpoint of step 20 was not saved, the run goes on: no space left" in caplog.text
    assert job.events[-1] == {"event": "checkpoint_failed", "step": 20, "reason": "no space left"}
    assert job.guard.state.green_step == 10, "what the save of step 30 will say"
    assert job.calls[-1] == ("start", 30, False)


@pytest.mark.parametrize(
    "settings", [GuardSection(), GuardSection(interval_steps=10, policy="warn")]
)
def test_a_guard_that_does_not_act_keeps_no_checkpoint_from_deletion(
    settings: GuardSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt.job.job.on_first_rank", lambda _, do: do())
    job = job_at(10, GuardState(green=True))
    job.config.guard = settings
    note_green(job)
    periodic_save(job)
    assert job.guard.state.green_step is None and job.calls[-1] == ("start", 10, False)
    # nor does a start that was told so since
    job.run_dir = tmp_path
    job.context = SimpleNamespace(control_group=None, observe=False)
    job.reweigh = lambda state: None
    job.has_begun = False
    Job._restore_guard(job, SimpleNamespace(guard=GuardState(green_step=10).to_json()))
    assert job.saver.kept is None and job.guard.state.green_step == 10


def test_a_failed_save_that_was_not_green_takes_nothing_back() -> None:
    job = job_at(20, GuardState(green=False, green_step=10))
    job.saver.keep(10)
    periodic_save(job)
    job.saver.fails = True
    job.progress.step = 30
    periodic_save(job)
    assert job.guard.state.green_step == 10


def test_waiting_for_the_save_in_flight_has_the_time_of_a_save() -> None:
    job = job_at(10, GuardState())
    periodic_save(job)
    assert job.calls == ["save", "finish", ("start", 10, False)]


def test_leaving_waits_for_deletions_no_longer_than_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saving, "agreed_reason", lambda stop, group: "SIGTERM")
    limits: list[float] = []
    monkeypatch.setattr(saving, "end", lambda job, code, cause, seconds: limits.append(seconds))
    job = job_at(10, GuardState())
    with pytest.raises(RequeueRequested, match="after step 10: SIGTERM"):
        leave(job)
    assert limits == [ACCOUNT_SECONDS], "the log of a long run is not read to its end"
    *before, (last, seconds) = job.calls
    assert before == ["save", "finish", ("save_now", 10, False, True)]
    assert last == "close" and 40 < seconds <= 50


def test_run_whose_log_is_too_long_to_read_in_time_ends_without_the_account(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = job_at(10, GuardState())
    told: list[str] = []
    asked: list[float] = []
    job.context = SimpleNamespace(
        ending=SimpleNamespace(tell=lambda telemetry, code, cause: told.append(cause))
    )
    job.telemetry.goodput = asked.append  # returns None
    with caplog.at_level(logging.INFO):
        end(job, 75, "stopped", ACCOUNT_SECONDS)
    assert told == ["stopped"] and asked == [ACCOUNT_SECONDS] and job.events == []
    assert "the log is too long to account for the time of the run" in caplog.text


@pytest.mark.parametrize(("saved", "moves"), [(False, True), (False, False), (True, True)])
def test_guard_that_is_switched_on_again_says_that_replay_is_as_planned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    saved: bool,
    moves: bool,
) -> None:
    monkeypatch.setattr("cpt.job.job.on_first_rank", lambda _, do: do())
    job = job_at(30, GuardState())
    job.run_dir = tmp_path
    job.context = SimpleNamespace(control_group=None, observe=False)
    job.has_begun = False

    def reweigh(state: GuardState) -> None:
        if moves:
            job.ledger = "with the weights of the mix"

    job.reweigh = reweigh
    Job._restore_guard(job, SimpleNamespace(guard=GuardState().to_json() if saved else None))
    told = "step 30 was saved without a guard"
    assert (told in caplog.text) == (moves and not saved)


def test_a_later_start_keeps_the_green_checkpoint_from_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt.job.job.on_first_rank", lambda _, do: do())
    job = job_at(30, GuardState())
    job.run_dir = tmp_path
    job.context = SimpleNamespace(control_group=None, observe=False)
    job.reweigh = lambda state: None
    job.has_begun = False
    stored: Any = SimpleNamespace(guard=GuardState(green=False, green_step=10).to_json())
    Job._restore_guard(job, stored)
    assert job.saver.kept == job.guard.state.green_step == 10
    assert not job.events
    # back behind a rollback of the guard: what was measured there is left out, and that is logged
    later = GuardState(green_step=40, rollbacks=1).to_json()
    write_guard_rollbacks(tmp_path, [later])
    Job._restore_guard(job, stored)
    assert job.saver.kept == job.guard.state.green_step == 10 and not job.guard.state.green
    (event,) = job.events
    assert event["event"] == "guard_restored" and event["after"] == job.guard.state.to_json()
