"""The hook of a source in a mix: `file.py:function`, with the hash of the file once it is read."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

from data_pipeline.bounded.files import MalformedInput, read_small_file

MAX_HOOK_BYTES = 2**20
_HOOK = re.compile(r"(.+\.py):([A-Za-z_][A-Za-z0-9_]*)")


def hook_problem(base: Path, hook: str, *, need_file: bool) -> str | None:
    """Return what is wrong with a hook as it is written in a mix; its code is read, and not run.

    Args:
        base: Folder that its path is relative to.
        hook: The hook.
        need_file: Whether the file must be here.
    """
    match = _HOOK.fullmatch(hook)
    if match is None:
        return f"is '{hook}', must be FILE.py:FUNCTION."
    path = base / match[1]
    if not path.is_file():
        return f"names '{match[1]}', which is no file (looked in {base})." if need_file else None
    try:
        code = ast.parse(read_small_file(path, MAX_HOOK_BYTES))
    except (OSError, MalformedInput, SyntaxError, ValueError, RecursionError) as error:
        return f"names {path}, which cannot be read as Python: {error}."
    for statement in code.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == match[2]:
            return None
    return f"names the function '{match[2]}', which {path} does not define."


def resolved_hook(base: Path, hook: str) -> str:
    """Return a hook with its absolute path, its function, and the hash of the file.

    The hash is empty if the file is not here, as where a whole build is only read.
    """
    match = _HOOK.fullmatch(hook)
    assert match is not None, "hook_problem has looked at it"
    path = base / match[1]
    digest = ""
    if path.is_file():
        digest = hashlib.sha256(read_small_file(path, MAX_HOOK_BYTES)).hexdigest()
    return f"{path}:{match[2]}:{digest}"


def split_hook(hook: str) -> tuple[str, str, str]:
    """Return (path, function, hash of the file) of a resolved hook."""
    path, function, digest = hook.rsplit(":", 2)
    return path, function, digest


def has_hook_file(hook: str) -> bool:
    """Return whether the file of a resolved hook was here when the mix was read."""
    _, _, digest = split_hook(hook)
    return bool(digest)
