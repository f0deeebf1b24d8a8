"""The end of a start of a run is one line of metrics.jsonl, and a file if it was a failure."""

from __future__ import annotations

import json
import os

import pytest

from cpt.telemetry.metrics import read_events
from cpt.telemetry.run_end import (
    LAST_FAILURE,
    METRICS,
    EndRecord,
    append_event,
    finish_time,
    forget_failure,
    one_line,
    read_failure,
    record_failure,
)


def failure(cause: str = "rank 3 was killed", **values: object) -> EndRecord:
    fields = {"exit_code": 137, "step": 4, "rank": 3, "host": "h", "node": "n", "signal": 9}
    return EndRecord(cause=cause, **{**fields, **values})


def test_failure_is_a_file_and_an_event_with_the_same_facts(tmp_path) -> None:
    assert record_failure(tmp_path, failure(time=12.5))
    assert json.loads((tmp_path / LAST_FAILURE).read_text()) == {
        "exit_code": 137,
        "cause": "rank 3 was killed",
        "step": 4,
        "rank": 3,
        "host": "h",
        "node": "n",
        "signal": 9,
        "time": 12.5,
    }
    (event,) = read_events(tmp_path / METRICS)
    assert event.pop("event") == "end"
    assert event == json.loads((tmp_path / LAST_FAILURE).read_text())
    assert read_failure(tmp_path) == failure(time=12.5)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("has_links", [True, False])
def test_first_record_of_a_failure_holds(tmp_path, monkeypatch, has_links: bool) -> None:
    def no_links(source: object, target: object) -> None:
        raise PermissionError("no hard links here")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    assert record_failure(tmp_path, failure("the cause"))
    assert not record_failure(tmp_path, failure("its consequence"))
    found = read_failure(tmp_path)
    assert found is not None and found.cause == "the cause"
    assert [event["cause"] for event in read_events(tmp_path / METRICS)] == ["the cause"]


def test_next_start_forgets_the_file_and_keeps_the_event(tmp_path) -> None:
    record_failure(tmp_path, failure())
    forget_failure(tmp_path)
    forget_failure(tmp_path)
    assert read_failure(tmp_path) is None
    assert len(read_events(tmp_path / METRICS)) == 1


def test_event_starts_a_line_of_its_own_after_one_that_was_cut_off(tmp_path) -> None:
    (tmp_path / METRICS).write_text('{"event": "step", "step": 1}\n{"event": "st')
    append_event(tmp_path, EndRecord(exit_code=0, cause="finished", step=2).event())
    assert [event["event"] for event in read_events(tmp_path / METRICS)] == ["step", "end"]


def test_orderly_end_blames_no_rank() -> None:
    event = EndRecord(exit_code=0, cause="finished: step 2 of 2", step=2, time=1.0).event()
    assert event == {
        "event": "end",
        "step": 2,
        "time": 1.0,
        "exit_code": 0,
        "cause": "finished: step 2 of 2",
    }


def test_time_of_the_finish_is_that_of_the_first_end_after_the_last_step() -> None:
    step = {"event": "step", "step": 1}
    stopped = {"event": "end", "step": 1, "time": 5.0, "exit_code": 75}
    finished = [{"event": "end", "step": 2, "time": at, "exit_code": 0} for at in (7.0, 9.0)]
    assert finish_time([step, stopped]) is None
    assert finish_time([step, stopped, step, *finished]) == 7.0
    assert finish_time([step, *finished, step]) is None
    assert finish_time([step, {"event": "end", "step": 1, "time": 3.0}]) == 3.0, "of older logs"
    assert finish_time([{"event": "end", "exit_code": 0}]) is None


def test_cause_is_one_line() -> None:
    assert one_line("first\n  second\n\nthird\n") == "first (2 more lines)"
    assert one_line("only") == "only"
    assert EndRecord(exit_code=78, cause="a\nb", step=0).cause == "a (1 more line)"
    assert len(EndRecord(exit_code=70, cause="x" * 5000, step=0).cause) == 1000


@pytest.mark.parametrize("content", ["", "{", "[]", '{"exit_code": 1}', '{"other": 1}'])
def test_damaged_file_is_no_failure(tmp_path, content: str) -> None:
    (tmp_path / LAST_FAILURE).write_text(content)
    assert read_failure(tmp_path) is None
