"""A lock is private, names its holder, and nobody waits for it without end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.store import file_lock as module
from data_pipeline.store.file_lock import LockHeld, file_lock
from tests.support.other_users import (
    ATTACKER,
    VICTIM,
    as_user,
    common_folder,
    needs_root,
    owned_folder,
)


@contextlib.contextmanager
def held_by_another_process(path: Path) -> Iterator[int]:
    """Hold a lock in a forked child; yields its process id."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold() -> None:
        with file_lock(path):
            ready.set()
            done.wait(60)

    child = context.Process(target=hold)
    child.start()
    assert ready.wait(60)
    assert child.pid is not None
    try:
        yield child.pid
    finally:
        done.set()
        child.join()


def use(path: Path) -> str:
    """Hold a lock; return why that is refused, or "used"."""
    try:
        with file_lock(path):
            return "used"
    except ConfigError as error:
        return str(error)


def test_lock_that_is_held_is_refused_and_its_holder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_by_another_process(path) as pid, pytest.raises(LockHeld) as caught, file_lock(path):
        pass
    # a kernel whose /proc/locks is empty, as in some sandboxes, knows no holder
    names = (f"process {pid} of ", "a process that cannot be named")
    assert f"the lock {path} is held by" in str(caught.value)
    assert any(name in str(caught.value) for name in names)
    with file_lock(path):
        pass


def test_holder_is_read_from_the_list_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.touch()
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    listed = tmp_path / "locks"
    listed.write_text(
        f"1: POSIX  ADVISORY  WRITE 11 {device} 0 EOF\n"
        f"2: FLOCK  ADVISORY  WRITE {os.getpid()} {device} 0 EOF\n"
        f"2: -> FLOCK  ADVISORY  WRITE 12 {device} 0 EOF\n",
        encoding="ascii",
    )
    monkeypatch.setattr(module, "LOCK_LIST", listed)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        text = module._holder_of(descriptor)
    finally:
        os.close(descriptor)
    assert text.startswith(f"process {os.getpid()} of ") and text.endswith("on this machine")


def test_waiting_is_told_within_seconds_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.2)
    path = tmp_path / "lock"
    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        held_by_another_process(path),
        pytest.raises(LockHeld),
        file_lock(path, limit_seconds=0.6),
    ):
        pass
    assert time.monotonic() - started >= 0.6
    (record,) = [one for one in caplog.records if "waiting for the lock" in one.getMessage()]
    assert str(path) in record.getMessage()


def test_lock_is_taken_as_soon_as_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    entered = threading.Event()
    taken = []

    def take() -> None:
        entered.wait(60)
        with file_lock(path, limit_seconds=60, is_kept=False):
            taken.append(path.exists())

    waiting = threading.Thread(target=take)
    with file_lock(path, is_kept=False):
        waiting.start()
        entered.set()
        time.sleep(0.3)
        assert taken == []
    waiting.join()
    assert taken == [True]
    assert not path.exists()


def test_shared_locks_are_held_together_and_keep_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with contextlib.ExitStack() as held:
        held.enter_context(file_lock(path, is_shared=True))
        held.enter_context(file_lock(path, is_shared=True))
        with pytest.raises(LockHeld):
            held.enter_context(file_lock(path))


def test_file_of_a_shared_lock_stays_until_the_last_holder_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path, is_shared=True, is_kept=False):
        with file_lock(path, is_shared=True, is_kept=False):
            pass
        assert path.exists()
        with pytest.raises(LockHeld), file_lock(path):
            pass
    assert not path.exists()


@needs_root
def test_lock_that_root_has_left_is_told_with_its_owner_and_a_cure() -> None:
    with common_folder() as common:
        own = owned_folder(common / "own", VICTIM, 0o755)
        (own / "lock").touch(mode=0o600)

        told = as_user(VICTIM, lambda: use(own / "lock"))
        assert "belongs to root (uid 0)" in told and "have the file removed" in told


@pytest.mark.parametrize("mode", [None, 0o644, 0o666])
def test_lock_file_is_private_whatever_the_umask_and_whatever_it_was(
    tmp_path: Path, mode: int | None
) -> None:
    path = tmp_path / "lock"
    if mode is not None:
        path.touch()
        path.chmod(mode)
    before = os.umask(0)
    try:
        with file_lock(path):
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"), file_lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "victim").exists()


@needs_root
def test_other_users_cannot_hold_a_lock_nor_plant_one() -> None:
    with common_folder() as common:
        own = owned_folder(common / "own", VICTIM, 0o755)
        path = own / "lock"

        def steal() -> str:
            try:
                fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except PermissionError as error:
                return str(error.strerror)
            return "held"

        assert as_user(VICTIM, lambda: use(path)) == "used"
        assert as_user(ATTACKER, steal) == "Permission denied"
        path.unlink()
        path.touch(mode=0o666)
        os.chown(path, ATTACKER, ATTACKER)
        assert f"belongs to uid {ATTACKER}" in as_user(VICTIM, lambda: use(path))


@needs_root
def test_file_that_another_user_puts_there_while_it_is_opened_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with common_folder() as common:
        own = owned_folder(common / "own", VICTIM, 0o755)
        path = own / "lock"
        opened = module.no_links

        def swap(name: Path, flags: int, mode: int) -> int:
            (own / "planted").rename(name)
            return opened(name, flags, mode)

        (own / "planted").touch()
        (own / "planted").chmod(0o666)
        os.chown(own / "planted", ATTACKER, ATTACKER)
        monkeypatch.setattr(module, "no_links", swap)

        assert f"belongs to uid {ATTACKER}" in as_user(VICTIM, lambda: use(path))


def test_pipe_in_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="Not a regular file"), file_lock(tmp_path / "lock"):
        pass


def test_file_system_without_flock_is_told_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with file_lock(tmp_path / "lock") as is_locked:
        assert not is_locked


def test_a_lock_that_the_file_system_fails_to_take_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(OSError, match="cannot be locked") as caught, file_lock(tmp_path / "lock"):
        pass
    assert caught.value.filename == str(tmp_path / "lock")
