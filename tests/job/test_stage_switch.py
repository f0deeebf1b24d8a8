"""What a process hands to the program that takes its place at the border of a stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.errors import EXIT_DONE, ConfigError, StageFinished
from cpt.job.resume_order import note_carried_out, resume_word
from cpt.job.stage_switch import next_environment
from cpt.resilience.environment import read_environment
from cpt.resilience.lock import LOCK_TOKEN, take_lock
from tests.support.launcher import ROOT, free_port, rank_environment

SECRET = b"x" * 64
REPLACED = """
import os, signal, threading, time
from cpt.resilience.stop import StopRequest
stop = StopRequest()
stop.listen()
if "CPT_STAGE_STARTS" not in os.environ:
    import torch.distributed as dist
    from cpt.errors import StageFinished
    from cpt.job.stage_switch import start_again
    dist.init_process_group("gloo")
    # as the launcher watch and the trackers do, which block no signal
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signal.raise_signal(signal.SIGUSR1)
    start_again(stop, None, StageFinished("saved"))
deadline = time.monotonic() + 10
while not stop.reason() and time.monotonic() < deadline:
    time.sleep(0.01)
print("second", os.getpid(), stop.reason())
"""


def test_request_to_stop_that_nobody_answered_reaches_the_next_program(tmp_path: Path) -> None:
    script = tmp_path / "replaced.py"
    script.write_text(REPLACED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, **rank_environment(0, 1, free_port()), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_DONE
    assert output.splitlines()[-1].split() == ["second", str(process.pid), "SIGTERM"]


def test_next_start_has_the_secret_and_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    first = next_environment(rank_environment(0, 2, 1234), SECRET)
    second = next_environment(first, None)
    assert first["CPT_JOB_SECRET"] == SECRET.decode()
    assert [read_environment(found).restarts for found in (first, second)] == [1, 2]
    # a user who gave `--resume never` meant the beginning of the run
    note_carried_out(tmp_path, "never")
    assert resume_word("never", read_environment(first).restarts, tmp_path) == "auto"


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
