"""Which texts can become tokens, how they are cleaned, and the account of those that cannot.

Decisions
    A text is taken as it stands unless its source asks for cleaning steps, which run in the order
    of STEPS.
    Every step takes time in proportion to the text, whatever runs of characters it holds.
    Every reject is counted by reason, with the places of the first few, so that nothing is dropped
    silently. What was seen or changed without losing a document (a byte order mark, a
    normalization) is counted separately, as a note.

Effects of the steps
    newlines   CRLF and CR become LF.
    control    Characters that end a line (CR, VT, FF, NEL, the separators of lines, paragraphs,
               records, groups and files) become LF, CRLF becomes one. Other control characters are
               removed, NUL among them, except tab and line feed; joiners inside emoji stay.
    width      Full-width letters and digits become ASCII, and half-width katakana and Japanese
               punctuation (U+FF61 to U+FF65) become full-width. A half-width voiced mark joins the
               kana before it, whatever its width; without a kana it stays, as in a face of
               characters. Other punctuation stays, and so do characters that NFKC would destroy.
    nfc        Canonical composition.
    nfkc       Compatibility composition. It destroys meaning: x with a raised 2 becomes x2, the
               single character for 1/2 becomes three characters, an ideographic space becomes a
               space. Not for code or mathematics.
    spaces     Spaces at the ends of lines are removed, and three or more line feeds in a row become
               two. Not for Markdown.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_pipeline.text.runs import long_runs, normalize_form

MAX_PLACES = 3
"""Number of places that are kept per reason."""
MAX_REASONS = 100
"""Number of different reasons that are counted apart: some name a key that a record holds."""
OTHER_REASONS = "unusable for another reason"
MAX_DOCUMENT_BYTES = 64 * 2**20
"""UTF-8 bytes of the longest document that is read."""
TOO_LONG = f"text longer than {MAX_DOCUMENT_BYTES} bytes"
"""Reason why a longer document cannot be used."""
MAX_WHITESPACE_RUN = 100_000
"""Whitespace characters in a row; the tokenizer's pattern overflows its stack near 1,000,000."""
MAX_UNBROKEN_RUN = 1 << 21
"""Letters, or symbols, in a row. The tokenizer takes such a run as one piece, and some 45 bytes of
memory for each of its bytes."""
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_FULL_WIDTH_OFFSET = 0xFEE0
_FULL_WIDTH_RANGES = (("\uff10", "\uff19"), ("\uff21", "\uff3a"), ("\uff41", "\uff5a"))
"""First and last of the full-width digits, capital letters and small letters."""
_VOICED_MARKS = "\u3099\u309a"
"""The combining voiced and semi-voiced sound marks of kana."""
_SPACES = " \t\u3000"
_BLANK_LINES = re.compile("\n{3,}")


def _ascii_of_full_width() -> dict[int, int]:
    table = {}
    for first, last in _FULL_WIDTH_RANGES:
        for code in range(ord(first), ord(last) + 1):
            table[code] = code - _FULL_WIDTH_OFFSET
    return table


_ASCII_OF_FULL_WIDTH = _ascii_of_full_width()


_HALF_WIDTH = re.compile("[\uff61-\uff9f]")
_FULL_WIDTH_KANA = "[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff]"
_HALF_WIDTH_KANA = "[\uff66-\uff9d]"
_HALF_WIDTH_MARKS = "\uff9e\uff9f"
_VOICED_MARK_OF_HALF_WIDTH = str.maketrans(_HALF_WIDTH_MARKS, _VOICED_MARKS)
_MARKS = f"[{_HALF_WIDTH_MARKS}{_VOICED_MARKS}]*"
_HALF_WIDTH_WITH_NEIGHBORS = re.compile(
    f"[\uff61-\uff65]+|(?:{_HALF_WIDTH_KANA}{_MARKS})+"
    f"|{_FULL_WIDTH_KANA}[{_VOICED_MARKS}]*[{_HALF_WIDTH_MARKS}]{_MARKS}"
)
"""Half-width punctuation, half-width kana with their marks, and full-width kana with half-width
ones. A half-width mark behind anything else is not found."""


