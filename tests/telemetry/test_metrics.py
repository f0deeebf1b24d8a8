"""metrics.jsonl holds every event once, survives a crash and a disk that is full for a while, and
reaches the trackers as named numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt.telemetry.event_reader import iter_events
from cpt.telemetry.metrics import MetricsFile, Telemetry, read_events
from cpt.telemetry.shown import scalars


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.closed = 0

    def log(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def close(self, longest_seconds: float) -> None:
        self.closed += 1


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1.5, "loss_by_source": {"ja_web": 1.25}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *events: dict[str, Any]) -> None:
    telemetry = Telemetry(path)
    for event in events:
        telemetry.log(event)
    telemetry.close()


def test_events_come_back_as_they_were_logged(path: Path) -> None:
    write(path, step(1), step(2))
    assert read_events(path) == [step(1), step(2)]


def test_event_is_in_the_file_before_the_next_one(path: Path) -> None:
    telemetry = Telemetry(path)
    telemetry.log(step(1))
    assert read_events(path) == [step(1)]
    telemetry.close()


def test_every_event_is_one_line(path: Path) -> None:
    write(path, {"event": "note", "text": "two\nlines \u2028 and more"}, step(1))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_resumed_run_appends(path: Path) -> None:
    write(path, step(1))
    write(path, step(2))
    assert read_events(path) == [step(1), step(2)]


def test_line_that_is_no_event_is_passed_over(path: Path) -> None:
    path.write_bytes(b'7\nnull\n["step"]\n')
    write(path, step(1))
    assert read_events(path) == [step(1)]


def test_cut_off_last_line_is_passed_over(path: Path) -> None:
    write(path, step(1), step(2))
    path.write_bytes(path.read_bytes()[:-9])
    assert read_events(path) == [step(1)]


def test_first_event_after_a_cut_off_line_is_not_lost(path: Path) -> None:
    write(path, step(1), step(2))
    path.write_bytes(path.read_bytes()[:-9])
    write(path, step(2), step(3))
    assert read_events(path) == [step(1), step(2), step(3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_line_with_a_non_finite_number_is_still_json(path: Path, value: float) -> None:
    """`NaN` and `Infinity` are Python's own; jq, pandas and JavaScript refuse the line."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    write(path, {**step(1), "grad_norm": value})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)["step"] == 1


