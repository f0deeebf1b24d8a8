"""The secret that the ranks of one job share, and the key of one start that is made from it.

    CPT_JOB_SECRET in the environment of every rank, or
    rank 0 writes 32 random bytes into a file -> the others read it -> rank 0 removes it
            |
    key = HMAC-SHA256(secret, name of this start)  -> all ranks compare what they have

Decisions
    The file proves what the environment would prove: whoever reads it is this user. It has an
    unpredictable name and mode 0600, is created without following links, and is gone before
    training begins. If rank 0 is killed in between, it stays until a later start removes it; by
    then it opens nothing. A rank refuses a file that is a link, has another owner, or that others
    may read.
    The secret is no argument of a command and is in no message. It is removed from the environment,
    so that programs which this process starts do not get it.
    The key holds for one start: what an earlier one has signed does not verify.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cpt.errors import ConfigError, StorageError
from cpt.parallel.agreement import gather_json, on_first_rank, together
from cpt.resilience.environment import JOB_SECRET
from data_pipeline.store.file_lock import PRIVATE_MODE
from data_pipeline.store.files import no_links
from data_pipeline.store.ownership import user_name

SHARE_SECONDS = 30.0
"""How long a shared file system may take to show a new file to the other nodes."""
LEFTOVER_SECONDS = 3600.0
"""From which age on the file of an earlier start is removed; a start needs it for seconds."""
_SECRET_BYTES = 32
_FILE_NAME = re.compile(r"\.job-secret-[0-9a-f]{32}")
_CURE = f"Or set {JOB_SECRET} to the same random text on all ranks: openssl rand -hex 32."


def take_job_secret(variables: MutableMapping[str, str] = os.environ) -> bytes | None:
    """Return the secret that the environment holds, and remove it from there.

    None if there is none.  `read_environment` has checked it.
    """
    text = variables.pop(JOB_SECRET, "").strip()
    return text.encode() or None


def agree_on_key(secret: bytes | None, folder: Path, group: dist.ProcessGroup) -> bytes:
    """Return the key of this start, the same on all ranks; all of them call this.

    Args:
        secret: The secret from this rank's environment; None if there is none.
        folder: Folder on a file system that all ranks see; it need not exist.
        group: The control group.

    Raises:
        ConfigError: some ranks have a secret and others have none, or another one.
        StorageError: the file cannot be written, or read on another rank.
    """
    offers = gather_json({"has": secret is not None, "start": secrets.token_hex(16)}, group)
    without = [rank for rank, offer in enumerate(offers) if not offer["has"]]
    if without and len(without) < len(offers):
        raise ConfigError(
            f"{JOB_SECRET} is not set on ranks {without}, but on the others. Set it on all ranks, "
            "or on none."
        )
    if secret is None:
        secret = _share_secret(folder, group)
    key = hmac.new(secret, b"cpt watchdog " + offers[0]["start"].encode(), hashlib.sha256).digest()
    proof = hmac.new(key, b"all ranks have this key", hashlib.sha256).hexdigest()
    proofs = gather_json(proof, group)
    different = [rank for rank, other in enumerate(proofs) if other != proofs[0]]
    if different:
        raise ConfigError(
            f"the secret of the job is another one on ranks {different} than on rank 0. "
            f"Give all ranks the same {JOB_SECRET}, or none."
        )
    return key


def _share_secret(folder: Path, group: dist.ProcessGroup) -> bytes:
    """Return a secret that rank 0 has made, on all ranks."""
    if dist.get_world_size(group) == 1:
        return secrets.token_bytes(_SECRET_BYTES)
    with contextlib.ExitStack() as stack:
        told = on_first_rank(group, lambda: stack.enter_context(_secret_file(folder)))
        return together(group, lambda: read_secret(_place(told, folder)))


@contextlib.contextmanager
def _secret_file(folder: Path) -> Iterator[tuple[int, str]]:
    """Make a file with a new secret in the folder, or above it if that does not exist.

    Yields how many levels above the folder it is, and its name.

    Raises:
        StorageError: it cannot be written.
    """
    existing = folder.absolute()
    levels_up = 0
    while not existing.exists():
        existing = existing.parent
        levels_up += 1
    path = existing / f".job-secret-{secrets.token_hex(16)}"
    try:
        write_secret(path, secrets.token_bytes(_SECRET_BYTES))
        _remove_leftovers(existing, path.stat().st_mtime)
    except OSError as error:
        raise StorageError(
            f"the secret of the job cannot be written to {existing}: {error.strerror}. Make room "
            f"or give another folder. {_CURE}"
        ) from error
    try:
        yield levels_up, path.name
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_leftovers(folder: Path, now: float) -> None:
    """Remove the files of this user's starts that were killed before they could do so.

    Only old ones: the folder may be that of another run that starts at this moment.

    Args:
        folder: Where a secret has just been written.
        now: Unix time by the clock of its file system.
    """
    for path in folder.glob(".job-secret-*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            is_old = now - status.st_mtime > LEFTOVER_SECONDS
            if is_own and is_old and _FILE_NAME.fullmatch(path.name):
                path.unlink()


def write_secret(path: Path, secret: bytes) -> None:
    """Write a secret to a new file that only this user can read.

    Raises:
        OSError: the file exists, or cannot be written.
    """
    descriptor = no_links(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
    try:
        os.write(descriptor, secret)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_secret(path: Path, wait_seconds: float = SHARE_SECONDS) -> bytes:
    """Return the secret of a file that rank 0 has written.

    Args:
        path: The file.
        wait_seconds: How long the file may be absent or empty, because this node's view of the file
            system is older.

    Raises:
        StorageError: the file does not appear, is not this user's alone, or is no secret.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        content = _content_of(path)
        if len(content) == _SECRET_BYTES:
            return content
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    raise StorageError(
        f"{path}, which rank 0 has written, does not appear on this node within {wait_seconds:.0f} "
        f"s, or is cut off. Put the folder on a file system that all nodes see. {_CURE}"
    )


