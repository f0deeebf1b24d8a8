"""Who reaches the port of a run and has not its secret can neither end it nor keep it from ending.

The finding: a client of torch's store wrote a ruling with exit code 0 and the id of a process. The
run left at once with that code, unsaved, and sent SIGCONT to that process.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt.resilience.processes import kernel_report_of
from tests.support.launcher import launch

WORKER = Path(__file__).with_name("attacked_worker.py")


@pytest.fixture
def stopped_process() -> Iterator[int]:
    """A process of this user that is stopped, and none of the run."""
    with subprocess.Popen(["sleep", "600"]) as process:
        process.send_signal(signal.SIGSTOP)
        yield process.pid
        process.kill()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("fails", 74),
        pytest.param("ends", 0, marks=pytest.mark.slow),
        pytest.param("hangs", 71, marks=pytest.mark.slow),
    ],
)
def test_attacked_run_goes_on_and_ends_as_it_would_without_the_attack(
    tmp_path: Path, stopped_process: int, ending: str, code: int
) -> None:
    codes = launch(WORKER, 2, [str(tmp_path), ending, str(stopped_process)], timeout_seconds=60)
    assert codes == [code, code]
    assert "State:\tT (stopped)" in "\n".join(kernel_report_of(stopped_process))
    lines = (tmp_path / "events-0.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    foreign = [event for event in told if event["event"] == "foreign_record"]
    assert foreign[0]["count"] == 1 and len(foreign) <= 5
    assert foreign[0].keys() == {"event", "key", "reason", "count"}
    assert not (tmp_path / "events-1.jsonl").exists()
    assert (tmp_path / "stacks").exists() == (ending == "hangs")
    left = {path.name for path in tmp_path.iterdir()} - {"stacks", "events-0.jsonl"}
    assert left == set(), "the file with the secret is removed"
