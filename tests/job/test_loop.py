"""A run that could not be measured trains no step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import ConfigError
from cpt.job import loop
from cpt.job.loop import owes_look, train


def test_guard_that_cannot_measure_is_refused_before_a_step() -> None:
    asked: list[int] = []

    def refuse(step: int) -> None:
        asked.append(step)
        raise ConfigError("baseline.json is missing")

    job: Any = SimpleNamespace(
        config=SimpleNamespace(train=None),
        progress=SimpleNamespace(step=7),
        last_step=9,
        guard=SimpleNamespace(open_untouched=refuse),
    )
    with pytest.raises(ConfigError, match="is missing"):
        train(job)
    assert asked == [7]


def test_finished_run_that_was_killed_in_its_last_look_is_measured_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(loop, "measure", lambda job, *, last: done.append(f"measured, {last}"))
    monkeypatch.setattr(loop, "end", lambda job, code, cause: done.append(f"{code}, {cause}"))
    monkeypatch.setattr(loop, "go_on_after_pause", lambda job: None)
    monkeypatch.setattr(loop, "on_first_rank", lambda _, do: do())
    step = {"event": "step", "step": 9}
    look = {"event": "guard_decision", "step": 9, "last": True}
    events: list[Any] = [step, look]
    ending = SimpleNamespace(has_failed_before=False)
    job: Any = SimpleNamespace(
        config=SimpleNamespace(train=None),
        progress=SimpleNamespace(step=9),
        last_step=9,
        topology=SimpleNamespace(rank=1, control_group=None),
        guard=SimpleNamespace(),
        telemetry=SimpleNamespace(events=lambda: events),
        context=SimpleNamespace(ending=ending),
    )
    assert not train(job)
    assert done == []
    # on the way, by other bounds; of weights that the run has left; of another end
    looks = ([step, {**look, "last": False}], [step, look, step], [step, {**look, "step": 12}])
    for looked in looks:
        events = looked
        assert not train(job)
        assert done == ["measured, True", "0, finished: step 9 of 9"]
        done.clear()
    events = [step, {**look, "last": False}, look, {"event": "end", "exit_code": 1}]
    ending.has_failed_before = True  # what stands in metrics.jsonl is the kill
    assert not train(job)
    assert done == ["0, finished: step 9 of 9"]


def test_run_that_goes_back_owes_only_the_look_that_a_stop_has_cut_off() -> None:
    job: Any = SimpleNamespace(progress=SimpleNamespace(step=4), guard=None)
    assert not owes_look(job)
    job.guard = SimpleNamespace(is_owed=lambda step: step in (0, 4))
    assert owes_look(job)
    for step in (0, 6):  # the untouched model is measured once
        job.progress.step = step
        assert not owes_look(job)
