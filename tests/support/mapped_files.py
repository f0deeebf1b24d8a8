"""Which files without a name this process has in its memory."""

from __future__ import annotations

from pathlib import Path


def mapped_files(folder: Path) -> list[tuple[int, int]]:
    """(first address, size) of every mapped file of a folder that has no name any more."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{folder}/" in line and line.endswith("(deleted)"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append((start, end - start))
    return found
