"""Requests to stop are noted, wherever they come from, and leaving has an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt.resilience.processes import start_ticks_of
from cpt.resilience.stop import (
    LEAVE_BEFORE_END_SECONDS,
    SIGNALS,
    Deadline,
    StopRequest,
    launcher_links,
)

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_signals_are_noted_and_nothing_else_happens() -> None:
    code = """
import os, signal
from cpt.resilience.stop import SIGNALS, StopRequest
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for number in SIGNALS:
    if number != signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
    stop = StopRequest()
    stop.listen()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason() == signal.Signals(number).name, stop.reason()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_signals_of_terminals_and_batch_systems_are_noted() -> None:
    names = {number.name for number in SIGNALS}
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"} == names


def test_hangup_that_nohup_ignores_stays_ignored() -> None:
    code = """
import os, signal
from cpt.resilience.stop import StopRequest
stop = StopRequest()
stop.listen()
os.kill(os.getpid(), signal.SIGHUP)
assert not stop.requested()
assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
os.kill(os.getpid(), signal.SIGTERM)
assert stop.reason() == "SIGTERM"
"""
    done = subprocess.run(
        ["nohup", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_noting_signals_needs_no_heavy_import() -> None:
    done = run_python("import cpt.resilience.stop, sys; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_stop_file_is_seen_by_the_rank_that_watches_and_consumed(tmp_path: Path) -> None:
    watching = StopRequest({})
    other = StopRequest({})
    watching.watch_run(tmp_path, 300)
    assert not watching.requested()
    (tmp_path / "STOP").touch()
    assert watching.reason() == "STOP file" and not other.requested()
    watching.consume()
    other.consume()
    assert not (tmp_path / "STOP").exists() and watching.requested(), "a request does not go away"


def test_end_of_the_job_is_a_request_some_time_before(tmp_path: Path) -> None:
    soon = StopRequest({"SLURM_JOB_END_TIME": str(int(time.time() + 2000))})
    later = StopRequest({"SLURM_JOB_END_TIME": str(int(time.time() + 4000))})
    # The margin is at most a quarter of the time that is left, here 500 s.
    soon.watch_run(tmp_path, 10_000)
    later.watch_run(tmp_path, 300)
    assert not soon.requested() and not later.requested()
    soon._job_end = soon._stop_at = time.time() + 0.0
    assert soon.reason().startswith("the job ends in")


def test_leaving_may_not_take_longer_than_the_job_lasts() -> None:
    assert StopRequest({}).seconds_to_leave(540) == 540
    end = str(int(time.time() + 100))
    stop = StopRequest({"SLURM_JOB_END_TIME": end})
    assert stop.seconds_to_leave(540) <= 100 - LEAVE_BEFORE_END_SECONDS
    assert StopRequest({"SLURM_JOB_END_TIME": "1"}).seconds_to_leave(540) == 1


def test_deadline_ends_the_process_with_the_code_of_a_storage_failure() -> None:
    code = """
import time
from cpt.resilience.stop import Deadline
Deadline(0.2, 'saving step 3')
time.sleep(30)
"""
    done = run_python(code)
    assert done.returncode == 74 and "saving step 3 took longer than 0 s" in done.stderr


def test_deadline_holds_where_nobody_reads_its_message() -> None:
    code = """
import time
from cpt.resilience.stop import Deadline
Deadline(0.2, 'saving step 3')
time.sleep(30)
"""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=writer, timeout=60)
    finally:
        os.close(writer)
    assert done.returncode == 74


def test_canceled_deadline_does_nothing() -> None:
    deadline = Deadline(0.1, "nothing")
    deadline.cancel()
    time.sleep(0.3)


LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""
RANK = """
import time
from cpt.resilience.stop import StopRequest, launcher_links, watch_launcher
stop = StopRequest({})
watch_launcher(stop, 1.0)
print(len(launcher_links()), flush=True)
while not stop.requested():
    time.sleep(0.05)
print(stop.reason(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "watched"), [("deepspeed", True), ("my_deepspeed_script", False)])
def test_lost_launcher_is_a_request_and_an_end_by_force(
    tmp_path: Path, name: str, watched: bool
) -> None:
    script = tmp_path / name
    script.write_text(LAUNCHER, encoding="utf-8")
    output = tmp_path / "output"
    with open(output, "w", encoding="utf-8") as out:
        command = [sys.executable, str(script), RANK]
        launcher = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out
        )

    def wait_for(num_lines: int) -> list[str]:
        deadline = time.monotonic() + 30
        while True:
            found = output.read_text(encoding="utf-8").splitlines()
            if len(found) >= num_lines or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    rank = int(wait_for(2)[0])
    try:
        assert wait_for(2)[1] == str(int(watched))
        launcher.kill()
        launcher.wait()
        if watched:
            assert wait_for(3)[2] == "the launcher is gone"
            deadline = time.monotonic() + 20
            while is_running(rank) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not is_running(rank)
        else:
            time.sleep(2)
            assert is_running(rank) and len(wait_for(2)) == 2
    finally:
        if is_running(rank):
            os.kill(rank, signal.SIGKILL)


def is_running(pid: int) -> bool:
    return start_ticks_of(pid) != ""


def test_process_without_a_launcher_watches_none() -> None:
    assert launcher_links() == []
