"""Each measure of a reply, on real tokens of o200k_harmony."""

from __future__ import annotations

import pytest

from cpt.guard.generation.measures import (
    FORM_MEASURES,
    ReplyMeasures,
    final_text,
    is_right,
    loops,
    measure_reply,
    normalized,
)
from data_pipeline.text.harmony import CALL, CHANNEL, END, MESSAGE, RETURN, START
from data_pipeline.text.tokenizer import END_OF_TEXT, encode

ENGLISH = "The sky looks blue because the air scatters blue light more strongly than red light."
JAPANESE = "\u7a7a\u304c\u9752\u304f\u898b\u3048\u308b\u306e\u306f\u3001\u7a7a\u6c17\u304c"
JAPANESE += "\u9752\u3044\u5149\u3092\u3088\u304f\u6563\u3089\u3059\u304b\u3089\u3067\u3059\u3002"


def text(words: str) -> list[int]:
    return encode(words).tolist()


def message(channel: str, words: str) -> list[int]:
    return [CHANNEL, *text(channel), MESSAGE, *text(words)]


def reply(thinking: str = "Air scatters blue light.", final: str = ENGLISH) -> list[int]:
    """Return a reply as gpt-oss writes it, behind `<|start|>assistant`."""
    head = [*message("analysis", thinking), END, START, *text("assistant")]
    return [*head, *message("final", final), RETURN]


def measured(tokens: list[int], language: str = "en", *answers: str) -> ReplyMeasures:
    return measure_reply(tokens, language, answers)


def broken(measures: ReplyMeasures) -> list[str]:
    """Return the measures of form that are not passed."""
    return [name for name in FORM_MEASURES if not measures.value(name)]


def test_a_whole_reply_passes_every_measure() -> None:
    measures = measured(reply())
    assert broken(measures) == []
    assert measures.good_form and measures.right is None
    assert measures.thinking_tokens == len(text("Air scatters blue light."))
    assert final_text(reply()) == ENGLISH


@pytest.mark.parametrize(
    ("tokens", "lost"),
    [
        ([*message("final", ENGLISH), RETURN], ["thinks"]),
        (reply(thinking=" "), ["thinks"]),
        ([*message("analysis", "Blue light"), END, RETURN], ["parses", "final"]),
        (message("analysis", "Blue light is"), ["closes_thinking", "final", "ends"]),
        ([*message("analysis", "Blue light"), RETURN], ["final"]),
        (reply()[:-1], ["ends"]),
        (reply(final=""), ["final"]),
        (reply(final=JAPANESE), ["in_language"]),
        (reply(thinking="and so on " * 40), ["no_loop"]),
        (text(ENGLISH * 4), ["parses", "thinks", "final", "ends"]),
        ([*text(ENGLISH), RETURN], ["parses", "thinks", "final"]),
        ([], ["thinks", "final", "ends"]),
    ],
    ids=[
        "no_analysis",
        "blank_analysis",
        "no_final_message",
        "thinking_left_open",
        "ended_while_thinking",
        "cut_off",
        "empty_final",
        "other_language",
        "loop",
        "plain_text",
        "plain_text_that_ends",
        "empty",
    ],
)
def test_each_fault_fails_its_measures_and_no_other(tokens: list[int], lost: list[str]) -> None:
    measures = measured(tokens)
    assert broken(measures) == lost
    assert not measures.good_form


@pytest.mark.parametrize(
    "tokens",
    [
        [*reply(), *text("more")],
        [*message("analysis", "a"), END, *message("final", ENGLISH), RETURN],
        [CHANNEL, MESSAGE, *text("a"), END, START, *text("assistant"), *message("final", "b")],
        [*message("analysis", "a"), CHANNEL, *text("b"), END],
        [*message("analysis", "a"), END_OF_TEXT],
        [CHANNEL, *text("analysis"), CHANNEL, *text("final"), MESSAGE, *text("a"), RETURN],
    ],
    ids=["after_the_end", "no_start", "no_name", "control_in_text", "end_of_text", "two_channels"],
)
def test_control_tokens_in_the_wrong_place_do_not_parse(tokens: list[int]) -> None:
    assert not measured(tokens).parses


def test_a_tool_call_parses() -> None:
    header = [*text(" to=functions.search"), CHANNEL, *text("commentary json"), MESSAGE]
    call = [
        *message("analysis", "Look."),
        END,
        START,
        *text("assistant"),
        *header,
        *text("{}"),
        CALL,
    ]
    measures = measured(call)
    assert measures.parses and measures.ends and not measures.final


def test_japanese_is_asked_for_and_given() -> None:
    assert measured(reply(final=JAPANESE), "ja").in_language
    assert not measured(reply(final=ENGLISH), "ja").in_language


def test_code_and_numbers_are_in_no_language() -> None:
    code = "```python\nfor number in range(10):\n    print(number)\n```"
    assert measured(reply(final=code), "ja").in_language
    assert measured(reply(final="42"), "ja").in_language
    assert measured(reply(final=ENGLISH), "code").in_language


@pytest.mark.parametrize(("copies", "found"), [(40, True), (4, False)])
def test_a_piece_is_a_loop_from_five_copies_on(copies: int, found: bool) -> None:
    piece = text("Wait, let me count the letters of this word once more from its start. ")
    assert 10 < len(piece) < 40
    assert loops([*text(ENGLISH), *(piece * copies), *text(ENGLISH)]) is found


def test_one_token_is_a_loop_from_sixty_four_copies_on() -> None:
    dash = text("-")
    assert loops(dash * 64)
    assert not loops(dash * 63)


def test_ordinary_text_and_a_table_are_no_loop() -> None:
    rows = "".join(f"| {n} | {n * n} | {n**3} |\n" for n in range(60))
    assert not loops(text(rows))
    assert not loops(text(ENGLISH))


@pytest.mark.parametrize(
    ("final", "answer"),
    [
        ("42", "42"),
        ("**42**.", "42"),
        ("The sum is 1,042.", "1042"),
        ("It costs 3.50 in all.", "3.5"),
        (r"So \boxed{x+1}, as asked.", "x+1"),
        ("Answer: Rome", "rome"),
        ("We look at the map.\n\nRome", "Rome"),
        ("\u7b54\u3048\u306f\uff14\uff12\u3067\u3059\u3002", "42"),
        ("The result is \u221285.", "-85"),
        ("\u7b54\u3048\uff1a\u6771\u4eac\u3002", "\u6771\u4eac"),
    ],
)
def test_right_answers_are_found(final: str, answer: str) -> None:
    assert is_right(final, [answer])
    assert measured(reply(final=final), "en", "nothing", answer).right is True


@pytest.mark.parametrize(
    ("final", "answer"),
    [
        ("43", "42"),
        ("142", "42"),
        ("4.2", "42"),
        ("42, or rather 43", "42"),
        ("Rome is not it; Paris is.", "Rome"),
        ("", "42"),
        ("-42", "42"),
    ],
)
def test_wrong_answers_are_wrong(final: str, answer: str) -> None:
    assert not is_right(final, [answer])


def test_an_answer_that_is_only_thought_is_wrong() -> None:
    assert measured([*message("analysis", "It is 42."), RETURN], "en", "42").right is False


def test_normalization_keeps_what_tells_numbers_apart() -> None:
    assert normalized("1,000") == normalized("1000.0") == "1000"
    assert normalized("100") != normalized("10")
    assert normalized("-3") != normalized("3")


def test_measures_go_to_json_and_back() -> None:
    measures = measured(reply(), "en", "blue")
    assert ReplyMeasures.from_json(measures.to_json()) == measures
