"""Which texts can become tokens, what is done to them before, and the account of those that cannot.

Decisions
    A text is taken as it stands unless its source asks for steps; then they run in the order of
    STEPS. Every reject is counted by reason, with the places of the first few, so that nothing is
    dropped silently. What was seen or changed without losing a document (a byte order mark, a
    normalisation) is counted apart, as a note.

What the steps do
    newlines   CRLF and CR become LF.
    control    Control characters go, but tab and line feed; joiners inside emoji stay.
    width      Full-width letters and digits become ASCII, half-width katakana full-width.  Punctuation stays, as do
               characters that NFKC would destroy.
    nfc        Canonical composition.
    nfkc       Compatibility composition.  Destroys meaning: x^2 with a raised 2 becomes x2, 1/2 as one character three,
               ideographic space a space.  Not for code or mathematics.
    spaces     Spaces at the ends of lines go, and three or more line feeds in a row become two.  Not for Markdown.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

MAX_PLACES = 3
"""Places kept per reason."""
MAX_WHITESPACE_RUN = 100_000
"""Characters; the tokenizer's pattern overflows its stack near 1,000,000 whitespace characters in a
row.
"""
_LONG_WHITESPACE = re.compile(rf"\s{{{MAX_WHITESPACE_RUN + 1}}}")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_HALF_WIDTH_KANA = re.compile("[\uff61-\uff9f]+")
_FULL_WIDTH = {
    code: code - 0xFEE0
    for first, last in (("\uff10", "\uff19"), ("\uff21", "\uff3a"), ("\uff41", "\uff5a"))
    for code in range(ord(first), ord(last) + 1)
}
_LINE_ENDS = re.compile("[ \t\u3000]+(?=\n|\\Z)")
_BLANK_LINES = re.compile("\n{3,}")


def _width(text: str) -> str:
    return _HALF_WIDTH_KANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text).translate(
        _FULL_WIDTH
    )


STEPS: dict[str, Callable[[str], str]] = {
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "control": lambda text: _CONTROL.sub("", text),
    "width": _width,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "spaces": lambda text: _BLANK_LINES.sub("\n\n", _LINE_ENDS.sub("", text)),
}
"""By name, in the order in which they run."""


def normalise(text: str, steps: Sequence[str], notes: Counter[str]) -> str:
    """`text` after `steps`; each step that changed it is counted in `notes`."""
    for name, step in STEPS.items():
        if name in steps:
            changed = step(text)
            if changed != text:
                notes[f"normalised: {name}"] += 1
                text = changed
    return text


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a document stands."""

    text: str
    """A file, or a file and a row."""
    line: int = 0
    """Line from 1, counted from the start of the unit that was read; 0: no lines to count."""

    def __str__(self) -> str:
        return f"{self.text}:{self.line}" if self.line else self.text


@dataclasses.dataclass(slots=True)
class Tally:
    """What became of the documents of one source, or of one unit of it."""

    accepted: int = 0
    """Documents with usable text."""
    lines: int = 0
    """Lines read, of files that have them."""
    rejects: Counter[str] = dataclasses.field(default_factory=Counter)
    """Documents by reason."""
    places: dict[str, list[Place]] = dataclasses.field(default_factory=dict)
    """Places of the first few rejects by reason."""
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    """Oddities that cost no document, by kind."""

    def reject(self, reason: str, place: Place) -> None:
        """Count one unusable document."""
        self.rejects[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def take(self, text: Any, place: Place) -> bool:
        """Count `text` as accepted or rejected; True if it can be used."""
        reason = why_unusable(text)
        if reason is None:
            self.accepted += 1
        else:
            self.reject(reason, place)
        return reason is None

    def add(self, other: Tally, lines_before: int) -> None:
        """Add the tally of the next unit, which starts after `lines_before` lines of its file."""
        self.accepted += other.accepted
        self.lines += other.lines
        self.rejects += other.rejects
        self.notes += other.notes
        for reason, places in other.places.items():
            known = self.places.setdefault(reason, [])
            moved = [
                dataclasses.replace(p, line=p.line + lines_before) if p.line else p for p in places
            ]
            known += moved[: MAX_PLACES - len(known)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "accepted": self.accepted,
            "lines": self.lines,
            "rejects": dict(self.rejects),
            "places": {
                reason: [dataclasses.asdict(p) for p in listed]
                for reason, listed in self.places.items()
            },
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """The inverse of `to_json`."""
        places = {
            reason: [Place(**place) for place in listed]
            for reason, listed in value["places"].items()
        }
        counters = {key: Counter(value[key]) for key in ("rejects", "notes")}
        return cls(accepted=value["accepted"], lines=value["lines"], places=places, **counters)

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
            parts.append(f"{count} {reason} ({', '.join(map(str, self.places[reason]))}{more})")
        return "; ".join(parts)


def why_unusable(text: Any) -> str | None:
    """The reason why `text` cannot be tokenised, or None."""
    if text is None:
        return "text is null"
    if not isinstance(text, str):
        return "text is not a string"
    if not text or text.isspace():
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
