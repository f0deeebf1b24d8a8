"""The files that a path or a glob of a mix names: regular files only, each folder looked into once.

Decisions
    Links to folders are followed, because corpora are often linked together. Under `**` a folder is
    entered once, whatever leads to it: a link to a folder above would otherwise show each file some
    40 times, and two such links more often than can be counted.
    Pipes, sockets and devices are no files: reading one waits, or never ends.
    A file whose path has a control character is refused. Paths stand in messages, manifests and
    reports, where a line break in one would begin a line that looks like ours. What is no file is
    passed over whatever its name, and so is the empty file in which macOS notes that a folder has
    an icon: it holds no text, and shared folders are full of them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.config.links import dangling_link
from data_pipeline.escaping import escaped_line
from data_pipeline.objects.object_paths import find_objects, is_address

MAX_FILES = 1_000_000
"""Files that one pattern may name; every file becomes a token shard or a part of one."""
_ANY_DEPTH = "**"
_MACOS_ICON = "Icon\r"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def expand(pattern: str) -> list[Path]:
    """Return the files or objects that an absolute path, a glob or an address names, sorted.

    Raises:
        OSError: there are more than MAX_FILES of them, a folder cannot be read, or the path of a
            file has a control character.
        StorageError: the store of the objects does not answer.
    """
    if is_address(pattern):
        return _checked(find_objects(pattern))
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return plain_files([path])
    return plain_files(map(Path, _matches(pattern)))


def absolute_pattern(pattern: str, base: Path) -> str:
    """Return a pattern of a mix, which is relative to the folder `base` unless it is an address."""
    return pattern if is_address(pattern) else str(base / pattern)


def plain_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among `paths`, and the links to nothing, which must not go unnoticed.

    Raises:
        OSError: there are more than MAX_FILES, or a name has a control character.
    """
    files = []
    for path in paths:
        if not path.is_file() and not dangling_link(path):
            continue
        if path.name == _MACOS_ICON and path.is_file() and not path.stat().st_size:
            continue
        files.append(path)
        if len(files) > MAX_FILES:
            break
    return sorted(_checked(files))


def _checked(paths: Sequence[Path]) -> list[Path]:
    """Return paths that are not too many, and have names that can be shown."""
    if len(paths) > MAX_FILES:
        raise OSError(0, f"it names more than {MAX_FILES:,} files; join small files to larger ones")
    for path in paths:
        if _CONTROL.search(str(path)):
            raise OSError(0, f"the name '{escaped_line(path)}' has a control character; rename it")
    return list(paths)


def _matches(pattern: str) -> Iterator[str]:
    """Yield what a glob matches, as `glob.glob` does with `recursive`, but no path twice."""
    parts = pattern.split(os.sep)
    if _ANY_DEPTH not in parts:
        yield from glob.iglob(pattern)
        return
    if not parts[-1]:  # only folders match
        return
    first = parts.index(_ANY_DEPTH)
    rest = parts[first + 1 :]
    while rest and rest[0] in ("", _ANY_DEPTH):
        rest = rest[1:]
    visited: set[tuple[int, int]] = set()
    found: set[str] = set()
    for top in sorted(glob.glob(os.sep.join(parts[:first]) or os.sep)):
        for folder in _folders(top, visited):
            # `**` alone matches all files
            below = _matches(os.path.join(glob.escape(folder), *(rest or ["*"])))
            for path in below:
                if path not in found:
                    found.add(path)
                    yield path


def _folders(top: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Yield a folder and those below it, hidden ones aside, each one once.

    A folder is met under its own path rather than under a link to it, if it has one below `top`.
    """
    waiting = [top]
    links: list[str] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError:  # a file, or a folder that cannot be read; glob passes over it, too
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        yield folder
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                waiting.append(entry.path)
