"""A function of the user's own that every text of a source passes through, such as one for PII.

    hook: clean.py:remove_names  ->  remove_names(text, record) -> text, or None to leave it out

Decisions
    It is the user's code and runs with the user's rights, like the program itself: so a file of
    another user, or that others may write to, is refused.
    The mix knows the file by its content. A worker runs the bytes that have that hash, or nothing:
    a file that is edited during a build does not make two kinds of parts.
    An exception costs its document, that of `sys.exit()` too, and is counted by its type. Its
    message may hold the text that the hook was to keep out of the world, so it is not shown.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.bounded.files import read_small_file
from data_pipeline.config.document_hook import MAX_HOOK_BYTES, split_hook
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.store.ownership import refuse_foreign

DROPPED = "left out by the hook"
"""Condition under which a document is counted that the hook gives None for."""
Hook = Callable[[str, Mapping[str, Any]], Any]


def hook_rules(source: SourceConfig) -> list[str]:
    """Return what decides the texts of a source with a hook: the function, and its file's hash."""
    assert source.hook is not None, "asked for a source with a hook"
    _, function, digest = split_hook(source.hook)
    return [function, digest]


def run_hook(
    source: SourceConfig, text: str, record: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Return (text, None), (None, None) if the hook leaves the document out, or (None, reason).

    Raises:
        ConfigError: the file of the hook is not this user's alone, or has no such function.
        DataError: it is not the one that the mix was read with, or cannot be run.
    """
    assert source.hook is not None, "asked for a source with a hook"
    hook = _load(source.hook)
    try:
        result = hook(text, record)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        return None, f"the hook raised {type(error).__name__}"
    if result is None or isinstance(result, str):
        return result, None
    return None, f"the hook returned {type(result).__name__}, not text"


class _Loader(importlib.abc.SourceLoader):
    """Loads a module from bytes that were read before; nothing is cached beside the file."""

    def __init__(self, path: str, content: bytes) -> None:
        self._path = path
        self._content = content

    def get_filename(self, fullname: str) -> str:
        """Return the path, for stack traces."""
        del fullname
        return self._path

    def get_data(self, path: str | os.PathLike[str]) -> bytes:
        """Return the source; there is no compiled file."""
        if str(path) != self._path:
            raise OSError(f"{path}: not the file of the hook")
        return self._content


@functools.lru_cache(maxsize=64)
def _load(hook: str) -> Hook:
    """Run the file of a hook and return its function, once in each process."""
    path, name, digest = split_hook(hook)
    refuse_foreign(Path(path), "hook")
    content = read_small_file(Path(path), MAX_HOOK_BYTES)
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{path}: was changed while it was in use. Build again.")
    loader = _Loader(path, content)
    spec = importlib.util.spec_from_loader(f"document_hook_{digest[:16]}", loader)
    assert spec is not None, "there is a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise DataError(
            f"{path}: cannot be run as a hook: {type(error).__name__}: {error}. Correct it."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path}: has no function '{name}', which a hook names.")
    return function  # type: ignore[no-any-return]
