"""After a pause the run goes on with what the guard knew where it goes on, and nothing newer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.checkpoint.reader import list_steps
from cpt.config import GuardSection
from cpt.guard.guard import Guard
from cpt.guard.ladder import GuardState
from cpt.guard.lever_limits import LeverLimits
from cpt.guard.text_judge import TextJudge
from cpt.job import guard_levers
from cpt.job import job as job_module
from cpt.job.guard_levers import go_on_after_pause
from cpt.job.job import Job
from cpt.job.progress import (
    PAUSE_FILE,
    Progress,
    forget_guard_pause,
    known_at,
    newest_guard_state,
    read_guard_pause,
    read_guard_rollbacks,
    write_guard_pause,
)

GREEN, PAUSED = 60, 100


def reading(step: int, state: str) -> dict[str, Any]:
    limits = {"tolerance": 1.0, "hard_limit": 5.0}
    return {"domain": "english", "step": step, "state": state, "lower_bound": 0.0, **limits}


SAVED = GuardState(
    yardsticks={"text": {"english": {"0.5": [1.0]}}},
    readings={"english": reading(GREEN, "green")},
)
"""State in the green checkpoint."""
STOPPED = GuardState(
    yardsticks={"text": {"english": {"0.5": [9.0]}}},
    readings={"english": reading(PAUSED, "red")},
    over={"english": 5},
    green=False,
    green_step=GREEN,
    paused="english is worse",
)
"""State in the checkpoint of the pause."""


class FakeJob:
    """A run that starts from the checkpoint of a pause."""

    def __init__(self, run_dir: Path, in_checkpoint: GuardState) -> None:
        self.run_dir = run_dir
        self.config: Any = SimpleNamespace(guard=GuardSection())
        self.topology: Any = SimpleNamespace(rank=0, control_group=None)
        text: Any = TextJudge({})
        text.kind, text.domain_names = "text", ["english"]
        self.guard = Guard([text], self.config, self.topology, run_dir)
        self.progress = SimpleNamespace(step=PAUSED)
        self.events: list[dict[str, Any]] = []
        self.telemetry = SimpleNamespace(log=self.events.append)
        self.clock = SimpleNamespace(enter=lambda *_: None)
        self.engine = SimpleNamespace(deepspeed=None)
        pause = read_guard_pause(run_dir, PAUSED)
        saved = newest_guard_state(in_checkpoint.to_json(), read_guard_rollbacks(run_dir), pause)
        self.guard.state = GuardState.from_json(saved)

    def restore(self, loaded: Any, *, accept_mix_change: bool) -> None:
        self.progress.step = loaded.step

    def reweigh(self, state: Any) -> None:
        pass


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for step in (GREEN, PAUSED):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    def load(*_: Any, set_aside: bool = True) -> Any:
        assert not set_aside
        return SimpleNamespace(step=GREEN, state=SimpleNamespace(guard=SAVED.to_json()))

    monkeypatch.setattr(guard_levers, "on_first_rank", lambda _, do: do())
    monkeypatch.setattr(guard_levers, "load_checkpoint", load)
    monkeypatch.setattr(guard_levers, "lever_limits", lambda _: LeverLimits(room=0.0))
    return tmp_path


def go_on(run_dir: Path, in_checkpoint: GuardState = STOPPED) -> FakeJob:
    job: Any = FakeJob(run_dir, in_checkpoint)
    go_on_after_pause(job)
    return job  # type: ignore[no-any-return]


def test_run_that_goes_back_forgets_what_was_measured_on_the_lost_weights(run_dir: Path) -> None:
    job = go_on(run_dir)
    state = job.guard.state
    assert (job.progress.step, state.rollbacks, state.paused) == (GREEN, 1, "")
    assert state.yardsticks == SAVED.yardsticks and state.readings == SAVED.readings
    assert state.green and not state.over
    assert job.events[0]["after"] == state.to_json()
    assert read_guard_rollbacks(run_dir) == [json.loads(json.dumps(state.to_json()))]
    assert list_steps(run_dir) == [GREEN]


def test_run_without_a_green_checkpoint_begins_to_count_anew_and_is_not_green(
    run_dir: Path,
) -> None:
    (run_dir / "checkpoints" / f"step-{GREEN:08d}").rmdir()
    job = go_on(run_dir)
    state = job.guard.state
    assert job.progress.step == PAUSED and not state.green
    assert "0.5" not in state.yardsticks["text"].get("english", {})
    assert state.readings == STOPPED.readings


def test_kill_before_the_rollback_is_noted_only_repeats_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        """The process is gone."""

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(guard_levers, "write_guard_rollbacks", kill)
        with pytest.raises(Killed):
            go_on(run_dir)
    assert list_steps(run_dir) == [PAUSED, GREEN] and not read_guard_rollbacks(run_dir)
    with monkeypatch.context() as dying:
        dying.setattr(guard_levers, "set_newer_aside", kill)
        with pytest.raises(Killed):
            go_on(run_dir)
    assert list_steps(run_dir) == [PAUSED, GREEN] and len(read_guard_rollbacks(run_dir)) == 1
    job = go_on(run_dir)
    assert job.guard.state.rollbacks == len(read_guard_rollbacks(run_dir)) == 1
    assert list_steps(run_dir) == [GREEN]


BEFORE_THE_LOOK = GuardState(
    yardsticks={"text": {"english": {"0.5": [4.0]}}},
    readings={"english": reading(80, "amber")},
    green=False,
    green_step=GREEN,
)
"""State in a checkpoint of the same step that was saved before the look which led to the pause."""


def test_a_pause_counts_although_its_step_was_saved_before_it_was_measured(run_dir: Path) -> None:
    write_guard_pause(run_dir, PAUSED, json.loads(json.dumps(STOPPED.to_json())))
    job = go_on(run_dir, BEFORE_THE_LOOK)
    state = job.guard.state
    assert (job.progress.step, state.rollbacks, state.paused) == (GREEN, 1, "")
    assert job.events[0]["reason"] == STOPPED.paused


def test_a_pause_that_the_run_has_gone_on_after_counts_no_more(run_dir: Path) -> None:
    write_guard_pause(run_dir, PAUSED, json.loads(json.dumps(STOPPED.to_json())))
    go_on(run_dir, BEFORE_THE_LOOK)
    assert list_steps(run_dir) == [GREEN]
    # the run comes to the same step again, and its checkpoint knows of the rollback
    (run_dir / "checkpoints" / f"step-{PAUSED:08d}").mkdir()
    again = replace(BEFORE_THE_LOOK, rollbacks=1)
    job = go_on(run_dir, again)
    assert job.guard.state == again and not job.events
    assert read_guard_pause(run_dir, PAUSED + 20) is None and (run_dir / PAUSE_FILE).exists()
    assert read_guard_pause(run_dir, GREEN) is None and (run_dir / PAUSE_FILE).exists()
    for _ in range(2):
        forget_guard_pause(run_dir)
    assert not (run_dir / PAUSE_FILE).exists()


def test_a_run_that_went_on_where_it_paused_is_not_paused_by_its_checkpoint_again(
    run_dir: Path,
) -> None:
    (run_dir / "checkpoints" / f"step-{GREEN:08d}").rmdir()
    after = go_on(run_dir).guard.state.to_json()
    stopped, rollbacks = STOPPED.to_json(), read_guard_rollbacks(run_dir)
    assert newest_guard_state(stopped, rollbacks) == stopped, "it may have been killed before"
    assert newest_guard_state(stopped, rollbacks, went_on=True) == json.loads(json.dumps(after))
    unmeasured = BEFORE_THE_LOOK.to_json()
    assert newest_guard_state(unmeasured, [], stopped, went_on=True) == unmeasured


def test_a_pause_says_nothing_of_a_checkpoint_that_knows_of_a_look_at_its_step(
    run_dir: Path,
) -> None:
    write_guard_pause(run_dir, PAUSED, json.loads(json.dumps(STOPPED.to_json())))
    green = replace(BEFORE_THE_LOOK, green=True, readings={"english": reading(PAUSED, "green")})
    job = go_on(run_dir, green)
    assert job.guard.state == green and not job.events


def test_a_run_that_goes_back_behind_a_rollback_knows_nothing_of_later_steps(
    run_dir: Path,
) -> None:
    after = go_on(run_dir).guard.state.to_json()
    amber = {"english": reading(20, "amber")}
    saved = replace(BEFORE_THE_LOOK, green_step=20, readings=amber).to_json()
    assert known_at(GREEN, after, saved) == after
    earlier = known_at(GREEN - 20, {**after, "green": True, "green_step": GREEN}, saved)
    assert earlier is not None
    assert not earlier["green"] and earlier["green_step"] == 20
    assert earlier["readings"] == saved["readings"], "what was red or amber is not forgotten"
    assert earlier["rollbacks"] == 1 and known_at(0, None, None) is None


def test_a_pause_is_overruled_by_a_guard_that_only_warns(run_dir: Path, caplog: Any) -> None:
    job: Any = FakeJob(run_dir, replace(STOPPED, rollbacks=1, lr_scale=0.5))
    job.config.guard = GuardSection(policy="warn")  # guard.max_rollbacks is used up, too
    go_on_after_pause(job)
    state = job.guard.state
    assert (job.progress.step, state.paused, state.rollbacks) == (PAUSED, "", 1)
    assert state.lr_scale == 0.5 and not state.green and state.green_step == GREEN
    (event,) = job.events
    assert event == {"event": "guard_restored", "step": PAUSED, "after": state.to_json()}
    assert (
        f"paused this run at step {PAUSED}: english is worse. guard.policy is warn" in caplog.text
    )
    assert list_steps(run_dir) == [PAUSED, GREEN] and not read_guard_rollbacks(run_dir)
    # a return to the checkpoint of the pause, within the same start, is no pause either
    stopped = STOPPED.to_json()
    assert newest_guard_state(stopped, [], went_on=True) == {**stopped, "paused": ""}
    assert newest_guard_state(stopped, []) == stopped


def test_a_checkpoint_that_was_saved_without_a_guard_is_not_green() -> None:
    assert known_at(GREEN, None, None) == {"green": False}
    after = {**SAVED.to_json(), "green": True, "shares": {"english": 0.4}}
    known = known_at(PAUSED, after, None)
    assert known == {**after, "green": False}
    assert known_at(PAUSED, after, SAVED.to_json()) == after


def test_a_run_that_goes_on_without_its_guard_is_told_what_no_longer_holds(caplog: Any) -> None:
    job: Any = SimpleNamespace(guard=None, topology=SimpleNamespace(rank=0))
    for state in (GuardState(shares={"english": 0.4}).to_json(), None):
        Job._restore_guard(job, SimpleNamespace(guard=state))  # type: ignore[arg-type]
    assert not caplog.text
    state = GuardState(lr_scale=0.25, kl_weight=0.5, routers_frozen=True).to_json()
    Job._restore_guard(job, SimpleNamespace(guard=state))  # type: ignore[arg-type]
    assert "the learning rate is 0.25 of the schedule's, and the weight of the div" in caplog.text
    assert "is 0.5, and the routers are frozen. From here that no longer holds." in caplog.text


def test_routing_that_was_measured_before_a_return_decides_nothing_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = SimpleNamespace(stages=None, progress=Progress(step=GREEN), ledger=None)
    monkeypatch.setattr(job_module, "start_from_loaded", lambda *_, **__: start)
    monkeypatch.setattr(job_module, "set_optimizer_step", lambda *_: None)
    ignored = SimpleNamespace(
        trust=lambda _: None, restore=lambda _: None, publish=lambda _: None, deepspeed=None
    )
    engine = SimpleNamespace(router_watch=ignored, rounding=ignored, deepspeed=None)
    job: Any = SimpleNamespace(
        context=None,
        data=None,
        saver=ignored,
        stability=ignored,
        engine=engine,
        progress=Progress(step=PAUSED),
        router_overlap=0.5,
        has_begun=True,
        _follow=lambda _: None,
        _restore_guard=lambda _: None,
    )
    state = SimpleNamespace(stability=None, router_load=None)
    loaded: Any = SimpleNamespace(state=state, step=GREEN)
    Job.restore(job, loaded, accept_mix_change=True)
    assert job.progress.step == GREEN and job.router_overlap is None
