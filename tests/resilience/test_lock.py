"""One job per run directory; who is gone does not keep it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt.errors import ConfigError
from cpt.resilience import lock
from cpt.resilience.lock import LOCK, STALE_SECONDS, Holder, take_lock, this_process
from data_pipeline.store.file_lock import file_lock
from tests.support.other_users import (
    ATTACKER,
    VICTIM,
    as_user,
    common_folder,
    needs_root,
    owned_folder,
)

ROOT = Path(__file__).resolve().parents[2]


def leave_lock(run_dir: Path, **changes: object) -> Holder:
    """A lock as another process would have left it."""
    holder = dataclasses.replace(this_process(), **changes)  # type: ignore[arg-type]
    (run_dir / LOCK).write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
    return holder


def make_old(run_dir: Path) -> None:
    then = time.time() - STALE_SECONDS - 5
    os.utime(run_dir / LOCK, (then, then))


@pytest.mark.case("C11", "exit 78; host and pid of the holder are named")
def test_second_job_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    taken = take_lock(tmp_path)
    with pytest.raises(ConfigError) as caught:
        take_lock(tmp_path)
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert (
        f"in use by process {os.getpid()} on {socket.gethostname()}: the process is running" in text
    )
    assert str(tmp_path / LOCK) in text
    taken.release()
    take_lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("C11", "stale lock of a dead process is taken over")
def test_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from cpt.resilience.lock import take_lock
take_lock(Path({str(tmp_path)!r}))
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -9 and (tmp_path / LOCK).exists()
    take_lock(tmp_path).release()


def test_process_with_the_id_of_a_dead_holder_is_not_taken_for_it(tmp_path: Path) -> None:
    leave_lock(tmp_path, started="1")
    take_lock(tmp_path).release()


def test_holder_elsewhere_counts_as_alive_while_its_lock_is_fresh(tmp_path: Path) -> None:
    leave_lock(tmp_path, host="node7", machine="another boot")
    with pytest.raises(ConfigError, match="on node7: its last sign of life is 0 s old"):
        take_lock(tmp_path)
    make_old(tmp_path)
    take_lock(tmp_path).release()


@pytest.mark.parametrize("variables", [{"SLURM_JOB_ID": "42"}, {"CPT_JOB": "42"}])
def test_job_that_starts_again_takes_over_from_its_earlier_start_on_another_node(
    tmp_path: Path, monkeypatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave_lock(tmp_path, host="node7", machine="another boot")
    with pytest.raises(ConfigError, match=r"\(job 42\)"):  # the same start: two steps of one job
        take_lock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    take_lock(tmp_path).release()


def test_lock_that_says_nothing_sensible_holds_while_it_is_fresh(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="an unknown job"):
        take_lock(tmp_path)
    make_old(tmp_path)
    take_lock(tmp_path).release()


def test_release_leaves_the_lock_of_a_successor_alone(tmp_path: Path) -> None:
    taken = take_lock(tmp_path)
    other = leave_lock(tmp_path, token="other")
    taken.release()
    assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["token"] == other.token


@needs_root
def test_user_who_may_only_read_a_run_directory_keeps_no_start_waiting() -> None:
    """Finding 8: uid 3001 holds the lock of a 0755 run directory that it can open for reading."""
    with common_folder() as common:
        run = owned_folder(common / "run", VICTIM, 0o755)
        context = multiprocessing.get_context("fork")
        held, done = context.Event(), context.Event()

        def hold() -> None:
            os.setgroups([])
            os.setgid(ATTACKER)
            os.setuid(ATTACKER)
            fcntl.flock(os.open(run, os.O_RDONLY), fcntl.LOCK_EX)
            held.set()
            done.wait(60)

        def take() -> float:
            started = time.monotonic()
            take_lock(run).release()
            return time.monotonic() - started

        attacker = context.Process(target=hold)
        attacker.start()
        try:
            assert held.wait(60)
            assert as_user(VICTIM, take) < 20
        finally:
            done.set()
            attacker.join()
        assert list(run.iterdir()) == []


def test_start_that_hangs_while_it_takes_the_lock_is_told_and_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ENTRANCE_SECONDS", 0.3)
    entrance = tmp_path / f"{lock.ENTRANCE}-{os.geteuid()}"
    with file_lock(entrance), pytest.raises(ConfigError) as caught:
        take_lock(tmp_path)
    assert str(entrance) in str(caught.value) and "is held by" in str(caught.value)
    take_lock(tmp_path).release()


@pytest.mark.parametrize("pid", ["1/a\0b", "../1", 1.5, -1, [1], None], ids=repr)
def test_lock_whose_holder_has_no_process_id_tells_nobody(tmp_path: Path, pid: object) -> None:
    values = dataclasses.asdict(this_process())
    (tmp_path / LOCK).write_text(json.dumps({**values, "pid": pid}))
    sight = lock.look_at_lock(tmp_path)
    assert sight is not None and sight.holder is None
