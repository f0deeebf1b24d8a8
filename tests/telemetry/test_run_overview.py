"""The state of a run is told from what lies in its directory, whatever lies there."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpt.resilience.lock import LOCK, STALE_SECONDS
from cpt.telemetry.event_reader import EventReader
from cpt.telemetry.run_end import EndRecord
from cpt.telemetry.run_overview import RunFollower, run_overview
from cpt.telemetry.run_tally import RunTally, badness
from tests.support.records import write_jsonl
from tests.support.run_events import end, start, step
from tests.support.run_folders import PAUSE, STARTED, leave_lock, make_run, steps


def test_run_whose_process_is_alive_is_running_with_an_eta(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 20))
    leave_lock(run)
    seen = run_overview(run)
    assert (seen.state, seen.step, seen.planned_steps, seen.loss) == ("running", 20, 30, 3.0)
    assert (seen.tokens, seen.tokens_per_second, seen.num_starts) == (20_000, 500.0, 1)
    assert seen.eta_seconds == pytest.approx(10 * 2.0 / seen.goodput)
    assert str(os.getpid()) in seen.host


def test_run_that_was_killed_on_this_machine_has_failed_and_says_what_is_saved(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 5), saved=4)
    leave_lock(run, started="1")  # the process id is used by another process now
    seen = run_overview(run)
    assert seen.state == "failed"
    assert "ended without a word" in seen.cause and "step 4 is saved" in seen.cause
    assert math.isnan(seen.eta_seconds)


@pytest.mark.parametrize("age_seconds, state", [(5.0, "running"), (STALE_SECONDS + 60, "failed")])
def test_run_of_another_machine_is_alive_while_its_lock_is_fresh(
    tmp_path: Path, age_seconds: float, state: str
) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 5))
    leave_lock(run, age_seconds, machine="another", host="node7")
    seen = run_overview(run)
    assert seen.state == state and "node7" in seen.host
    if state == "failed":
        assert "no sign of life since" in seen.cause


def test_saved_and_orderly_end_before_the_plan_is_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 5), end(5), saved=5)
    assert (run_overview(run).state, run_overview(run).cause) == ("stopped", "step 5 is saved")
    cause = "stopped on request after step 5: STOP file"
    run = make_run(tmp_path / "b", start(0), step(5), end(5), end(5, exit_code=75, cause=cause))
    seen = run_overview(run)
    assert (seen.state, seen.cause, seen.exit_code) == ("stopped", cause, 75)


def test_pause_of_the_guard_is_told_with_its_reason_until_the_run_goes_on(tmp_path: Path) -> None:
    events = [start(0), *steps(1, 4), PAUSE, end(4, exit_code=75)]
    seen = run_overview(make_run(tmp_path / "paused", *events))
    assert (seen.state, seen.cause) == ("paused", "english lost 2 %")
    assert [action.action for action in seen.actions] == ["pause"]
    back = {"event": "guard_rollback", "step": 2, "from_step": 4, "reason": "english lost 2 %"}
    on = run_overview(make_run(tmp_path / "on", *events, back, start(2), step(3), end(3)))
    assert on.state == "stopped"
    assert [action.action for action in on.actions] == ["rollback", "pause"]


def test_run_that_ended_by_an_error_has_failed_with_its_cause(tmp_path: Path) -> None:
    fatal = end(5, exit_code=74, cause="no space left\non the file system")
    run = make_run(tmp_path, start(0), *steps(1, 5), fatal)
    seen = run_overview(run)
    assert (seen.state, seen.exit_code) == ("failed", 74)
    assert seen.cause == "no space left on the file system"


def test_failure_file_is_believed_until_a_later_start(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 5))
    cause = "rank 1 was killed by signal 9"
    failure = EndRecord(exit_code=137, cause=cause, step=5, time=STARTED + 50)
    (run / "last_failure.json").write_text(json.dumps(asdict(failure)))
    seen = run_overview(run)
    assert (seen.state, seen.exit_code) == ("failed", 137)
    assert seen.cause == cause
    write_jsonl(
        run / "metrics.jsonl", [start(0), step(1), start(1, time=STARTED + 60), step(2), end(2)]
    )
    assert run_overview(run).state == "stopped"


def test_run_is_finished_when_its_planned_last_step_is_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 30), end(30), saved=30)
    assert (run_overview(run).state, run_overview(run).exit_code) == ("finished", 0)
    failed_after = end(30, exit_code=70, cause="the export failed")
    write_jsonl(run / "metrics.jsonl", [start(0), step(30), end(30), failed_after])
    assert (run_overview(run).state, run_overview(run).cause) == ("failed", "the export failed")


def test_empty_and_missing_directories_have_a_state(tmp_path: Path) -> None:
    assert run_overview(tmp_path).state == "never started"
    assert run_overview(tmp_path / "missing").state == "unknown"
    leave_lock(tmp_path)
    seen = run_overview(tmp_path)
    assert (seen.state, seen.cause, seen.step) == ("running", "starting", 0)


def test_guard_is_told_by_domain_with_the_worst_first(tmp_path: Path) -> None:
    def measured(domain: str, percent: float | None, **more: Any) -> dict[str, Any]:
        event = {"event": "guard", "step": 10, "domain": domain, "language": "en"}
        return {**event, "delta_percent": percent, "state": "green", **more}

    evidence = [{"domain": "math", "tolerance": 4.0}]
    decision = {"event": "guard_decision", "step": 10, "action": "none", "evidence": evidence}
    replies = {"kind": "generation", "measure": "format", "delta": 3.0, "tolerance": 10.0}
    run = make_run(
        tmp_path,
        *(start(0), *steps(1, 10), decision),
        *(measured("english", 0.5), measured("math", 0.8), measured("lost", None)),
        measured("replies", None, **replies),
        measured("replies", None, kind="generation", measure="ends"),
    )
    seen = run_overview(run).guard
    assert [standing.domain for standing in seen] == ["lost", "english", "replies", "math"]
    assert [standing.unit for standing in seen] == ["%", "%", "points", "%"]
    assert [standing.used_share for standing in seen[1:]] == pytest.approx([0.5, 0.3, 0.2])


def test_steps_that_a_restart_takes_back_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 10), start(6), *steps(7, 8), end(8))
    seen = run_overview(run)
    assert (seen.step, seen.tokens, seen.num_starts, seen.num_going_back) == (8, 8000, 2, 1)


def test_half_written_line_is_left_for_the_next_look(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), step(1))
    line = json.dumps(step(2))
    follower = RunFollower(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        assert follower.read_on()
        assert (follower.overview().step, follower.overview().problems) == (1, ())
        file.write(line[20:] + "\n")
    assert follower.read_on()
    assert follower.overview().step == 2


def test_damaged_files_are_named_and_end_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), step(1))
    bad = [b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b'{"event": "step", "step": "x"}', b"1" * 5000]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(bad) + b"\n")
        file.write(json.dumps(step(2)).encode() + b"\n")
    bomb = "a: &a [x, x]\n"
    for former, name in itertools.pairwise("abcdefghijklmnopqrst"):
        bomb += f"{name}: &{name} [*{former}, *{former}]\n"
    (run / "config.resolved.yaml").write_text(bomb)
    (run / "last_failure.json").write_text("[" * 100_000)
    (run / LOCK).write_text("{}")
    os.utime(run / LOCK, (1e9, 1e9))
    seen = run_overview(run)
    assert (seen.step, seen.planned_steps, seen.state) == (2, None, "failed")
    assert any("4 lines are no JSON objects" in problem for problem in seen.problems)
    assert any("its aliases add more" in problem for problem in seen.problems)
    json.dumps(seen.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "name", ["config.resolved.yaml", ".lock", "last_failure.json", "metrics.jsonl"]
)
def test_pipe_instead_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", start(0), *steps(1, 3), end(3))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert run_overview(folder).step == (0 if name == "metrics.jsonl" else 3)


def test_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 10))
    follower = RunFollower(run)
    follower.read_on()
    (run / "metrics.jsonl").rename(run / "previous.jsonl")
    assert follower.read_on() and follower.overview().step == 0
    write_jsonl(run / "metrics.jsonl", [start(0), step(1)])
    follower.read_on()
    assert (follower.overview().step, follower.overview().tokens) == (1, 1000)


def test_lines_are_read_once_and_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_jsonl(path, steps(1, 100))
    reader = EventReader(path)
    pieces = []
    while not reader.is_caught_up or not pieces:
        reader.find_file()
        pieces.append([event["step"] for event in reader.read(1000)])
    assert len(pieces) > 5
    assert [number for piece in pieces for number in piece] == list(range(1, 101))
    reader.find_file()
    assert reader.read() == []


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 100))
    follower = RunFollower(run, tail_bytes=500)
    assert follower.read_on()
    seen = follower.overview()
    assert (seen.step, seen.tokens, seen.problems) == (100, None, ())
    assert seen.tokens_per_second == 500.0


def test_looking_writes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, start(0), *steps(1, 5), saved=4)
    leave_lock(run, machine="another")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    run_overview(run)
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before


def test_looking_needs_no_torch() -> None:
    code = "import sys, cpt.telemetry.run_overview; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KINDS = ("start", "step", "end", "goodput", "checkpoint", "guard", "guard_decision", "rollback")
KEYS = ("step", "time", "tokens", "seconds", "loss", "delta", "domain", "evidence", "from_step")


@given(
    st.lists(
        st.builds(
            lambda kind, more: {"event": kind, **more},
            st.sampled_from(KINDS),
            st.dictionaries(st.sampled_from(KEYS), VALUES),
        ),
        max_size=12,
    )
)
@settings(max_examples=30, deadline=None, derandomize=True)
@example([{"event": "end", "step": 1, "time": 10**400}])
def test_no_value_in_an_event_breaks_the_tally(events: list[dict[str, Any]]) -> None:
    tally = RunTally()
    for event in events:
        tally.take(event)
    assert tally.tokens() >= 0 and tally.step >= 0
    tally.goodput()
    tally.tokens_per_second()
    sorted(tally.standings(), key=badness)


def test_speed_is_that_of_slots_and_tokens_are_those_that_bear_loss(tmp_path: Path) -> None:
    masked = [{**one, "slots": 4 * one["tokens"]} for one in steps(1, 20)]
    run = make_run(tmp_path, start(0), *masked)
    leave_lock(run)
    seen = run_overview(run)
    assert (seen.tokens, seen.tokens_per_second) == (20_000, 2000.0)