def test_list_with_a_non_finite_number_is_still_json(path: Path) -> None:
    write(path, {**step(1), "entropy": [1.0, float("nan")]})
    assert read_events(path)[0]["entropy"] == [1.0, None]


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_found_the_disk_full_are_written_whole_once_there_is_room(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    telemetry = Telemetry(path)
    telemetry.log(step(1))
    with largest_file(path.stat().st_size + 20):
        telemetry.log(step(2))
        telemetry.log(step(3))
        assert read_events(path) == [step(1)]
        assert list(telemetry.events()) == [step(1), step(2), step(3)]
    telemetry.log(step(4))
    telemetry.close()
    assert path.read_bytes().count(b"\n") == 4
    assert read_events(path) == [step(1), step(2), step(3), step(4)]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and str(path) in warnings[0].getMessage()
    assert "3 lines had waited" in caplog.text


def test_line_that_a_full_disk_cut_off_is_taken_back(path: Path) -> None:
    write(path, step(1))
    before = path.read_bytes()
    telemetry = Telemetry(path)
    with largest_file(len(before) + 20):
        telemetry.log(step(2))
        assert path.read_bytes() == before
    telemetry.close()


def test_lines_follow_a_folder_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    telemetry = Telemetry(folder / "metrics.jsonl")
    telemetry.log(step(1))
    folder.rename(tmp_path / "elsewhere")
    telemetry.log(step(2))
    (tmp_path / "elsewhere").rename(folder)
    telemetry.log(step(3))
    telemetry.close()
    assert read_events(folder / "metrics.jsonl") == [step(1), step(2), step(3)]


def make_full_device(path: Path) -> None:
    """Make a device like /dev/full, which says of every write that the disk is full."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))
        path.open("ab").close()
    except PermissionError:
        pytest.skip("no devices can be made here")


@pytest.mark.parametrize("kind", ["folder", "link", "full device"])
def test_place_that_takes_no_line_raises_nothing_and_is_told_once(
    path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.with_name("victim"))
    else:
        make_full_device(path)
    telemetry = Telemetry(path)
    for number in range(3):
        telemetry.log(step(number))
    telemetry.close()
    telemetry.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, messages
    assert "kept in memory" in messages[0] and "3 lines could not be written" in messages[1]
    assert not path.with_name("victim").exists()


def test_oldest_lines_are_lost_beyond_the_bound_and_counted(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir()
    file = MetricsFile(path, most_waiting_bytes=60)
    for number in range(10):
        file.append(json.dumps({"event": "note", "step": number}))
    path.rmdir()
    file.close()
    kept = [event["step"] for event in read_events(path)]
    assert kept == [9] or kept == [8, 9]
    assert f"{10 - len(kept)} lines could not be written" in caplog.text


def test_line_that_a_damaged_disk_changed_is_passed_over(path: Path) -> None:
    write(path, step(1), step(2))
    path.write_bytes(b'{"event": "\xff\xfe"}\n' + path.read_bytes())
    assert read_events(path) == [step(1), step(2)]


def test_rank_without_a_file_writes_and_shows_nothing() -> None:
    recorder = Recorder()
    telemetry = Telemetry(None, [recorder])
    telemetry.log(step(1))
    assert recorder.events == []


def test_trackers_see_every_event(path: Path) -> None:
    recorder = Recorder()
    telemetry = Telemetry(path, [recorder])
    telemetry.log(step(1))
    telemetry.log(step(2))
    telemetry.close()
    assert recorder.events == [step(1), step(2)] and recorder.closed == 1


def test_closing_twice_is_harmless(path: Path) -> None:
    telemetry = Telemetry(path)
    telemetry.close()
    telemetry.close()
    assert path.read_bytes() == b""


def test_numbers_of_a_step_are_named_after_training() -> None:
    assert scalars({"event": "step", "step": 3, "loss": 1.5, "lr": 1e-3}) == {
        "train/loss": 1.5,
        "train/lr": 1e-3,
    }


def test_maps_become_one_number_per_entry() -> None:
    numbers = scalars(
        {
            "event": "step",
            "step": 3,
            "loss_by_language": {"ja": 2.0, "en": 1.0},
            "bytes_sent": {"halo": 4},
        }
    )
    assert numbers == {"loss_by_language/ja": 2.0, "loss_by_language/en": 1.0, "bytes_sent/halo": 4}


def test_numbers_of_a_guard_measurement_are_named_after_its_domain() -> None:
    event = {
        "event": "guard",
        "step": 3,
        "domain": "english",
        "language": "en",
        "bits_per_byte": 0.8,
        "action": "none",
    }
    assert scalars(event) == {"guard/english/bits_per_byte": 0.8}


def test_shares_that_the_guard_gave_to_domains_or_sources_become_numbers() -> None:
    after = {"lr_scale": 0.5, "shares": {"english": 0.2}}
    old = {"event": "guard_decision", "step": 3, "after": after}
    expected = {"guard/lr_scale": 0.5, "guard/replay_share/english": 0.2}
    assert scalars(old) == expected
    new = {**old, "after": {**after, "replay": {"en_web": 0.3}}}
    assert scalars(new) == {**expected, "guard/replay_share/en_web": 0.3}


def test_other_events_keep_their_own_name() -> None:
    assert scalars({"event": "checkpoint", "step": 3, "path": "x", "seconds": 2.0}) == {
        "checkpoint/seconds": 2.0
    }


def test_log_of_a_long_run_is_read_as_a_whole(path: Path) -> None:
    """A run of 100,000 steps with 50 sources and KL targets writes 590 MiB."""
    first = json.dumps(step(1)) + "\n"
    last = json.dumps(step(2)) + "\n"
    with open(path, "w") as file:
        file.write(first)
        file.seek(2**28)  # a hole in the file: no disk is filled
        file.write("\n" + last)
    assert read_events(path) == [step(1), step(2)]


def test_only_wanted_events_are_kept(path: Path) -> None:
    events = [step(1), {"event": "router", "step": 1}, {"event": ["step"], "step": 1}]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert list(iter_events(path, ("router",))) == [events[1]]
    assert list(iter_events(path)) == events
