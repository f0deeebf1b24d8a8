"""The ranks of a start share a key that no other user of the machine or the network can know."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cpt.errors import ConfigError, CptError, StorageError
from cpt.parallel import agreement
from cpt.resilience import job_secret
from cpt.resilience.environment import JOB_SECRET, read_environment
from cpt.resilience.job_secret import agree_on_key, read_secret, take_job_secret, write_secret
from tests.support.other_users import ATTACKER, VICTIM, as_user, common_folder, needs_root

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


class Threads:
    """Ranks as threads of this process, which gather JSON values."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self._size = size
        self._here = threading.local()
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)
        patch.setattr(agreement, "gather_json", self._gather)
        patch.setattr(job_secret, "gather_json", self._gather)
        patch.setattr(dist, "get_rank", lambda group=None: self._here.rank)
        patch.setattr(dist, "get_world_size", lambda group=None: size)

    def run(self, call: Callable[[int], Any]) -> list[Any]:
        """Return what `call(rank)` returns or raises on every rank."""
        results: list[Any] = [None] * self._size

        def work(rank: int) -> None:
            self._here.rank = rank
            try:
                results[rank] = call(rank)
            except CptError as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _gather(self, value: Any, group: Any) -> list[Any]:
        self._values[self._here.rank] = json.loads(json.dumps(value))
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(3, monkeypatch)


GROUP: Any = None


def test_ranks_share_a_new_key_at_each_start_and_no_file_is_left(
    ranks: Threads, tmp_path: Path
) -> None:
    keys = set()
    for _ in range(2):
        found = ranks.run(lambda rank: agree_on_key(None, tmp_path / "not" / "there", GROUP))
        assert found[0] == found[1] == found[2] and len(found[0]) == 32
        keys.add(found[0])
    assert len(keys) == 2 and list(tmp_path.iterdir()) == []


def test_file_of_a_start_that_was_killed_is_removed_by_a_later_one(
    ranks: Threads, tmp_path: Path
) -> None:
    names = {"old": "0" * 32, "new": "1" * 32, "link": "2" * 32, "another": "3" * 31}
    paths = {kind: tmp_path / f".job-secret-{name}" for kind, name in names.items()}
    for kind in ("old", "new", "another"):
        write_secret(paths[kind], b"s" * 32)
    paths["link"].symlink_to(paths["new"])
    before = paths["old"].stat().st_mtime - 2 * 3600
    for kind in ("old", "another", "link"):
        os.utime(paths[kind], (before, before), follow_symlinks=False)
    ranks.run(lambda rank: agree_on_key(None, tmp_path, GROUP))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {paths[kind].name for kind in ("new", "link", "another")}


def test_secret_of_the_environment_gives_another_key_at_each_start_and_no_file(
    ranks: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_secret, "write_secret", lambda *_: pytest.fail("a file was written"))
    keys = set()
    for _ in range(2):
        found = ranks.run(lambda rank: agree_on_key(b"s" * 32, tmp_path, GROUP))
        assert found[0] == found[1] == found[2]
        keys.add(found[0])
    assert len(keys) == 2 and b"s" * 32 not in keys


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ([b"a" * 32, None, b"a" * 32], r"CPT_JOB_SECRET is not set on ranks \[1\]"),
        ([b"a" * 32, b"a" * 32, b"b" * 32], r"another one on ranks \[2\] than on rank 0"),
    ],
)
def test_ranks_with_different_secrets_refuse_together_and_show_none(
    ranks: Threads, tmp_path: Path, secrets: list[bytes | None], words: str
) -> None:
    found = ranks.run(lambda rank: agree_on_key(secrets[rank], tmp_path, GROUP))
    for error in found:
        assert isinstance(error, ConfigError) and "aaaa" not in str(error)
        with pytest.raises(ConfigError, match=words):
            raise error


