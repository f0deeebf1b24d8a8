"""What a process hands to the program that takes its place at the border of a stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.errors import EXIT_DONE, ConfigError, StageFinished
from cpt.job.stage_switch import next_environment
from cpt.job.start_options import resume_word
from cpt.resilience.environment import read_environment
from cpt.resilience.lock import LOCK_TOKEN, take_lock
from tests.support.launcher import ROOT, rank_environment

SECRET = b"x" * 64
REPLACED = """
import os, signal, sys, time
from cpt.resilience.stop import SIGNALS, StopRequest
stop = StopRequest()
if "second" not in sys.argv:
    stop.listen()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.execv(sys.executable, [sys.executable, *sys.argv, "second"])
stop.listen()
deadline = time.monotonic() + 10
while not stop.reason() and time.monotonic() < deadline:
    time.sleep(0.01)
print(os.getpid(), stop.reason())
"""


def test_signal_that_comes_while_the_program_is_replaced_reaches_the_next_one(
    tmp_path: Path,
) -> None:
    script = tmp_path / "replaced.py"
    script.write_text(REPLACED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_DONE
    assert output.split() == [str(process.pid), "SIGUSR1"]


def test_next_start_has_the_secret_and_goes_on_from_the_newest_checkpoint() -> None:
    first = next_environment(rank_environment(0, 2, 1234), SECRET)
    second = next_environment(first, None)
    assert first["CPT_JOB_SECRET"] == SECRET.decode()
    assert [read_environment(found).restarts for found in (first, second)] == [1, 2]
    # a user who gave `--resume never` meant the beginning of the run
    assert resume_word("never", read_environment(first).restarts) == "auto"


def test_torchrun_gives_the_next_start_names_of_its_own_in_its_store() -> None:
    variables = {**rank_environment(0, 2, 1234), "TORCHELASTIC_RESTART_COUNT": "3"}
    first = next_environment(variables, None)
    second = next_environment(first, None)
    attempts = [found["TORCHELASTIC_RESTART_COUNT"] for found in (variables, first, second)]
    assert len(set(attempts)) == 3
    assert "TORCHELASTIC_RESTART_COUNT" not in next_environment(rank_environment(0, 2, 1), None)


def test_run_directory_is_handed_over_and_nobody_else_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOCK_TOKEN, "")
    lock = take_lock(tmp_path)
    lock.hand_over()
    assert (tmp_path / ".lock").exists()
    token = os.environ[LOCK_TOKEN]
    monkeypatch.setenv(LOCK_TOKEN, "another one")
    with pytest.raises(ConfigError, match="is in use by"):
        take_lock(tmp_path)
    monkeypatch.setenv(LOCK_TOKEN, token)
    following = take_lock(tmp_path)
    assert LOCK_TOKEN not in os.environ
    following.release()
    assert not (tmp_path / ".lock").exists()


def test_process_that_cannot_be_replaced_leaves_as_after_a_stop() -> None:
    assert StageFinished("saved").exit_code == 75
