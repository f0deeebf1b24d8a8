"""A rank that is killed is noticed at once by the others of its node, with signal and cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cpt.resilience.neighbors import Death, Neighbors, describe_kill


@pytest.fixture
def neighbors() -> Iterator[Neighbors]:
    watched = Neighbors()
    yield watched
    watched.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with 3 when its input is closed."""
    command = [sys.executable, "-S", "-c", "import sys; sys.stdin.read(); sys.exit(3)"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def wait_for_death(neighbors: Neighbors) -> list[Death]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        deaths = neighbors.wait()
        if deaths:
            return deaths
    raise AssertionError("no death was noticed")


@pytest.fixture(params=["pidfd", "old kernel", "Python without it"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of noticing, and why there is more than one."""

    def missing(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    if request.param == "old kernel":
        monkeypatch.setattr(os, "pidfd_open", missing)
    if request.param == "Python without it":
        monkeypatch.delattr(os, "pidfd_open")


@pytest.mark.usefixtures("kernel")
def test_killed_process_is_noticed_with_its_signal(neighbors, child) -> None:
    neighbors.meet(5, child.pid)
    assert neighbors.ranks == [5]
    child.send_signal(signal.SIGKILL)
    assert wait_for_death(neighbors) == [Death(rank=5, pid=child.pid, signal=9, code=None)]
    assert neighbors.ranks == []


def test_exit_code_of_a_process_that_ended_by_itself_is_known(neighbors, child) -> None:
    neighbors.meet(2, child.pid)
    child.stdin.close()
    assert wait_for_death(neighbors) == [Death(rank=2, pid=child.pid, signal=0, code=3)]


def test_process_that_was_waited_for_before_anybody_looked_is_of_unknown_end(neighbors) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    neighbors.meet(1, gone.pid)
    assert wait_for_death(neighbors) == [Death(rank=1, pid=gone.pid, signal=0, code=None)]


def test_living_processes_are_no_deaths_and_a_waiting_thread_can_be_woken(neighbors, child) -> None:
    neighbors.meet(1, child.pid)
    assert neighbors.wait() == []  # woken by the new neighbor
    found: list[list[Death]] = []
    waiting = threading.Thread(target=lambda: found.append(neighbors.wait()))
    waiting.start()
    neighbors.wake()
    waiting.join(30)
    assert found == [[]] and neighbors.ranks == [1]


def killed(number: int) -> Death:
    return Death(rank=3, pid=77, signal=number, code=None)


def test_line_names_rank_process_node_signal_step_and_cause() -> None:
    text = describe_kill(killed(9), node="n2", step=4, cause="Memory ran out.")
    assert text == (
        "rank 3 (process 77 on n2) was killed by signal 9 (SIGKILL) in step 4. Memory ran out."
    )


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGBUS, "signal 7 (SIGBUS) in step 1. A page of a mapped file"),
        (signal.SIGSEGV, "signal 11 (SIGSEGV) in step 1. A native library crashed"),
        (signal.SIGABRT, "signal 6 (SIGABRT) in step 1. A native library gave up"),
        (40, "was killed by signal 40 in step 1."),
    ],
)
def test_cause_of_another_signal_is_not_memory(number: int, words: str) -> None:
    text = describe_kill(killed(number), node="n2", step=1, cause="Memory ran out.")
    assert words in text and "Memory" not in text


def test_kill_while_the_run_starts_is_told_as_such() -> None:
    assert "before the first step." in describe_kill(killed(9), node="n", step=0, cause="")
