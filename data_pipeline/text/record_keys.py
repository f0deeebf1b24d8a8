"""What every reader of conversations asks of the keys of a record, in whatever shape it is."""

from __future__ import annotations

from collections.abc import Set
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
UNKNOWN_KEY = "unknown key"
"""Beginning of the reason why a record with a key that is not known is rejected."""
_MAX_KEY_CHARACTERS = 40


class UnusableRecordError(Exception):
    """A record that cannot become a conversation; the message is the reason."""


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
            name = repr(key[:_MAX_KEY_CHARACTERS])
            raise UnusableRecordError(f"{UNKNOWN_KEY} {name} in a {kind}")


def says_nothing(value: Any) -> bool:
    """Return whether a value is null, or an empty text, list or object."""
    return value is None or value in ("", [], {})


def is_blank(value: Any) -> bool:
    """Return whether a value is null, or a text of white space."""
    return value is None or (isinstance(value, str) and not value.strip())
