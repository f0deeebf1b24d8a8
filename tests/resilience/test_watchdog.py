"""What another rank's end looks like from here is not taken for a fault of this rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from cpt.config import WatchdogSection
from cpt.errors import ConfigError, cause_and_code
from cpt.resilience.environment import node_name, ranks_of_node
from cpt.resilience.heartbeat import Beat, Process
from cpt.resilience.neighbors import Death
from cpt.resilience.phase import PhaseClock
from cpt.resilience.ruling import Ruling
from cpt.resilience.stack_files import append_stacks, append_text
from cpt.resilience.watchdog import Watchdog, is_lost_peer

HUNG = Ruling(kind="hung", rank=0, code=71, text="rank 1 hangs", hung_ranks=(1,))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4"),
        RuntimeError("Application timeout caused pair closure. Connection reset by peer"),
        RuntimeError("ncclRemoteError: a network error or a remote process exiting prematurely."),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_error_of_a_lost_connection_waits_for_its_cause(error: Exception) -> None:
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory"), ValueError("Broken pipe"), ConfigError("Broken pipe")],
)
def test_own_error_does_not(error: Exception) -> None:
    assert not is_lost_peer(error)


def test_ruling_names_who_is_to_blame() -> None:
    hung = Ruling(kind="hung", rank=0, code=71, text="", hung_ranks=(9, 12))
    assert hung.to_blame() == 9
    assert Ruling(kind="hung", rank=0, code=71, text="").to_blame() is None
    assert Ruling(kind="killed", rank=5, code=137, text="", signal=9).to_blame() == 5


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, range(4, 8)),
        ({"RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, range(2)),
        ({"RANK": "3"}, range(3, 4)),
    ],
)
def test_ranks_of_a_node_are_consecutive(variables: dict[str, str], ranks: range) -> None:
    assert ranks_of_node(variables) == ranks


def test_node_has_the_batch_systems_name() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu-7"}) == "gpu-7"
    assert node_name({}) != ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("wrong"), 78, "wrong"),
        (PermissionError(13, "Permission denied", "/data/x"), 74, "/data/x: Permission denied."),
        (OSError(104, "Connection reset by peer"), 70, "ConnectionResetError: [Errno 104]"),
        (OSError(28, "No space left on device"), 74, "storage: No space left on device. Free"),
        (TimeoutError(110, "Connection timed out"), 70, "TimeoutError: [Errno 110]"),
        (RuntimeError("one\ntwo"), 70, "RuntimeError: one"),
    ],
)
def test_error_of_a_run_has_the_code_that_a_command_gives_it(error, code: int, words: str) -> None:
    cause, found = cause_and_code(error)
    assert found == code and cause.startswith(words) and "\n" not in cause


LOST = RuntimeError("[gloo] Connection closed by peer\nframe #0")


def watchdog(tmp_path: Path, rank: int) -> Watchdog:
    """The watchdog of a rank that has not been started."""
    topology: Any = SimpleNamespace(rank=rank, world_size=4)
    settings = WatchdogSection()
    return Watchdog(tmp_path, topology, settings, PhaseClock(), lambda event: None, key=b"k")


@pytest.mark.parametrize(("code", "passed_on"), [(74, 74), (3, 70), (None, 70)])
def test_rank_that_ended_without_a_word_is_blamed_for_the_lost_connection(
    tmp_path: Path, code: int | None, passed_on: int
) -> None:
    watched = watchdog(tmp_path, rank=2)
    watched._ended.append(Death(rank=1, pid=9, signal=0, code=code))
    ruling = watched._ruling_on_failure(LOST)
    assert (ruling.kind, ruling.rank, ruling.code) == ("killed", 1, passed_on)
    how = "in an unknown way" if code is None else f"with exit code {code}"
    assert f"rank 1 (process 9 on {ruling.node}) ended {how} and said nothing" in ruling.text


def test_node_without_a_sign_of_life_is_blamed_by_the_first_rank(tmp_path: Path) -> None:
    watched = watchdog(tmp_path, rank=0)
    now = time.monotonic()
    for seconds in (30.0, 20.0, 10.0, 0.0):
        beats = []
        for rank in range(4):
            tick = now - seconds if rank < 2 else 0.0
            beats.append(
                Beat(
                    count=7,
                    phase="forward",
                    step=3,
                    tick=tick,
                    pid=1,
                    host="h",
                    node=f"n{rank // 2}",
                )
            )
        watched._observer.see(now - seconds, beats, None)
    ruling = watched._ruling_on_failure(LOST)
    assert (ruling.kind, ruling.rank, ruling.code, ruling.node) == ("killed", 2, 71, "n1")
    assert ruling.text.startswith("rank 2 last seen in phase=forward step=3, rank 3 last seen")
    assert "with no sign of life since then (on n1)" in ruling.text


def test_connection_that_is_lost_after_a_ruling_makes_no_other_one(tmp_path: Path) -> None:
    watched = watchdog(tmp_path, rank=0)
    watched._ruling = HUNG
    watched._told.set()
    watched._closed.set()  # in a run the watching thread ends the process instead
    watched.report_failure(LOST)
    assert watched._own_ruling is None


def test_first_rank_is_blamed_if_its_store_is_gone(tmp_path: Path) -> None:
    watched = watchdog(tmp_path, rank=3)
    watched._store_error = "DistNetworkError: closed"
    ruling = watched._ruling_on_failure(LOST)
    assert ruling.kind == "hung" and ruling.code == 71
    assert "rank 0, which holds the store, never seen, has not answered" in ruling.text


def test_own_error_blames_nobody_else(tmp_path: Path) -> None:
    watched = watchdog(tmp_path, rank=2)
    watched._ended.append(Death(rank=1, pid=9, signal=0, code=3))
    ruling = watched._ruling_on_failure(ValueError("own\nsecond line"))
    assert (ruling.kind, ruling.rank, ruling.code) == ("failed", 2, 70)
    assert ruling.text == "rank 2 failed in phase=load step=0: ValueError: own"


def test_first_ruling_of_a_rank_holds(tmp_path: Path) -> None:
    watched = watchdog(tmp_path, rank=2)
    first = Ruling(kind="killed", rank=1, code=137, text="killed", signal=9)
    assert watched._rule(first) is first
    assert watched._rule(Ruling(kind="failed", rank=2, code=70, text="later")) is first


class Exits:
    """Codes with which `os._exit` was called, in place of the end of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        self.called = threading.Event()
        monkeypatch.setattr("cpt.resilience.watchdog.os._exit", self._note)

    def _note(self, code: int) -> None:
        self.codes.append(code)
        self.called.set()


