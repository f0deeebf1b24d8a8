"""Who may change a directory, and the refusal of those that other users may change.

A run, a build or a cache is read back and trusted, and written to.  Whoever can write there can
change what a run loads, or lead what it writes to another file of the user, through a link.

Decisions
    The rule of OpenSSH's `safe_path`: a path belongs to this user or to root, and neither its group
    nor others may write to it.  A POSIX ACL that lets somebody write shows in the same bits: those
    of the group are then its mask, and `chmod g-w` takes the right from all that it names.
    Unlike OpenSSH, nothing is refused because of the folders above.  Project folders that a group
    may write to (`/groups/lab`, mode 2770) are how most clusters share disks.  Who may write there
    can move a directory away, but what he puts in its place is his own and is refused.
    A link is the exception: it may lead to another directory of the user himself, which would pass.
    So every link on the way must belong to this user or to root, too.
    What is inside is looked at as deep as it goes, but only as far as others can get in: a file
    that others may write to does not show in the mode of the folder above it.  Of run directories
    only the folders that are read back are looked at, because the rest may be large.
    The sticky bit lets nobody replace a file of another user, but lets everybody make one that is
    not there yet: a directory that others may write to is refused with it, too.
    One setting for all commands names what is meant to be shared: an environment variable, because
    a build or an export is read by commands that have no configuration file, and because it is the
    site, not the run, that decides whom to trust.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.escaping import escaped_line

SHARED_VARIABLE = "CPT_SHARED_DIRS"
"""Environment variable: absolute paths, separated by colons, of directories that are shared on
purpose; each covers what lies under it.
"""
_MAX_LINKS = 40
"""Links that are followed on the way to a path; Linux follows as many."""
_MAX_TOLD = 5
"""Entries of a directory that a message names."""
MOST_ENTRIES = 2**20
"""Entries of a directory, in all folders in it, that are looked at: some ten seconds on a disk."""
_ENTER = stat.S_IXGRP | stat.S_IXOTH
"""Bits of the mode of a folder that let others get in."""

RUN_FOLDERS = ("checkpoints", "guard", "configs", "logs", "stacks")
"""Folders of a run directory whose entries are read back or written to."""


def refuse_foreign(
    path: Path, what: str, folders: Iterable[str] | None = None, *, in_run_dir: bool = False
) -> None:
    """Refuse a file or directory that another user owns, or that others may write to.

    A path that does not exist is refused only for a link on the way to it.  The arguments are those
    of `foreign_problems`.

    Raises:
        ConfigError: it is not this user's alone, or CPT_SHARED_DIRS is wrong.
        OSError: it cannot be looked at.
    """
    problems = foreign_problems(path, what, folders, in_run_dir=in_run_dir)
    if problems:
        raise ConfigError(problems)


def foreign_problems(
    path: Path, what: str, folders: Iterable[str] | None = None, *, in_run_dir: bool = False
) -> list[str]:
    """Return why a directory is not this user's alone; nothing if it is, or is named as shared.

    Args:
        path: The file or directory.
        what: What it is in the message, such as "run directory".
        folders: Names of folders in it whose entries are looked at as well as its own; None for all
            folders, and those in them.
        in_run_dir: It lies in a run directory, which is looked at by itself: where others cannot
            get in, only its owner matters.  Earlier versions left folders of checkpoints with the
            mode of the umask.

    Raises:
        ConfigError: CPT_SHARED_DIRS is wrong.
        OSError: it cannot be looked at.
    """
    shared = shared_dirs()
    link = _foreign_link(path, shared)
    if link is not None:
        return [_link_problem(path, what, link)]
    if _is_under(path, shared):
        return []
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return []
    reason = _reason_of(status)
    if in_run_dir and _is_trusted(status.st_uid) and not _is_open(path.parent):
        reason = None
    if reason is not None:
        return [_problem(path, what, status, reason)]
    if not stat.S_ISDIR(status.st_mode):
        return []
    found = []
    if folders is None:
        found = _foreign_in_tree(path, shared)
    else:
        for folder in (path, *(path / name for name in folders)):
            found += _foreign_entries(folder, shared)[0]
    if not found:
        return []
    told = "\n  ".join(found[:_MAX_TOLD])
    if len(found) > _MAX_TOLD:
        told += f"\n  and {len(found) - _MAX_TOLD} more"
    return [
        f"{what} {escaped_line(path)} holds what is not yours alone:\n  {told}\n"
        "Remove what is not yours, take the right from others "
        f"(chmod -R g-w,o-w {escaped_line(path)}), or: {_cure(path)}"
    ]


def shared_dirs(variables: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Return the directories that CPT_SHARED_DIRS names, links resolved.

    Raises:
        ConfigError: an entry is not an absolute path, or is the root of the file system.
    """
    found = []
    for entry in variables.get(SHARED_VARIABLE, "").split(":"):
        if not entry:
            continue
        if not os.path.isabs(entry):
            raise ConfigError(
                f"{SHARED_VARIABLE} names '{escaped_line(entry)}', which is not an absolute path. "
                "It takes absolute paths of directories, separated by colons."
            )
        resolved = Path(os.path.realpath(entry))
        if resolved == Path("/"):
            raise ConfigError(
                f"{SHARED_VARIABLE} names '{entry}', the whole file system. Name the directories "
                "that are shared on purpose."
            )
        found.append(resolved)
    return tuple(found)