def _unify_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _remove_control_characters(text: str) -> str:
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def _unify_width(text: str) -> str:
    if _HALF_WIDTH.search(text):
        text = _HALF_WIDTH_WITH_NEIGHBORS.sub(_widened, text)
    return text.translate(_ASCII_OF_FULL_WIDTH)


def _widened(match: re.Match[str]) -> str:
    """Return half-width characters, and marks behind a kana, as full-width ones."""
    text = match[0]
    if _HALF_WIDTH.match(text):
        return compose_compatible(text)
    return _compose(text.translate(_VOICED_MARK_OF_HALF_WIDTH))  # NFKC would make two of one kana


def _compose(text: str) -> str:
    return normalize_form("NFC", text)


def compose_compatible(text: str) -> str:
    """Return the text in the normal form NFKC."""
    return normalize_form("NFKC", text)


def _remove_spaces(text: str) -> str:
    lines = [line.rstrip(_SPACES) for line in text.split("\n")]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines))


STEPS: dict[str, Callable[[str], str]] = {
    "newlines": _unify_newlines,
    "control": _remove_control_characters,
    "width": _unify_width,
    "nfc": _compose,
    "nfkc": compose_compatible,
    "spaces": _remove_spaces,
}
"""Cleaning steps by name, in the order in which they run."""
STEP_VERSIONS = {"control": 3, "width": 3}
"""Versions of the steps whose output is not that of their first version. They belong to the
fingerprint of a build, so a change of what a step does must raise its number."""


def why_not_cleanable(text: Any, steps: Sequence[str]) -> str | None:
    """Return the reason why `text` cannot be tokenized, whatever `steps` make of it, or None."""
    if "control" in steps and isinstance(text, str):
        text = text.replace("\0", "")
    return why_unusable(text)


