"""Processes are described as the kernel sees them, and one that is gone is no error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cpt.resilience import processes
from tests.support.other_users import ATTACKER, as_user, needs_root


def gone() -> int:
    """Return the id of a process that has ended and was waited for."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_own_process_is_described() -> None:
    own = os.getpid()
    assert own in processes.process_ids()
    assert processes.parent_of(own) == os.getppid()
    assert "python" in processes.command_of(own)[0]
    assert int(processes.start_ticks_of(own)) > 0
    assert processes.age_seconds() > 0


def test_child_is_described_by_its_parent_command_and_environment() -> None:
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env={"CPT_TEST": "a b"})
    try:
        assert processes.parent_of(child.pid) == os.getpid()
        assert processes.command_of(child.pid) == command
        assert "CPT_TEST=a b" in processes.environment_of(child.pid)
        own_start = int(processes.start_ticks_of(os.getpid()))
        assert int(processes.start_ticks_of(child.pid)) >= own_start
    finally:
        child.communicate(b"\n")


def test_process_that_is_gone_is_no_error() -> None:
    pid = gone()
    assert processes.parent_of(pid) is None
    assert processes.start_ticks_of(pid) == ""
    assert processes.command_of(pid) == [] and processes.environment_of(pid) == []


def test_ended_process_that_nobody_has_waited_for_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.start_ticks_of(child.pid) == ""
    assert processes.parent_of(child.pid) == os.getpid()
    child.wait()


@pytest.fixture(params=["pidfd", "Python without it"])
def signaled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of sending a signal."""
    if request.param == "Python without it":
        monkeypatch.delattr(os, "pidfd_open")


@pytest.mark.usefixtures("signaled")
def test_signal_is_sent_to_the_process_that_was_started_then_and_to_no_other() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        started = processes.start_ticks_of(child.pid)
        assert not processes.send_signal(child.pid, str(int(started) - 1), signal.SIGTERM)
        assert not processes.send_signal(child.pid, "", signal.SIGTERM)
        time.sleep(0.05)
        assert child.poll() is None
        assert processes.send_signal(child.pid, started, signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
    assert not processes.send_signal(child.pid, started, signal.SIGTERM)


@needs_root
def test_process_of_another_user_is_not_signaled() -> None:
    with subprocess.Popen(["sleep", "600"], user=ATTACKER, group=ATTACKER) as child:
        deadline = time.monotonic() + 10
        while os.stat(f"/proc/{child.pid}").st_uid != ATTACKER and time.monotonic() < deadline:
            time.sleep(0.01)
        started = processes.start_ticks_of(child.pid)
        assert not processes.send_signal(child.pid, started, signal.SIGTERM)
        assert as_user(ATTACKER, lambda: processes.is_own_process(child.pid, started))
        child.kill()