def test_rank_of_a_hung_run_leaves_if_the_file_system_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr("cpt.resilience.watchdog.LEAVE_SECONDS", 0.2)
    monkeypatch.setattr("cpt.resilience.stack_files.make_folder", lambda folder: answer.wait(120))
    exits = Exits(monkeypatch)
    watched = watchdog(tmp_path, rank=2)
    watched._all_leaving.set()
    leaving = threading.Thread(target=watched._leave, args=(HUNG,), daemon=True)
    leaving.start()
    has_left = exits.called.wait(60)
    answer.set()
    leaving.join(60)  # a late one would meet the real os._exit
    assert has_left and exits.codes == [71]


def test_rank_leaves_if_nobody_reads_its_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = threading.Event()
    monkeypatch.setattr("cpt.resilience.watchdog.LEAVE_SECONDS", 0.2)
    monkeypatch.setattr("cpt.resilience.voice.SAY_SECONDS", 0.1)
    monkeypatch.setattr("cpt.resilience.voice.os.write", lambda file, data: drain.wait(120))
    exits = Exits(monkeypatch)
    watched = watchdog(tmp_path, rank=2)
    watched._all_leaving.set()
    ruling = Ruling(kind="killed", rank=1, code=137, text="rank 1 was killed", signal=9)
    leaving = threading.Thread(target=watched._leave, args=(ruling,), daemon=True)
    leaving.start()
    has_left = exits.called.wait(60)
    drain.set()
    leaving.join(60)
    assert has_left and exits.codes == [137]


STACKS_INTO_A_FULL_PIPE = """
import contextlib, os, pathlib, threading
from cpt.resilience import stack_files

reader, writer = os.pipe()
os.set_blocking(writer, False)
with contextlib.suppress(BlockingIOError):
    while True:
        os.write(writer, bytes(4096))
os.set_blocking(writer, True)
os.read(reader, 4096)  # room for the heading, not for the stacks
stack_files._opened = lambda folder, rank: contextlib.nullcontext(writer)

def leave_from_a_deep_stack(num_frames):
    if num_frames:
        leave_from_a_deep_stack(num_frames - 1)
    write = lambda: stack_files.append_stacks(pathlib.Path(), 0, "heading")
    threading.Thread(target=write, daemon=True).start()
    threading.Event().wait(0.2)
    os._exit(71)

leave_from_a_deep_stack(200)
"""


def test_stacks_that_cannot_be_written_stop_no_other_thread() -> None:
    program = [sys.executable, "-c", STACKS_INTO_A_FULL_PIPE]
    assert subprocess.run(program, timeout=120).returncode == 71


class Talk:
    """The beats of other ranks as the store gave them."""

    def __init__(self, **beats: Beat) -> None:
        self._beats = beats

    def beat_of(self, rank: int) -> Beat | None:
        return self._beats.get(f"rank{rank}")


def test_signal_goes_only_to_the_process_that_the_hung_rank_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is here, rank 2 on another machine, rank 3 has not said which process it is."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    watched = watchdog(tmp_path, rank=0)
    here = Beat.of(PhaseClock().now(), 0.0, Process.this())
    talk: Any = Talk(rank1=here, rank2=replace(here, machine="another boot"))
    watched._meet_neighbors(talk)
    hung = Ruling(kind="hung", rank=0, code=71, text="", hung_ranks=(0, 1, 2, 3))
    assert watched._hung_neighbors(hung) == {1: here}
    watched._neighbors.close()


def test_stacks_follow_no_link_and_hold_nothing_that_steers_a_terminal(tmp_path: Path) -> None:
    victim = tmp_path / "bashrc"
    victim.write_text("mine\n")
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    (stacks / "rank-1.txt").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        append_text(stacks, 1, "text")
    assert victim.read_text() == "mine\n"
    os.mkfifo(stacks / "rank-2.txt")
    with pytest.raises(OSError, match="No such device"):
        append_text(stacks, 2, "nobody reads this pipe")
    append_stacks(stacks, 3, "\x1b]0;owned\x07")
    text = (stacks / "rank-3.txt").read_text()
    assert text.startswith("\\x1b]0;owned\\x07\n") and "test_watchdog.py" in text