def normalize(text: str, steps: Sequence[str], notes: Counter[str]) -> str:
    """Return `text` after `steps`, and count each step that changed it in `notes`."""
    for name, step in STEPS.items():
        if name not in steps:
            continue
        changed = step(text)
        if changed != text:
            notes[f"normalised: {name}"] += 1
            text = changed
    return text


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a document in the input."""

    text: str
    """A file, or a file and a row."""
    line: int = 0
    """Line from 1, counted from the start of the unit that was read; 0 where there are no lines."""

    def __str__(self) -> str:
        return f"{self.text}:{self.line}" if self.line else self.text

    def moved(self, lines_before: int) -> Place:
        """Return the place in a file that has `lines_before` lines before the unit."""
        if not self.line:
            return self
        return replace(self, line=self.line + lines_before)


@dataclass(slots=True)
class Tally:
    """Count of the accepted and rejected documents of one source, or of one unit of it."""

    accepted: int = 0
    """Number of documents with usable text."""
    lines: int = 0
    """Number of lines read, in files that have lines."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Number of unusable documents by reason."""
    places: dict[str, list[Place]] = field(default_factory=dict)
    """Places of the first few rejects by reason."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Number of documents that a filter of the source left out, by condition."""
    filtered_tokens: Counter[str] = field(default_factory=Counter)
    """Tokens of those that were tokenized before, by condition."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of oddities that cost no document, by kind."""

    def reject(self, reason: str, place: Place) -> None:
        """Count one unusable document."""
        reason = self._counted_reason(reason)
        self.rejects[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def withdraw(self, reason: str, place: Place) -> None:
        """Count as unusable a document that was counted as accepted before."""
        self.accepted -= 1
        self.reject(reason, place)

    def filter(self, condition: str) -> None:
        """Count one document that the source does not want."""
        self.filtered[condition] += 1

    def withdraw_filtered(self, condition: str, num_tokens: int) -> None:
        """Count as filtered a document that was counted as accepted before."""
        self.accepted -= 1
        self.filtered[condition] += 1
        self.filtered_tokens[condition] += num_tokens

    def _counted_reason(self, reason: str) -> str:
        """Return the reason, or OTHER_REASONS if there are too many different ones."""
        if reason in self.rejects or len(self.rejects) < MAX_REASONS:
            return reason
        return OTHER_REASONS

    def take(self, text: Any, place: Place) -> bool:
        """Count `text` as accepted or rejected; return whether it can be used."""
        reason = why_unusable(text)
        if reason is not None:
            self.reject(reason, place)
            return False
        self.accepted += 1
        return True

    def add(self, other: Tally, lines_before: int) -> None:
        """Add the tally of the next unit, which starts after `lines_before` lines of its file."""
        self.accepted += other.accepted
        self.lines += other.lines
        self.notes += other.notes
        self.filtered += other.filtered
        self.filtered_tokens += other.filtered_tokens
        for reason, count in other.rejects.items():
            self.rejects[self._counted_reason(reason)] += count
        for reason, places in other.places.items():
            known = self.places.setdefault(self._counted_reason(reason), [])
            room = MAX_PLACES - len(known)
            known += [place.moved(lines_before) for place in places[:room]]

    def to_json(self) -> dict[str, Any]:
        """Return the tally as JSON values."""
        places = {}
        for reason, listed in self.places.items():
            places[reason] = [asdict(place) for place in listed]
        return {
            "accepted": self.accepted,
            "lines": self.lines,
            "rejects": dict(self.rejects),
            "places": places,
            "filtered": dict(self.filtered),
            "filtered_tokens": dict(self.filtered_tokens),
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """Return the tally that `to_json` made the values of."""
        places = {}
        for reason, listed in value["places"].items():
            places[reason] = [Place(**place) for place in listed]
        return cls(
            accepted=value["accepted"],
            lines=value["lines"],
            rejects=Counter(value["rejects"]),
            places=places,
            filtered=Counter(value["filtered"]),
            filtered_tokens=Counter(value["filtered_tokens"]),
            notes=Counter(value["notes"]),
        )

    @property
    def reject_share(self) -> float:
        """Share of rejects among all documents seen, 0 to 1."""
        rejected = self.rejects.total()
        return rejected / max(rejected + self.accepted, 1)

    def describe_rejects(self) -> str:
        """Return `12 empty text (a.jsonl:3, a.jsonl:9, ...); 1 ...`, most frequent first."""
        reasons = sorted(self.rejects)
        reasons.sort(key=self.rejects.__getitem__, reverse=True)
        parts = []
        for reason in reasons:
            count = self.rejects[reason]
            places = list(map(str, self.places[reason]))
            if count > len(places):
                places.append("...")
            parts.append(f"{count} {reason} ({', '.join(places)})")
        return "; ".join(parts)


def why_unusable(text: Any) -> str | None:
    """Return the reason why `text` cannot be tokenized, or None if it can."""
    if text is None:
        return "text is null"
    if not isinstance(text, str):
        return "text is not a string"
    if len(text) > MAX_DOCUMENT_BYTES:
        return TOO_LONG
    if not text or text.isspace():
        return "empty text"
    if "\0" in text:
        return "NUL character"
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "lone surrogate"
    if num_bytes > MAX_DOCUMENT_BYTES:
        return TOO_LONG
    if any(long_runs(text, str.isspace, MAX_WHITESPACE_RUN + 1)):
        return f"more than {MAX_WHITESPACE_RUN} whitespace characters in a row"
    for belongs in (_is_letter, _is_symbol):
        if any(long_runs(text, belongs, MAX_UNBROKEN_RUN + 1)):
            return f"more than {MAX_UNBROKEN_RUN} letters or symbols in a row"
    return None


def _is_letter(character: str) -> bool:
    """Return whether the tokenizer may take a character into a word."""
    return unicodedata.category(character)[0] in "LM"


def _is_symbol(character: str) -> bool:
    """Return whether the tokenizer may take a character into a run of symbols."""
    if character in "\r\n":
        return True
    return not character.isspace() and unicodedata.category(character)[0] not in "LN"
