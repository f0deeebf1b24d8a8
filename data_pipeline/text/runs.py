"""Long runs of characters, which are found and put in order in linear time.

Decisions
    A run of `length` characters covers one of every `length` characters of a text, so only those
    are looked at, and only what lies around a hit is read. A regular expression that tries every
    place of a run would read it again each time.
    `unicodedata.normalize` sorts combining marks by insertion: 40,000 marks in a row take 5 s, and
    twice as many four times that. Long runs of marks are sorted before it sees them, which is the
    first half of its own work and changes no result.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from typing import Literal

MAX_UNSORTED_MARKS = 64
"""Combining marks in a row that are left to `unicodedata.normalize`."""


def long_runs(text: str, belongs: Callable[[str], bool], length: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of every run of at least `length` characters that belong to a kind.

    Args:
        text: The text.
        belongs: Whether a character is of the kind.
        length: Length of the shortest run that is looked for, at least 1.
    """
    place = length - 1
    while place < len(text):
        if not belongs(text[place]):
            place += length
            continue
        start = place
        while start > 0 and belongs(text[start - 1]):
            start -= 1
        stop = place + 1
        while stop < len(text) and belongs(text[stop]):
            stop += 1
        if stop - start >= length:
            yield start, stop
        place = stop + length


def normalize_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return `unicodedata.normalize(form, text)`, in linear time also for long runs of marks."""
    if text.isascii():
        return text
    decomposed_form: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"

    def is_mark(character: str) -> bool:
        decomposed = unicodedata.normalize(decomposed_form, character)
        return all(map(unicodedata.combining, decomposed))

    pieces = []
    done = 0
    for start, stop in long_runs(text, is_mark, MAX_UNSORTED_MARKS):
        pieces.append(text[done:start])
        pieces.append(_sorted_marks(text[start:stop], decomposed_form))
        done = stop
    pieces.append(text[done:])
    return unicodedata.normalize(form, "".join(pieces))


def _sorted_marks(run: str, decomposed_form: Literal["NFD", "NFKD"]) -> str:
    """Return the decomposed marks of a run, stably sorted by their combining class."""
    marks: list[str] = []
    for character in run:
        marks += unicodedata.normalize(decomposed_form, character)
    marks.sort(key=unicodedata.combining)
    return "".join(marks)
