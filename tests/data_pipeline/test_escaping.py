"""Text from outside is shown with nothing in it that steers a terminal or hides from the eye."""

from __future__ import annotations

import unicodedata

import pytest

from data_pipeline.console.say import complain, say
from data_pipeline.escaping import escaped_line, escaped_text

HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Controls, formats, surrogates, separators of lines and of paragraphs."""
VISIBLE_FORMATS = ("ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN")
"""Scripts that have formats with a shape of their own, such as ARABIC NUMBER SIGN."""
HOSTILE = "x\x1b]0;owned\x07\x1b[2J\nFAKE: verified ok"


def hidden_characters() -> str:
    found = []
    for code in range(0x110000):
        character = chr(code)
        name = unicodedata.name(character, "")
        if unicodedata.category(character) not in HIDDEN_CATEGORIES:
            continue
        if not name.startswith(VISIBLE_FORMATS) or name == "ARABIC LETTER MARK":
            found.append(character)
    return "".join(found)


def test_every_character_that_hides_or_steers_is_escaped() -> None:
    hidden = hidden_characters()
    assert escaped_line(hidden).isascii()
    left = {character for character in escaped_text(hidden) if not character.isascii()}
    assert left == {"\u200c", "\u200d"}, "joiners of letters and of emoji belong to a text"
    assert escaped_text("a\tb\nc") == "a\tb\nc"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, "x\\x1b]0;owned\\x07\\x1b[2J\\nFAKE: verified ok"),
        ("a\rb\tc\x9b\x7f", "a\\rb\\tc\\x9b\\x7f"),
        ("user\u202etxt.exe", "user\\u202etxt.exe"),
        ("pass\u200dword", "pass\\u200dword"),
        ("a\U000e0041", "a\\U000e0041"),
        (b"\xff.jsonl".decode("utf-8", "surrogateescape"), "\\udcff.jsonl"),
    ],
)
def test_a_name_is_shown_in_one_line_as_a_literal_has_it(text: str, shown: str) -> None:
    assert escaped_line(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "\u65e5\u672c\u8a9e\u3000\u6587\u66f8",  # with an ideographic space
        "\u845b\U000e0100\u98fe",  # with an ideographic variation sequence
        "\U0001f468\U0001f3fd \u2764\ufe0f",
        "\ue000 private",
        "C:\\new\\x1b",
    ],
)
def test_japanese_emoji_and_backslashes_stay_as_they_are(text: str) -> None:
    assert escaped_line(text) == text
    assert escaped_text(text) == text


def test_a_long_name_is_cut_where_a_limit_is_given() -> None:
    assert escaped_line("a" * 10, max_chars=4) == "aaaa..."
    assert escaped_line("aaaa", max_chars=4) == "aaaa"


def test_what_is_said_keeps_its_lines_and_steers_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(HOSTILE)
    complain(HOSTILE)
    shown = capsys.readouterr()
    assert shown.out == shown.err == "x\\x1b]0;owned\\x07\\x1b[2J\nFAKE: verified ok\n"
