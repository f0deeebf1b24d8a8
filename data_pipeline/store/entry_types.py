"""Whether the values of an entry of a manifest are of the types that its class names.

A manifest is JSON that anybody can write, and a dataclass takes whatever it is given: a size that
is a text would end in a TypeError far from the file that holds it.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any

_LARGEST = 2**63
"""Counts are below it: NumPy and files have no larger ones."""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_text, value))


def _are_counts(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(key, str) for key in value) and all(map(_is_count, value.values()))


def _are_counts_by_reason(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and all(map(_are_counts, value.values()))
    )


def _are_files(value: object) -> bool:
    """Return whether this is a tuple of names, sizes and hashes of files."""
    if not isinstance(value, tuple):
        return False
    for facts in value:
        if not isinstance(facts, tuple) or len(facts) != 3:
            return False
        name, size, digest = facts
        if not isinstance(name, str) or not _is_count(size) or not isinstance(digest, str):
            return False
    return True


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


_CHECKS: dict[object, tuple[Callable[[object], bool], str]] = {
    int: (_is_count, "a whole number from 0 on"),
    str: (_is_text, "a text"),
    tuple[str, ...]: (_are_texts, "a list of texts"),
    Mapping[str, int]: (_are_counts, "a mapping from texts to whole numbers"),
    Mapping[str, Mapping[str, int]]: (_are_counts_by_reason, "a mapping to mappings of counts"),
    Mapping[str, Any]: (_is_mapping, "a mapping"),
    tuple[tuple[str, int, str], ...]: (_are_files, "a list of names, sizes and hashes"),
}
"""What a field of each type must hold; fields of other types are left to others."""


def check_types(entry: Any, where: str) -> None:
    """Refuse an entry with a value of another type than its class says.

    Args:
        entry: An instance of a dataclass.
        where: What it is in the message, such as "sources[2]".

    Raises:
        ValueError: a value is of another type, or a count is negative or beyond 64 bits.
    """
    for name, kind in typing.get_type_hints(type(entry)).items():
        if kind not in _CHECKS:
            continue
        holds, wanted = _CHECKS[kind]
        value = getattr(entry, name)
        if not holds(value):
            raise ValueError(f"{where}.{name} is {value!r:.60}, must be {wanted}")
