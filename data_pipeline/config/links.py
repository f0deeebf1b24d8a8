"""Links to nothing, which a cache leaves behind when its bytes are removed or never came."""

from __future__ import annotations

from pathlib import Path


def dangling_link(path: Path) -> str:
    """Return a sentence on a link whose target does not exist; empty if `path` is none."""
    if not path.is_symlink() or path.exists():
        return ""
    return (
        f"{path} is a link to {path.readlink()}, which does not exist. Fetch the file again: "
        "a cache (such as the Hugging Face Hub's) keeps the bytes apart from the links."
    )