def _content_of(path: Path) -> bytes:
    """Return what a file of this user alone holds; nothing if it is not there yet.

    Raises:
        StorageError: it is a link, of another user, readable by others, or no plain file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return b""
        raise StorageError(f"{path}: {error.strerror}. {_CURE}") from error
    try:
        problem = _problem_of(os.fstat(descriptor))
        if problem:
            raise StorageError(
                f"{path}, which rank 0 has written, {problem}. Look who writes into that folder. "
                f"{_CURE}"
            )
        return os.read(descriptor, _SECRET_BYTES + 1)
    finally:
        os.close(descriptor)


def _problem_of(status: os.stat_result) -> str:
    """Return why a file is not a secret of this user; empty if it is one."""
    if not stat.S_ISREG(status.st_mode):
        return "is no plain file"
    if status.st_uid != os.geteuid():
        return f"belongs to {user_name(status.st_uid)}, not to {user_name(os.geteuid())}"
    if status.st_mode & 0o077:
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, which lets others read it"
    if status.st_nlink > 1:
        return "has a second name"
    return ""


def _place(told: Any, folder: Path) -> Path:
    """Return this rank's path of the file that rank 0 has told of.

    The path as such is not sent, because nodes may have the same folder under different names.

    Raises:
        StorageError: it is none that rank 0 can have chosen.
    """
    own = folder.absolute()
    folders = [own, *own.parents]
    levels_up, name = told
    if not (type(levels_up) is int and 0 <= levels_up < len(folders)) or not (
        _FILE_NAME.fullmatch(str(name))
    ):
        raise StorageError(
            f"rank 0 has put the secret of the job elsewhere than into {folder} or above it. Give "
            f"all nodes the same folder. {_CURE}"
        )
    return folders[levels_up] / name
