"""The check of sections that can be off: they have no other key then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


def unused_keys(section: object, is_on: bool, told: str) -> Iterator[tuple[str, str]]:
    """Yield (key, message) of every key of a section that is given though it is off.

    Args:
        section: A dataclass.
        is_on: Whether the section is on.
        told: Why the keys have no use, and what to do.
    """
    if is_on:
        return
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if value != field.default:
            yield field.name, f"is {value}, but {told}"
