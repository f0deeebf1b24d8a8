"""Cleaning steps do what they say, and take time in proportion to the text."""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.text import cleaning, runs
from data_pipeline.text.cleaning import STEPS, normalize, why_unusable
from data_pipeline.text.runs import long_runs, normalize_form

SPACES = st.text(alphabet=" \t\u3000\n\ra\u00a0\u2003", max_size=30)
MARKS = st.text(
    alphabet="ae\u00e9\u0301\u0323\u0308\u0344\u0f73\u0f71\u3099\u309a\uff9e\u304b\u00a8\u1100\u1161",
    max_size=40,
)
KANA = st.text(
    alphabet="\u304b\u3042\u30ab\u30ef\u309d\u30fd\uff76\uff67\uff9e\uff9f\u3099\u309a\u309ba ",
    max_size=12,
)
SMALL = 15_000
GROWTH = 8
"""How many times larger the second text is; a quadratic step takes 64 times as long."""


@settings(max_examples=200, deadline=None)
@given(SPACES)
def test_spaces_at_line_ends_go_as_the_pattern_of_the_definition_says(text: str) -> None:
    by_pattern = re.sub("[ \t\u3000]+(?=\n|\\Z)", "", text)
    assert STEPS["spaces"](text) == re.sub("\n{3,}", "\n\n", by_pattern)


@settings(max_examples=200, deadline=None)
@given(SPACES, st.integers(1, 6))
def test_long_runs_are_those_that_a_pattern_finds(text: str, length: int) -> None:
    expected = [found.span() for found in re.finditer(rf"\s{{{length},}}", text)]
    assert list(long_runs(text, str.isspace, length)) == expected


@settings(max_examples=200, deadline=None)
@given(SPACES)
def test_too_much_whitespace_is_refused_as_the_pattern_of_the_definition_says(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "MAX_WHITESPACE_RUN", 4)
        found = why_unusable(f"a{text}")
    assert (found is not None) == (re.search(r"\s{5}", text) is not None)


