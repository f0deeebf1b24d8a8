"""Which texts can become tokens at all, and the account of those that cannot.

Decisions
    A text is taken as it stands or rejected with a reason; nothing is repaired or normalised here.
    Every reject is counted by reason, with the places of the first few, so that nothing is dropped silently.
    What was seen and handled without losing a document (a byte order mark, blank lines) is counted apart, as a note.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

MAX_PLACES = 3
"""Places kept per reason."""
MAX_WHITESPACE_RUN = 100_000
"""Characters; the tokenizer's pattern overflows its stack near 1,000,000 whitespace characters in a row."""
_LONG_WHITESPACE = re.compile(rf"\s{{{MAX_WHITESPACE_RUN + 1}}}")


@dataclasses.dataclass(slots=True)
class Tally:
    """What became of the documents of one source."""

    accepted: int = 0
    """Documents with usable text."""
    rejects: Counter[str] = dataclasses.field(default_factory=Counter)
    """Documents by reason."""
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """`file:line` of the first few rejects by reason."""
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    """Oddities that cost no document, by kind."""

    def reject(self, reason: str, place: str) -> None:
        """Count one unusable document."""
        self.rejects[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def take(self, text: Any, place: str) -> bool:
        """Count `text` as accepted or rejected; True if it can be used."""
        reason = why_unusable(text)
        if reason is None:
            self.accepted += 1
        else:
            self.reject(reason, place)
        return reason is None

    @property
    def reject_share(self) -> float:
        """Rejects among all documents seen, 0 to 1."""
        rejected = self.rejects.total()
        return rejected / max(rejected + self.accepted, 1)

    def describe_rejects(self) -> str:
        """`12 empty text (a.jsonl:3, a.jsonl:9, ...); 1 ...`, most frequent first."""
        parts = []
        for reason, count in sorted(self.rejects.items(), key=lambda item: (-item[1], item[0])):
            more = ", ..." if count > len(self.places[reason]) else ""
            parts.append(f"{count} {reason} ({', '.join(self.places[reason])}{more})")
        return "; ".join(parts)


def why_unusable(text: Any) -> str | None:
    """The reason why `text` cannot be tokenised, or None."""
    if text is None:
        return "text is null"
    if not isinstance(text, str):
        return "text is not a string"
    if not text.strip():
        return "empty text"
    if "\0" in text:
        return "NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate"
    if len(text) > MAX_WHITESPACE_RUN and _LONG_WHITESPACE.search(text):
        return f"more than {MAX_WHITESPACE_RUN} whitespace characters in a row"
    return None