def _is_under(path: Path, shared: tuple[Path, ...]) -> bool:
    """Return whether a path, links resolved, is or lies under a directory named as shared."""
    resolved = Path(os.path.realpath(path))
    return any(resolved.is_relative_to(folder) for folder in shared)


def _is_trusted(uid: int) -> bool:
    """Return whether a user may change what this process reads: this one, and root."""
    return uid in (os.geteuid(), 0)


def _reason_of(status: os.stat_result) -> str | None:
    """Return who else may change a file or directory; None if nobody may."""
    mode = stat.filemode(status.st_mode)
    owner = user_name(status.st_uid)
    if not _is_trusted(status.st_uid):
        return f"belongs to {owner}, not to {user_name(os.geteuid())} (mode {mode})"
    if status.st_mode & stat.S_IWOTH:
        return f"may be written to by everybody (owner {owner}, mode {mode})"
    if status.st_mode & stat.S_IWGRP:
        return f"may be written to by its group (owner {owner}, mode {mode})"
    return None


def user_name(uid: int) -> str:
    """Return a user as messages name him, such as `taro (uid 3001)`."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _foreign_link(path: Path, shared: tuple[Path, ...]) -> Path | None:
    """Return the first link on the way to a path that another user may have put there."""
    waiting = list(reversed((Path.cwd() / path).parts[1:]))
    place = Path("/")
    num_links = 0
    while waiting:
        name = waiting.pop()
        if name == "..":
            place = place.parent
            continue
        place = place / name
        try:
            status = place.lstat()
        except OSError:
            return None
        if not stat.S_ISLNK(status.st_mode):
            continue
        if not _is_trusted(status.st_uid) and not _is_under(place.parent, shared):
            return place
        num_links += 1
        if num_links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(place))
        place = Path("/") if target.is_absolute() else place.parent
        waiting += [part for part in reversed(target.parts) if part != "/"]
    return None


def _foreign_in_tree(top: Path, shared: tuple[Path, ...]) -> list[str]:
    """Return the entries of a folder and of all folders in it that are not this user's alone.

    Links are not followed.
    """
    found: list[str] = []
    num_entries = 0
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        # what waits beside the top is known to be open
        entries, folders, num_seen = _foreign_entries(folder, shared, is_open=folder != top)
        found += entries
        waiting += folders
        num_entries += num_seen
        if num_entries > MOST_ENTRIES:
            found.append(
                f"more than {MOST_ENTRIES} entries, too many to look at. Let nobody else get in "
                f"(chmod go-rwx {escaped_line(top)})"
            )
            break
    return found


def _foreign_entries(
    folder: Path, shared: tuple[Path, ...], *, is_open: bool = False
) -> tuple[list[str], list[Path], int]:
    """Return the entries of a folder that are not this user's alone.

    Where nobody else can get in, only the owner of an entry says who put it there.

    Args:
        folder: The folder.
        shared: What is shared on purpose.
        is_open: It is known that others can get in.

    Returns:
        What is wrong; the folders in it that others can get into and that are not refused
        themselves; the number of its entries.
    """
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
        is_open = is_open or _is_open(folder)
    except (FileNotFoundError, NotADirectoryError):
        return [], [], 0
    except PermissionError:
        return [_unreadable(folder)], [], 0
    found = []
    folders = []
    for entry in entries:
        try:
            own = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        except PermissionError:
            found.append(_unreadable(folder))
            break
        reason = _reason_of(own)
        if stat.S_ISLNK(own.st_mode):
            reason = _reason_of_link(Path(entry.path), own, shared)
        elif _is_trusted(own.st_uid) and not is_open:
            reason = None
        if reason is not None:
            found.append(f"{escaped_line(entry.path)} {reason}")
        elif is_open and stat.S_ISDIR(own.st_mode) and own.st_mode & _ENTER:
            folders.append(Path(entry.path))
    return found, folders, len(entries)


def _unreadable(folder: Path) -> str:
    """Return that this user cannot look into a folder, and whose it is."""
    status = folder.lstat()
    owner = user_name(status.st_uid)
    mode = stat.filemode(status.st_mode)
    return f"{escaped_line(folder)} cannot be looked into (owner {owner}, mode {mode})"


def _is_open(folder: Path) -> bool:
    """Return whether others can get into a folder: into it, and into those above it."""
    real = Path(os.path.realpath(folder))
    return all(place.stat().st_mode & _ENTER for place in (real, *real.parents))


def _reason_of_link(entry: Path, own: os.stat_result, shared: tuple[Path, ...]) -> str | None:
    """Return why a link in a directory is refused: it, or the folder it leads to, is foreign."""
    if not _is_trusted(own.st_uid):
        return f"is a link of {user_name(own.st_uid)}, not of {user_name(os.geteuid())}"
    if _is_under(entry, shared):
        return None
    link = _foreign_link(entry, shared)
    if link is not None:
        return f"leads over {escaped_line(link)}, a link of another user"
    try:
        reason = _reason_of(entry.stat())
    except OSError:
        return None
    if reason is None:
        return None
    return f"leads to {escaped_line(os.path.realpath(entry))}, which {reason}"


def _problem(path: Path, what: str, status: os.stat_result, reason: str) -> str:
    cure = _cure(path)
    if _is_trusted(status.st_uid):
        cure = f"Take the right from them (chmod -R g-w,o-w {escaped_line(path)}), or: {cure}"
    else:
        cure = f"Take one of your own, or: {cure}"
    return (
        f"{what} {escaped_line(path)} {reason}. "
        f"Who can write there can change what is read back. {cure}"
    )


def _link_problem(path: Path, what: str, link: Path) -> str:
    owner = user_name(link.lstat().st_uid)
    return (
        f"{what} {escaped_line(path)}: the way to it leads over {escaped_line(link)}, a link of "
        f"{owner}, who can let it lead elsewhere. Give the path that is meant, without the link: "
        f"{escaped_line(os.path.realpath(path))}. Or, if you trust that user, name the folder of "
        f"the link as shared: {SHARED_VARIABLE}={escaped_line(link.parent)}"
    )


def _cure(path: Path) -> str:
    return (
        f"if you trust all who can write there, name it as shared: "
        f"{SHARED_VARIABLE}={escaped_line(os.path.realpath(path))}"
    )
