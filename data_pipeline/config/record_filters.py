"""Rules of a source on the fields of its records: which documents are taken at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_SHOWN_CHARS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterRule:
    """One condition on a field, which a document must meet; those that do not are counted."""

    field: str
    """Key or column, as for `text_field`; `a.b` is the field b of the field a."""
    min: float | None = None
    """Smallest number that passes."""
    max: float | None = None
    """Largest number that passes."""
    one_of: tuple[str | int | bool, ...] = ()
    """Values that pass, and no others."""
    not_one_of: tuple[str | int | bool, ...] = ()
    """Values that do not pass."""
    present: bool | None = None
    """Whether the field must be there, or must not; null and an empty text count as absent."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one condition."""
        if not is_field_name(self.field):
            yield "field", f"is '{self.field}', which names no field."
        compares = self.min is not None or self.max is not None
        if not (compares or self.one_of or self.not_one_of or self.present is not None):
            yield "field", "stands alone. Add min, max, one_of, not_one_of or present."
        if self.min is not None and self.max is not None and self.min > self.max:
            yield "min", f"is {self.min:g}, above max {self.max:g}: no document would pass."
        if self.present is False and (compares or self.one_of or self.not_one_of):
            yield "present", "is false, and a field that is not there has no value. Remove it."

    @property
    def accepted(self) -> str:
        """The values that pass, for messages."""
        return _listed(self.one_of)

    @property
    def refused(self) -> str:
        """The values that do not pass, for messages."""
        return _listed(self.not_one_of)


def is_field_name(name: str) -> bool:
    """Return whether a name can be that of a field: its parts, between dots, are not empty."""
    return all(name.split("."))


def plain_value(value: object) -> str:
    """Return a scalar as text, in which 3, 3.0 and "3" are the same."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _listed(values: tuple[str | int | bool, ...]) -> str:
    text = ", ".join(map(plain_value, values))
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
