"""One line of JSONL -> a record, whose structure is bounded before Python makes objects of it.

Decisions
    A small object takes some 200 bytes of memory for 3 bytes of its text, so the number of values
    counts, not the length of the line. It is counted in the bytes, and only for lines that are long
    enough to hold too many.
    Depth and digits are bounded by the interpreter: its limit of recursion, and the 4,300 digits of
    the longest whole number that it converts. Both make broken JSON.
    A record that gives a key twice is rejected if the key decides its text: JSON does not say which
    value is meant.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.reading.record_fields import text_fields, value_fields
from data_pipeline.text.cleaning import Tally

MAX_VALUES = 1_000_000
"""Values in a record: texts, numbers, lists and objects."""
_STRING_OR_MARK = re.compile(
    rb'"(?:[^"\\]++|\\.)*+\\?(?:"|\Z)|,|[\[{](?![ \t\r\n]*+[\]}])', re.DOTALL
)
"""Matches a string, the last one even if it does not end, or a mark that stands before a value.

Before an empty list or object's end stands no value.
"""
_QUOTE = ord('"')


class _RepeatedKeys:
    """A hook of `json.loads` that notes the keys that an object gives twice."""

    def __init__(self) -> None:
        self.first: str | None = None
        """The first of them; None if no object gives a key twice."""
        self._keys: dict[int, set[str]] = {}
        self._objects: list[dict[str, Any]] = []  # kept, so that no other one gets their ids

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            repeated: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.first = key if self.first is None else self.first
                    repeated.add(key)
                seen.add(key)
            self._keys[id(value)] = repeated
            self._objects.append(value)
        return value

    def on_the_way_to(self, field: str, value: dict[str, Any]) -> str | None:
        """Return the repeated key through which a field of an object is found, or None.

        The key is that of the field itself, or of an object that holds it, in dots.
        """
        repeated = self._keys.get(id(value), ())
        parts = field.split(".")
        for stop in range(1, len(parts) + 1):
            name = ".".join(parts[:stop])
            if name in repeated:
                return name
            inner = value.get(name)
            if isinstance(inner, dict) and stop < len(parts):
                key = self.on_the_way_to(".".join(parts[stop:]), inner)
                if key is not None:
                    return f"{name}.{key}"
        return None


def parse_record(
    source: SourceConfig, line: bytes, tally: Tally
) -> tuple[dict[str, Any], str | None]:
    """Return (record, None), or ({}, why it cannot be used); notes go to `tally`."""
    if _has_too_many_values(line):
        return {}, f"more than {MAX_VALUES} values in a record"
    repeated = _RepeatedKeys()
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=repeated)
    except UnicodeDecodeError:
        return {}, "invalid UTF-8"
    except (ValueError, RecursionError):
        if line.endswith(b"\n"):
            return {}, "broken JSON"
        return {}, "last line cut off"
    if not isinstance(record, dict):
        return {}, "not a JSON object"
    if repeated.first is not None:
        key = _repeated_key_that_counts(source, record, repeated)
        if key is not None:
            return {}, f"key '{key:.40}' given twice"
        tally.notes["record with a key given twice, not one that is read"] += 1
    return record, None


def _repeated_key_that_counts(
    source: SourceConfig, record: dict[str, Any], repeated: _RepeatedKeys
) -> str | None:
    """Return a repeated key that the document is made of; None if there is none."""
    if source.format == "harmony":
        return repeated.first
    for field in (*text_fields(source), *value_fields(source)):
        key = repeated.on_the_way_to(field, record)
        if key is not None:
            return key
    return None


def _has_too_many_values(line: bytes) -> bool:
    """Return whether a line of JSON can hold more than MAX_VALUES values."""
    if len(line) <= 2 * MAX_VALUES:
        return False
    if line.count(b",") + line.count(b"[") + line.count(b"{") < MAX_VALUES:
        return False
    # Most of them may stand in texts, where they count for nothing.
    num_marks = 0
    num_strings = 0
    for match in _STRING_OR_MARK.finditer(line):
        if line[match.start()] == _QUOTE:
            num_strings += 1
        else:
            num_marks += 1
        if num_marks >= MAX_VALUES or num_strings > 2 * MAX_VALUES:
            return True
    return False
