"""Text from outside, made safe to show: what steers a terminal or hides from the eye is escaped.

File names, source names, documents, prompts, replies of a model and exceptions of libraries may
hold anything.  A terminal obeys control characters in them, a log takes their line breaks for
lines of its own, and a page shows text in another order than it has.  So these become what a
Python literal has for them: ``\\x1b``, ``\\n``, ``\\u202e``.

Decisions
    Japanese, emoji, variation selectors and private characters stay as they are.
    A name is a line (`escaped_line`): its line breaks and tabs are escaped, and the two joiners,
    by which two names can look the same.  A text (`escaped_text`) keeps these four.
    A backslash stays one, because paths and patterns have them: an escape is for the eye and
    cannot be turned back.
    The same is written whether or not a terminal reads: files are shown on terminals later.
"""

from __future__ import annotations

import re

_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls but tab and line feed
    "\xad\u061c\u180e"  # soft hyphen, Arabic letter mark, Mongolian vowel separator
    "\u200b\u200e\u200f"  # zero-width space, marks of direction
    "\u2028-\u202e"  # line and paragraph separators, embeddings and overrides of direction
    "\u2060-\u206f"  # word joiner, invisible operators, isolates, deprecated formats
    "\ufeff\ufff9-\ufffb"  # byte order mark, annotations
    "\ud800-\udfff"  # surrogates: bytes of a file name that are no UTF-8
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # formats of shorthand and of music
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # tags; the variation selectors are between
)
_IN_TEXT = re.compile(f"[{_HIDDEN}]")
_IN_LINE = re.compile(f"[{_HIDDEN}\t\n\u200c\u200d]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def escaped_line(value: object, max_chars: int | None = None) -> str:
    """Return a name, or another text that belongs into one line, with nothing hidden in it.

    Args:
        value: A text, or something that `str` makes one of, such as a path or an exception.
        max_chars: Characters that are shown; what is longer ends with `...`. None shows all.
    """
    text = str(value)
    if max_chars is not None and len(text) > max_chars:
        text = text[:max_chars] + "..."
    return text if text.isprintable() else _IN_LINE.sub(_escape, text)


def escaped_text(text: str) -> str:
    """Return a text of any number of lines with nothing hidden in it but joiners of letters."""
    return text if text.isprintable() else _IN_TEXT.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
