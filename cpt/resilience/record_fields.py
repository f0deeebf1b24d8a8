"""Fields of a record that came from another process, checked for type and range.

The records are signed (cpt.resilience.signed_store). They are checked all the same: what they say
ends processes, so no value may mean something that its writer could not have meant.
"""

from __future__ import annotations

import math
from typing import Any

MAX_NAME_LENGTH = 300
"""Characters of a host name, a phase, or the name of a machine."""


class RecordFields:
    """The fields of one record, each of which is taken once."""

    def __init__(self, record: Any) -> None:
        if not isinstance(record, dict):
            raise ValueError("the record is no object")
        self._left = dict(record)

    def integer(self, name: str, least: int, most: int) -> int:
        """Take a whole number of a range."""
        value = self._left.pop(name, None)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is no whole number from {least} to {most}")
        return value

    def number(self, name: str) -> float:
        """Take a finite number."""
        value = self._left.pop(name, None)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is no number")
        return float(value)

    def text(self, name: str, max_length: int = MAX_NAME_LENGTH) -> str:
        """Take a text that is not too long."""
        value = self._left.pop(name, None)
        if not isinstance(value, str) or len(value) > max_length:
            raise ValueError(f"{name} is no text of at most {max_length} characters")
        return value

    def flag(self, name: str) -> bool:
        """Take true or false."""
        value = self._left.pop(name, None)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is neither true nor false")
        return value

    def ranks(self, name: str, world_size: int) -> tuple[int, ...]:
        """Take a list of different ranks."""
        value = self._left.pop(name, None)
        if not isinstance(value, list) or len(value) > world_size:
            raise ValueError(f"{name} is no list of ranks")
        for rank in value:
            if type(rank) is not int or not 0 <= rank < world_size:
                raise ValueError(f"{name} names a rank that there is not")
        return tuple(sorted(set(value)))

    def end(self) -> None:
        """Check that no field is left."""
        if self._left:
            raise ValueError(f"the record has {len(self._left)} unknown fields")
