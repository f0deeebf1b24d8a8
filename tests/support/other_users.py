"""Functions that run as another user of the machine, for tests that run as root."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

VICTIM = 3002
ATTACKER = 3001
"""User ids that nobody on the machine has."""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can start processes of other users"
)


def as_user(uid: int, function: Callable[[], Any]) -> Any:
    """Return what a function returns in a forked child of that user; raise what it raises.

    Its result goes through JSON.  All modules that it needs should be imported: the child may not
    be able to read them.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(uid, function, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    kind, value = json.loads(content)
    if kind == "trace":
        raise AssertionError(f"the child of user {uid} failed:\n{value}")
    return value


def _answer(uid: int, function: Callable[[], Any], pipe: int) -> None:
    """Run the function in the child, send its result and end the process."""
    try:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        answer = ("value", function())
    except BaseException:
        answer = ("trace", traceback.format_exc())
    try:
        os.write(pipe, json.dumps(answer).encode())
    finally:
        os._exit(0)


@contextmanager
def common_folder() -> Iterator[Path]:
    """Give a folder that every user may enter; pytest's own is closed to all but its user."""
    folder = Path(tempfile.mkdtemp(prefix="cpt-users-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def owned_folder(path: Path, uid: int, mode: int) -> Path:
    """Make a folder of a user with that mode, whatever the umask."""
    path.mkdir()
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


def owned_link(path: Path, target: Path, uid: int) -> Path:
    """Make a link of a user."""
    path.symlink_to(target)
    os.lchown(path, uid, uid)
    return path
