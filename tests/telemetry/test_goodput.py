"""The time of a run adds up: what counts, and what each kind of trouble has cost."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from cpt.resilience.processes import age_seconds
from cpt.telemetry import event_reader, running_goodput
from cpt.telemetry.event_reader import EventReader
from cpt.telemetry.goodput import LOST, Goodput, goodput, start_event
from cpt.telemetry.metrics import Telemetry
from cpt.telemetry.running_goodput import RunningGoodput

Event = dict[str, Any]


def steps(first: int, last: int, seconds: float = 10.0) -> list[Event]:
    return [{"event": "step", "step": step, "seconds": seconds} for step in range(first, last + 1)]


def start(step: int, at: float, start_up: float = 20.0, previous_end: float | None = None) -> Event:
    known = {} if previous_end is None else {"previous_end": previous_end}
    return {"event": "start", "step": step, "time": at, "start_up_seconds": start_up, **known}


def lost(result: Goodput) -> dict[str, float]:
    assert result.lost.keys() == set(LOST)
    return {kind: seconds for kind, seconds in result.lost.items() if seconds}


def test_undisturbed_run_loses_its_start_its_saves_and_its_waits() -> None:
    events = [
        start(0, at=1000.0),
        *steps(1, 4),
        {"event": "data_wait", "step": 3, "seconds": 2.0},
        {"event": "checkpoint", "step": 4, "seconds": 30.0, "blocked_seconds": 4.0},
        {"event": "evaluation", "step": 4, "seconds": 6.0},
        {"event": "end", "step": 4, "time": 1053.0},
    ]
    result = goodput(events)
    assert result.productive == 38.0
    assert lost(result) == {
        "start_up": 20.0, "data_wait": 2.0, "save_wait": 4.0, "evaluation": 6.0, "other": 3.0
    }  # fmt: skip
    assert (
        result.total == 73.0 and result.share == pytest.approx(38 / 73) and result.num_starts == 1
    )


def test_what_an_update_waited_for_a_save_is_lost_once() -> None:
    waited = {"blocked_seconds": 5.0, "update_wait_seconds": 3.0}
    events = [
        start(0, at=1000.0),
        *steps(1, 2),
        {"event": "save_wait", "step": 2, "seconds": 3.0},
        {"event": "checkpoint", "step": 1, "seconds": 9.0, **waited},
        {"event": "end", "step": 2, "time": 1022.0},
    ]
    result = goodput(events)
    assert result.productive == 17.0
    assert lost(result) == {"start_up": 20.0, "save_wait": 5.0}


@pytest.mark.case(
    "M1", "kill, requeue, rollback and saves counted by kind; sums to the time on the clock"
)
def test_kill_and_requeue_cost_what_is_done_again_and_the_time_between() -> None:
    events = [
        start(0, at=1000.0),
        *steps(1, 3),
        {"event": "checkpoint", "step": 2, "seconds": 5.0},
        *steps(4, 5),  # killed in step 6: the last line was written at 1055
        start(2, at=1100.0, start_up=15.0, previous_end=1055.0),
        *steps(3, 6),
        {"event": "end", "step": 6, "time": 1140.0},
    ]
    result = goodput(events)
    assert result.productive == 60.0
    assert lost(result) == {"start_up": 20.0, "save_wait": 5.0, "restart": 30.0 + 45.0}
    assert result.total == 1140.0 - 980.0 and result.num_starts == 2 and result.share < 1


def test_start_that_is_refused_after_a_failure_is_lost_time_between_two_starts() -> None:
    events = [
        start(0, at=1000.0),
        *steps(1, 3),
        {"event": "end", "step": 3, "time": 1030.0, "exit_code": 137},
        {"event": "end", "step": 2, "time": 1070.0, "exit_code": 78},
        start(2, at=1100.0, start_up=15.0, previous_end=1070.0),
        *steps(3, 6),
        {"event": "end", "step": 6, "time": 1140.0, "exit_code": 0},
    ]
    result = goodput(events)
    assert result.productive == 60.0
    assert lost(result) == {"start_up": 20.0, "restart": 10.0 + 70.0}
    assert result.total == 1140.0 - 980.0


def test_rollback_costs_its_load_and_the_steps_it_took_back() -> None:
    events = [
        start(0, at=1000.0),
        *steps(1, 7),
        *({"event": "skipped_update", "step": step} for step in (2, 5, 6, 7)),
        {"event": "rollback", "step": 4, "seconds": 3.0},
        *steps(5, 8),
    ]
    result = goodput(events)
    assert result.productive == 70.0
    assert lost(result) == {"start_up": 20.0, "skipped": 10.0, "rollback": 33.0}


def test_log_without_starts_and_with_nonsense_is_still_accounted_for() -> None:
    events: list[Any] = [
        *steps(1, 2),
        None,
        7,
        {"event": "step"},
        {"event": 3, "step": 1},
        {"event": "step", "step": "x"},
    ]
    events += [
        {"event": "step", "step": 3, "seconds": None},
        {"event": "unheard_of", "step": 3, "seconds": 9},
    ]
    result = goodput(events)
    assert result.productive == 20.0 and lost(result) == {} and result.share == 1.0
    assert goodput([]).describe().startswith("goodput nan")


def test_line_and_event_name_every_loss() -> None:
    result = goodput([start(0, at=1000.0), *steps(1, 3)])
    assert result.describe() == "goodput 60.0 %: 30.0 of 50.0 s; lost: start-up 20.0 s"
    event = json.loads(json.dumps(result.event(3)))
    assert (
        event["goodput"] == 0.6
        and event["seconds"]["productive"] == 30.0
        and event["seconds"]["start_up"] == 20.0
    )


def test_start_counts_from_when_the_process_was_made(tmp_path: Path) -> None:
    alive = age_seconds()
    assert alive > 0
    event = start_event(3, 12.0)
    assert (
        event["start_up_seconds"] >= alive and event["previous_end"] == 12.0 and event["step"] == 3
    )
    assert "previous_end" not in start_event(0, None)


def test_share_of_a_start_that_goes_on_counts_the_time_since_its_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    running = RunningGoodput(path)
    assert math.isnan(running.share())
    events = [
        {"event": "start", "step": 0, "time": 1010.0, "start_up_seconds": 10.0},
        {"event": "step", "step": 1, "seconds": 30.0},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    monkeypatch.setattr(time, "time", lambda: 1060.0)
    assert running.share() == pytest.approx(30 / 60)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "step", "step": 2, "seconds": 20.0}) + "\n")
    monkeypatch.setattr(time, "time", lambda: 1080.0)
    assert running.share() == pytest.approx(50 / 80)


def written(path: Path, events: list[dict[str, Any]]) -> None:
    """Append events to a log."""
    with path.open("a", encoding="utf-8") as file:
        for event in events:
            file.write(json.dumps(event) + "\n")


def test_account_at_the_end_reads_only_what_no_look_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    running = RunningGoodput(path)
    first = [start(0, at=1000.0), *steps(1, 50)]
    last = [
        {"event": "step", "step": 51, "seconds": 7.0},
        {"event": "end", "step": 51, "time": 2e3},
    ]
    written(path, first)
    running.share()
    written(path, last)
    parsed: list[bytes] = []
    plain = event_reader._parsed_line
    monkeypatch.setattr(
        event_reader, "_parsed_line", lambda line: parsed.append(line) or plain(line)
    )
    assert running.result() == goodput(first + last)
    assert len(parsed) == len(last)


def test_events_that_wait_to_be_written_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    telemetry = Telemetry(path)
    telemetry.log(start(0, at=1000.0))
    path.unlink()
    path.mkdir()  # the file system fails
    telemetry.log({"event": "step", "step": 1, "seconds": 7.0})
    with pytest.raises(OSError):
        telemetry.goodput()
    path.rmdir()
    written(path, [start(0, at=1000.0)])
    for _ in range(2):
        spent = telemetry.goodput()
        assert spent is not None and spent.productive == 7.0
    telemetry.log({"event": "step", "step": 2, "seconds": 5.0})
    spent = telemetry.goodput()
    assert spent is not None and spent.productive == 12.0


def test_account_that_would_take_too_long_to_read_is_left_out_and_read_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EventReader.read
    monkeypatch.setattr(EventReader, "read", lambda reader: plain(reader, 256))
    monkeypatch.setattr(running_goodput, "LOOK_SECONDS", 0.0)
    path = tmp_path / "metrics.jsonl"
    events = [start(0, at=1000.0), *steps(1, 20)]
    written(path, events)
    running = RunningGoodput(path)
    assert running.result(longest_seconds=0.0) is None
    assert math.isnan(running.share())
    assert running.result() == goodput(events)
    assert math.isfinite(running.share())