def test_folder_that_cannot_be_written_is_refused_by_all_with_the_variable_as_cure(
    ranks: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, secret: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(job_secret, "write_secret", full)
    for error in ranks.run(lambda rank: agree_on_key(None, tmp_path, GROUP)):
        assert isinstance(error, StorageError) and "No space left on device" in str(error)
        assert "set CPT_JOB_SECRET" in str(error)


@pytest.mark.parametrize(
    "told",
    [
        [0, "../secret"],
        [0, "/etc/hostname"],
        [99, ".job-secret-" + "0" * 32],
        [-1, ".job-secret-" + "0" * 32],
        ["0", ".job-secret-" + "0" * 32],
    ],
    ids=["up", "absolute", "too-far-up", "down", "text"],
)
def test_file_elsewhere_is_not_opened(tmp_path: Path, told: list[Any]) -> None:
    with pytest.raises(StorageError, match="elsewhere"):
        job_secret._place(told, tmp_path)


def test_single_rank_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Threads(1, monkeypatch)
    monkeypatch.setattr(job_secret, "write_secret", lambda *_: pytest.fail("a file was written"))
    (key,) = ranks.run(lambda rank: agree_on_key(None, tmp_path, GROUP))
    assert len(key) == 32


def test_file_is_for_its_owner_alone_and_never_follows_or_replaces(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    previous = os.umask(0)
    try:
        write_secret(path, b"s" * 32)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secret(path) == b"s" * 32
    with pytest.raises(FileExistsError):
        write_secret(path, b"t" * 32)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "link", b"t" * 32)
    assert not (tmp_path / "target").exists()


def test_file_that_a_slow_file_system_shows_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    writer = threading.Timer(0.3, lambda: write_secret(path, b"s" * 32))
    writer.start()
    assert read_secret(path, wait_seconds=30) == b"s" * 32


def link(path: Path) -> None:
    write_secret(path.with_suffix(".real"), b"s" * 32)
    path.symlink_to(path.with_suffix(".real"))


def readable(path: Path) -> None:
    write_secret(path, b"s" * 32)
    path.chmod(0o640)


def second_name(path: Path) -> None:
    write_secret(path, b"s" * 32)
    path.with_suffix(".other").hardlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def missing(path: Path) -> None:
    pass


def cut_off(path: Path) -> None:
    write_secret(path, b"s" * 31)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (link, "symbolic links"),
        (readable, "mode 0640, which lets others read it"),
        (second_name, "has a second name"),
        (pipe, "is no plain file"),
        (missing, "does not appear on this node"),
        (cut_off, "is cut off"),
    ],
)
def test_file_that_may_not_be_the_secret_is_refused(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "secret"
    make(path)
    with pytest.raises(StorageError, match=words) as refused:
        read_secret(path, wait_seconds=0.2)
    assert "ssss" not in str(refused.value) and "CPT_JOB_SECRET" in str(refused.value)


@needs_root
def test_file_of_another_user_is_refused_and_ours_cannot_be_read_by_him() -> None:
    with common_folder() as folder:
        folder.chmod(0o777)

        def plant() -> None:
            write_secret(folder / "planted", b"s" * 32)
            (folder / "planted").chmod(0o644)

        def try_to_read(name: str) -> str:
            try:
                return read_secret(folder / name, wait_seconds=0).hex()
            except StorageError as error:
                return str(error)

        as_user(ATTACKER, plant)
        as_user(VICTIM, lambda: write_secret(folder / "own", b"v" * 32))
        told = as_user(VICTIM, lambda: try_to_read("planted"))
        assert f"belongs to uid {ATTACKER}, not to uid {VICTIM}" in told
        assert "Permission denied" in as_user(ATTACKER, lambda: try_to_read("own"))
        assert as_user(VICTIM, lambda: try_to_read("own")) == (b"v" * 32).hex()


def test_secret_leaves_the_environment_when_it_is_read() -> None:
    variables = {JOB_SECRET: f"{'s' * 40}\n", "LANG": "C"}
    assert take_job_secret(variables) == b"s" * 40
    assert variables == {"LANG": "C"}
    assert take_job_secret(variables) is None


def test_secret_that_can_be_guessed_is_refused_and_not_shown() -> None:
    read_environment({**LAUNCHED, JOB_SECRET: "s" * 32})
    read_environment({**LAUNCHED, JOB_SECRET: ""})
    with pytest.raises(ConfigError, match="CPT_JOB_SECRET has 8 characters") as refused:
        read_environment({**LAUNCHED, JOB_SECRET: "hunter2!"})
    assert "hunter2" not in str(refused.value)