@settings(max_examples=200, deadline=None)
@given(st.one_of(MARKS, st.text(max_size=10)), st.sampled_from(["NFC", "NFKC"]), st.integers(1, 5))
def test_sorting_long_runs_of_marks_changes_no_normal_form(
    text: str, form: str, length: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MAX_UNSORTED_MARKS", length)
        assert normalize_form(form, text) == unicodedata.normalize(form, text)  # type: ignore[arg-type]


def narrow_part_alone(text: str) -> str:
    """Return what `width` makes of a text if it looks at half-width characters alone."""
    nfkc = re.sub("[\uff61-\uff9f]+", lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return nfkc.translate(cleaning._ASCII_OF_FULL_WIDTH)


KANA_OF_ANY_WIDTH = re.compile(
    "[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9d]"
)
STANDS_ALONE = {"\uff9e": "\ue000", "\uff9f": "\ue001"}
"""Half-width marks, and what takes their place where no kana stands before them."""


def without_lone_marks(text: str) -> str:
    """Return a text with other characters in place of half-width marks that follow no kana."""
    found = ""
    follows_kana = False
    for character in text:
        if character in STANDS_ALONE and not follows_kana:
            character = STANDS_ALONE[character]
        if character not in "\u3099\u309a\uff9e\uff9f":
            follows_kana = KANA_OF_ANY_WIDTH.fullmatch(character) is not None
        found += character
    return found


@settings(max_examples=300, deadline=None)
@given(KANA)
def test_width_differs_from_narrow_characters_alone_in_composed_and_lone_marks_only(
    text: str,
) -> None:
    wide = STEPS["width"](text)
    expected = narrow_part_alone(without_lone_marks(text))
    for mark, other in STANDS_ALONE.items():
        expected = expected.replace(other, mark)
    assert unicodedata.normalize("NFC", wide) == unicodedata.normalize("NFC", expected)
    assert STEPS["width"](wide) == wide
    if not re.search("[\uff9e\uff9f]|[\uff61-\uff9d][\u3099\u309a]", text):
        assert wide == narrow_part_alone(text)


@pytest.mark.parametrize(
    ("text", "wide"),
    [
        ("(\uff9f\u0414\uff9f)", "(\uff9f\u0414\uff9f)"),
        ("\uff9e", "\uff9e"),
        ("a\uff9e\uff76\uff9e", "a\uff9e\u30ac"),
        ("\uff9f\uff65\uff9f", "\uff9f\u30fb\uff9f"),
        ("\u6c34\uff9f", "\u6c34\uff9f"),
    ],
)
def test_a_half_width_voiced_mark_without_a_kana_before_it_stays(text: str, wide: str) -> None:
    assert STEPS["width"](text) == wide


def test_half_width_japanese_punctuation_becomes_full_width_and_no_other_changes() -> None:
    wide = STEPS["width"]("\uff61\uff62\uff63\uff64\uff65")
    assert wide == "\u3002\u300c\u300d\u3001\u30fb"
    others = "\uff01(\uff08.\uff0e\u3000"
    assert STEPS["width"](others) == others


@pytest.mark.parametrize(
    ("text", "wide"),
    [
        ("\u304b\uff9e", "\u304c"),
        ("\u30ab\uff9e\u30d1\uff9f\u30cf\uff9f", "\u30ac\u30d1\u309a\u30d1"),
        ("\u3046\uff9e\u30ef\uff9e\u309d\uff9e\u30fd\uff9e", "\u3094\u30f7\u309e\u30fe"),
        ("\uff76\u3099\uff8a\u309a", "\u30ac\u30d1"),
        ("\u304b\uff76\uff9e", "\u304b\u30ac"),
        ("\u3042\uff9e", "\u3042\u3099"),
        ("\u304b\u3099", "\u304b\u3099"),
        ("\u309f\uff9e", "\u309f\u3099"),
    ],
)
def test_a_half_width_voiced_mark_joins_the_kana_before_it(text: str, wide: str) -> None:
    assert STEPS["width"](text) == wide
    assert STEPS["width"](wide) == wide


@pytest.mark.parametrize(
    "line_end",
    ["\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\x1c", "\x1d", "\x1e", "\n"],
)
def test_control_without_newlines_keeps_lines_apart(line_end: str) -> None:
    assert STEPS["control"](f"a{line_end}b") == "a\nb"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab\n\r\x0b\x0c\x1d\x1f\x00\x85\u2028\u2029\ufeff\t", max_size=20))
def test_control_leaves_the_lines_that_python_sees(text: str) -> None:
    text += "."
    lines = [re.sub("[\x00\x1f\ufeff]", "", line) for line in text.splitlines()]
    assert STEPS["control"](text).splitlines() == lines


RUNS = {
    "spaces": " ",
    "spaces and letters": " " * 9_999 + "a",
    "just allowed whitespace": " " * 99_999 + "a",
    "ideographic spaces": "\u3000",
    "newlines": "\n",
    "spaces and newlines": " " * 999 + "\n",
    "carriage returns": "\r",
    "marks out of order": "\u0301\u0323",
    "marks that decompose": "\u0344\u0323",
    "marks in order": "\u0323" * 5_000 + "\u0301" * 5_000,
    "runs of marks": "a" + "\u0301\u0323" * 31,
    "half-width marks": "\uff9e",
    "half-width and other marks": "\uff9e\u0301",
    "kana and marks": "\u304b\uff9e",
    "half-width kana": "\uff76",
    "control characters": "\x07",
    "letters": "a",
}


def seconds(call: Callable[[], object]) -> float:
    """Return the shortest of three CPU times."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("unit", RUNS.values(), ids=RUNS.keys())
def test_time_grows_with_the_text_for_every_step_and_run(unit: str) -> None:
    text = "x" + unit * (SMALL * GROWTH // len(unit) + 1)
    small = text[:SMALL] + "x"
    large = text[: SMALL * GROWTH] + "x"
    for name in STEPS:
        before = seconds(lambda: normalize(small, [name], Counter()))  # noqa: B023
        after = seconds(lambda: normalize(large, [name], Counter()))  # noqa: B023
        assert after < 3 * GROWTH * max(before, 0.002), name
    before = seconds(lambda: why_unusable(small))
    assert seconds(lambda: why_unusable(large)) < 3 * GROWTH * max(before, 0.002)
