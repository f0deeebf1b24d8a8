"""Traces of a download that is still going on, or was cut off, beside the files of a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

UNFINISHED_SUFFIXES = (
    ".incomplete",
    ".aria2",
    ".part",
    ".partial",
    ".filepart",
    ".download",
    ".crdownload",
)
"""Suffixes of files that programs fetch into, or keep beside a file while they fetch it:
huggingface_hub, aria2, curl and wget wrappers, FileZilla and browsers.
"""
HUB_FOLDER = Path(".cache") / "huggingface" / "download"
"""Where `hf download --local-dir` keeps what it has not fetched whole."""
MOST_NAMED = 3


def unfinished_files(path: Path) -> list[Path]:
    """Return the files of a model's directory that a download has not finished.

    In the Hub's cache they lie among the blobs, two folders above a snapshot.
    """
    folders = [path, path / HUB_FOLDER]
    if path.parent.name == "snapshots":
        folders.append(path.parent.parent / "blobs")
    found: list[Path] = []
    for folder in folders:
        for suffix in UNFINISHED_SUFFIXES:
            found += folder.glob(f"*{suffix}")
        # rsync writes .NAME.XXXXXX
        found += folder.glob(".*.safetensors.*")
    return sorted(set(found))


def unfinished_problems(path: Path, files: Collection[Path]) -> list[str]:
    """Return a problem for each weight file that a program is still fetching in place.

    Such a file may have its full length already, with nothing but zeros in it.

    Args:
        path: The directory.
        files: Its weight files.
    """
    names = {file.name for file in files}
    problems = []
    for unfinished in unfinished_files(path):
        if unfinished.parent == path and unfinished.stem in names:
            problems.append(
                f"{path / unfinished.stem}: {unfinished.name} lies beside it, so it is not fetched "
                "whole. Let the download finish; if it has, delete that file."
            )
    return problems


def unfinished_hint(path: Path) -> list[str]:
    """Return a sentence on the unfinished files of a directory whose weights are not whole."""
    found = unfinished_files(path)
    if not found:
        return []
    named = ", ".join(str(file) for file in found[:MOST_NAMED])
    left = len(found) - MOST_NAMED
    if left > 0:
        named += f" and {left} more"
    return [
        f"{path}: a download is going on or was cut off ({named}). Let it finish, or start it "
        "again."
    ]
