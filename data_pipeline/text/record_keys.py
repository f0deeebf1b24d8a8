"""Keys of a record: the value of a field, also inside others, and what conversations ask of them.

Decisions
    `a.b` is the field b of the field a. A field whose own name is `a.b` comes before it, so that a
    name with dots needs no other way to write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

METADATA_KEYS = frozenset(
    (
        "category",
        "conversation_id",
        "dataset",
        "id",
        "lang",
        "language",
        "license",
        "meta",
        "metadata",
        "number",
        "prompt_id",
        "source",
        "split",
        "tags",
        "timestamp",
        "url",
        "uuid",
    )
)
"""Keys beside `messages` that name or sort a record, and change nothing of what it says."""
ABSENT = object()
"""Value of a field that a record does not have."""
UNKNOWN_KEY = "unknown key"
"""Beginning of the reason why a record with a key that is not known is rejected."""
_MAX_KEY_CHARACTERS = 40


class UnusableRecordError(Exception):
    """A record that cannot become a conversation; the message is the reason."""


def find_field(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or ABSENT; `name` may lead into other fields."""
    if name in record:
        return record[name]
    dot = name.find(".")
    while dot >= 0:
        inner = record.get(name[:dot])
        if isinstance(inner, Mapping):
            value = find_field(inner, name[dot + 1 :])
            if value is not ABSENT:
                return value
        dot = name.find(".", dot + 1)
    return ABSENT


def refuse_unknown_keys(given: dict[str, Any], known: Set[str], kind: str) -> None:
    """Raise if an object has a key that is not known, with a value that says something.

    Args:
        given: The object.
        known: Keys that are read, or that may be passed over.
        kind: What the object is, for the reason.

    Raises:
        UnusableRecordError: there is such a key.
    """
    for key, value in given.items():
        if key not in known and not says_nothing(value):
            raise UnusableRecordError(f"{UNKNOWN_KEY} {shown_key(key)} in a {kind}")


def shown_key(key: str) -> str:
    """Return the beginning of a key, as reasons name it."""
    return repr(key[:_MAX_KEY_CHARACTERS])


def says_nothing(value: Any) -> bool:
    """Return whether a value is null, or an empty text, list or object."""
    return value is None or value in ("", [], {})


def is_blank(value: Any) -> bool:
    """Return whether a value is null, or a text of white space."""
    return value is None or (isinstance(value, str) and not value.strip())
