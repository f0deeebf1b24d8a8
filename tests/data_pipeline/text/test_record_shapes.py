"""Conversations in the shapes of other tools give the tokens of the same conversation in ours."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config.source_config import Shape, SourceConfig
from data_pipeline.text.conversation_reader import ReadRecord, read_conversations
from data_pipeline.text.harmony_records import read_conversation
from data_pipeline.text.record_shapes import CONTRADICTION as OPPOSITE

ARGUMENTS = '{"city": "Tokyo"}'
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
WITH_CALL = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": CALLS},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
CALL_AS_TEXT = '{"name": "weather", "arguments": {"city": "Tokyo"}}'


def source(shape: Shape, **keys: Any) -> SourceConfig:
    return SourceConfig(
        name="c", language="en", domain="chat", format="harmony", shape=shape, weight=1.0, **keys
    )


def read(record: dict[str, Any], shape: Shape = "auto", **keys: Any) -> ReadRecord:
    return read_conversations(record, source(shape, **keys))


def tokens_of(reading: ReadRecord) -> list[int]:
    assert not reading.rejects
    (conversation,) = reading.conversations()
    return conversation.tokens().tolist()


def expected(messages: list[dict[str, Any]], **keys: Any) -> list[int]:
    conversation, reason = read_conversation({"messages": messages, **keys})
    assert conversation is not None, reason
    return conversation.tokens().tolist()


def share_turn(tag: str, value: str) -> dict[str, Any]:
    return {"from": tag, "value": value}


SHARED = [
    share_turn("human", "Q1"),
    share_turn("gpt", "A1"),
    share_turn("user", "Q2"),
    share_turn("assistant", "A2"),
]


@pytest.mark.parametrize("shape", ["auto", "sharegpt"])
def test_sharegpt_gives_the_same_conversation(shape: Shape) -> None:
    for record in (
        {"conversations": [share_turn("system", "Be kind."), *SHARED]},
        {"conversations": SHARED, "system": "Be kind.", "id": "7"},
        {"conversations": CHAT},
    ):
        assert tokens_of(read(record, shape)) == expected(CHAT)


def test_sharegpt_with_calls_gives_the_same_conversation() -> None:
    turns = [
        share_turn("human", "Weather?"),
        share_turn("gpt", "I look."),
        share_turn("function_call", CALL_AS_TEXT),
        share_turn("observation", "sunny"),
        share_turn("gpt", "It is sunny."),
    ]
    record = {"conversations": turns, "tools": '[{"name": "weather", "description": "Tells it."}]'}
    plain = {"name": "weather", "description": "Tells it."}
    assert tokens_of(read(record)) == expected(WITH_CALL, tools=[plain])
    without_preamble = {"conversations": [turns[0], *turns[2:]]}
    call = {"role": "assistant", "tool_calls": CALLS}
    assert tokens_of(read(without_preamble)) == expected([WITH_CALL[0], call, *WITH_CALL[2:]])


THINKING = "I should look it up."


def turns_with_call(preamble: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which a text and a call stand in turns of their own."""
    turns = [
        share_turn("human", "Weather?"),
        {**share_turn("gpt", "I look."), **preamble},
        {**share_turn("function_call", CALL_AS_TEXT), **call},
        share_turn("observation", "sunny"),
        share_turn("gpt", "It is sunny."),
    ]
    return {"conversations": turns, "tools": [TOOL]}


@pytest.mark.parametrize(
    ("preamble", "call"),
    [
        ({"reasoning_content": THINKING}, {"reasoning_content": None, "content": ""}),
        ({"reasoning_content": THINKING, "tool_calls": None}, {}),
        ({"reasoning_content": None}, {"reasoning_content": THINKING, "content": "I look."}),
        ({"thinking": THINKING}, {"thinking": THINKING, "role": "function_call"}),
        ({"thinking": THINKING, "value": None, "content": "I look."}, {"role": "assistant"}),
    ],
)
def test_a_call_of_sharegpt_keeps_what_was_said_and_thought_in_the_turn_before_it(
    preamble: dict[str, Any], call: dict[str, Any]
) -> None:
    record = turns_with_call(preamble, call)
    found = read(record, turns="each", loss="assistant")
    messages = copy.deepcopy(WITH_CALL)
    messages[1]["thinking"] = THINKING
    same = read({"messages": messages, "tools": [TOOL]}, turns="each", loss="assistant")
    assert found == same
    assert len(found.turns) == 1
    assert THINKING in [message.text for message in next(found.conversations()).messages]


@pytest.mark.parametrize(
    ("preamble", "call", "key"),
    [
        ({"thinking": THINKING}, {"thinking": "No."}, "thinking"),
        ({}, {"content": "Wait."}, "content"),
        ({"content": "Wait."}, {}, "content"),
        ({"role": "user"}, {}, "role"),
        ({}, {"tool_calls": CALLS}, "tool_calls"),
    ],
)
def test_a_turn_of_sharegpt_that_says_two_things_under_one_key_is_rejected(
    preamble: dict[str, Any], call: dict[str, Any], key: str
) -> None:
    found = read(turns_with_call(preamble, call))
    assert found.rejects == (f"turn with two different values of {key!r}",)


@pytest.mark.parametrize("shape", ["auto", "alpaca"])
def test_alpaca_gives_the_same_conversation(shape: Shape) -> None:
    record = {"instruction": "Q2", "input": "", "output": "A2", "system": "Be kind."}
    assert tokens_of(read({**record, "history": [["Q1", "A1"]]}, shape)) == expected(CHAT)
    with_input = {"instruction": "Translate.", "input": "yes", "output": "A", "category": "x"}
    question = {"role": "user", "content": "Translate.\n\nyes"}
    answer = {"role": "assistant", "content": "A"}
    assert tokens_of(read(with_input, shape)) == expected([question, answer])


def test_the_question_of_alpaca_may_be_a_template() -> None:
    record = {"context": "C", "question": "Q", "output": "A"}
    found = read(record, "alpaca", template="{context}\n---\n{question}")
    messages = [
        {"role": "user", "content": "C\n---\nQ"},
        {"role": "assistant", "content": "A"},
    ]
    assert tokens_of(found) == expected(messages)


def test_a_template_of_alpaca_reads_fields_inside_others() -> None:
    record = {"meta": {"q": "Q"}, "context": {"text": "C"}, "output": "A"}
    found = read(record, "alpaca", template="{context.text} {meta.q}")
    messages = [{"role": "user", "content": "C Q"}, {"role": "assistant", "content": "A"}]
    assert tokens_of(found) == expected(messages)
    missing = read({"meta": {}, "output": "A"}, "alpaca", template="{meta.q}")
    assert missing.rejects == ("no field 'meta.q'",)


def test_what_only_openai_has_is_read_under_its_name_alone() -> None:
    parts = [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]
    function = {"name": "weather", "arguments": ARGUMENTS}
    record = {
        "messages": [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": "I look.", "function_call": function, "weight": 0},
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny.", "weight": 1, "refusal": None},
        ],
        "functions": [TOOL["function"]],
        "parallel_tool_calls": False,
    }
    found = read(record, "openai", loss="assistant")
    assert tokens_of(found) == expected(WITH_CALL, tools=[TOOL])
    (conversation,) = found.conversations()
    bear_loss = [message.bears_loss for message in conversation.messages]
    assert bear_loss == [True, False, False, True, True]
    assert read(record).rejects  # auto guesses nothing


def test_openai_messages_of_tools_need_no_name_of_a_shape() -> None:
    result = {"role": "tool", "tool_call_id": "c", "content": "sunny"}
    messages = [*WITH_CALL[:2], result, WITH_CALL[3]]
    shapes: tuple[Shape, ...] = ("auto", "harmony", "openai")
    for shape in shapes:
        found = read({"messages": messages, "tools": [TOOL]}, shape)
        assert tokens_of(found) == expected(WITH_CALL, tools=[TOOL])


@pytest.mark.parametrize(
    ("record", "shape", "reason"),
    [
        ({"conversations": [share_turn("alien", "x")]}, "auto", "turn of an unknown 'from'"),
        ({"conversations": [*SHARED, {"from": "gpt"}]}, "auto", "message: text is null"),
        ({"conversations": [share_turn("function_call", "x")]}, "auto", "that is no JSON"),
        ({"conversations": SHARED, "score": 1}, "auto", "unknown key 'score' in a record"),
        ({"conversations": [{**SHARED[0], "mood": "x"}, SHARED[1]]}, "auto", "unknown key 'mood'"),
        ({"conversations": SHARED[:1]}, "auto", "the last message is not an answer"),
        ({"messages": CHAT}, "sharegpt", "no list of objects 'conversations'"),
        ({"conversations": SHARED}, "harmony", "no list of objects 'messages'"),
        ({"instruction": "Q", "output": "A", "score": 1}, "auto", "unknown key 'score'"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "auto", "not of pairs"),
        ({"instruction": " ", "output": "A"}, "auto", "field 'instruction': empty text"),
        ({"instruction": "Q", "output": ""}, "auto", "message: empty text"),
        ({"instruction": "Q"}, "auto", "no list of objects 'messages'"),
        ({"messages": [{**CHAT[1], "weight": 1}, CHAT[2]]}, "auto", "unknown key 'weight'"),
        ({"messages": [CHAT[1], {**CHAT[2], "weight": 0.5}]}, "openai", "neither 0 nor 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[2]]},
            "openai",
            "part of a message that is no text",
        ),
        ({"messages": [*CHAT, {"role": "user", "content": "Q"}]}, "openai", "is not an answer"),
        ({"messages": [CHAT[1], {**CHAT[2], "weight": 0, "loss": True}]}, "openai", OPPOSITE),
        ({"messages": [CHAT[1], {**CHAT[2], "weight": 1, "loss": False}]}, "openai", OPPOSITE),
        (
            {"conversations": [SHARED[0], {**SHARED[1], "weight": 0, "loss": True}]},
            "auto",
            OPPOSITE,
        ),
        (
            # as tables give all rows the same keys
            {"conversations": [SHARED[0], {**SHARED[1], "role": None, "weight": 0, "loss": True}]},
            "sharegpt",
            OPPOSITE,
        ),
        (
            {"conversations": [CHAT[1], {**CHAT[2], "weight": 0, "loss": True}]},
            "sharegpt",
            OPPOSITE,
        ),
    ],
)
def test_a_record_that_is_not_of_the_shape_is_rejected_with_its_reason(
    record: dict[str, Any], shape: Shape, reason: str
) -> None:
    found = read(record, shape)
    assert not found.turns
    assert reason in found.rejects[0]


def test_weight_and_loss_that_agree_or_are_not_learned_anyway_are_read() -> None:
    question = {**CHAT[1], "weight": 1, "loss": False}
    answers = [{**CHAT[2], "weight": 1, "loss": True}, {**CHAT[2], "weight": 1, "loss": None}]
    for answer in answers:
        found = read({"messages": [question, answer]}, "openai", loss="assistant")
        assert len(found.turns) == 1
    opposite = {"messages": [question, {**CHAT[2], "weight": 0, "loss": True}]}
    found = read(opposite, "openai", loss="assistant", ignored_keys=("weight",))
    assert len(found.turns) == 1, "whoever drops weight is obeyed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
SHAPES = st.sampled_from(["auto", "harmony", "openai", "sharegpt", "alpaca"])
RECORDS = (
    {"messages": WITH_CALL, "tools": [TOOL]},
    {"conversations": SHARED, "system": "Be kind."},
    {"instruction": "Q", "input": "I", "output": "A", "history": [["Q", "A"]]},
)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Return (list or object, index or key) for every value within a value."""
    found = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys:
            found.append((value, key))
            found += places_in(value[key])
    return found


@settings(max_examples=150, deadline=None)
@given(st.data(), SHAPES, st.sampled_from(RECORDS), JSON, st.booleans())
def test_a_record_with_any_value_in_any_place_gives_a_conversation_or_a_reason(
    data: st.DataObject, shape: Shape, record: dict[str, Any], value: Any, each: bool
) -> None:
    record = copy.deepcopy(record)
    places = places_in(record)
    holder, key = places[data.draw(st.integers(0, len(places) - 1))]
    holder[key] = value
    found = read(record, shape, loss="assistant", turns="each" if each else "last")
    assert bool(found.turns) or bool(found.rejects)
    for conversation in found.conversations():
        assert conversation.learned().any()


def test_keys_may_be_ignored_in_every_shape() -> None:
    turns = [{**turn, "mood": "x"} for turn in SHARED]
    record = {"conversations": turns, "system": "Be kind.", "score": 3}
    assert tokens_of(read(record, ignored_keys=("mood", "score"))) == expected(CHAT)


def test_a_weight_that_is_ignored_is_not_read_in_any_shape() -> None:
    messages = [CHAT[1], {**CHAT[2], "weight": 0.5}]
    shapes: tuple[Shape, ...] = ("harmony", "openai")
    for shape in shapes:
        found = read({"messages": messages}, shape, ignored_keys=("weight",))
        assert tokens_of(found) == expected(CHAT[1:3])
    turns = [share_turn("human", "Q1"), {**share_turn("gpt", "A1"), "weight": 0.5}]
    found = read({"conversations": turns}, "sharegpt", ignored_keys=("weight",))
    assert tokens_of(found) == expected(CHAT[1:3])


def test_a_shape_without_conversations_is_refused() -> None:
    wrong = dataclasses.replace(source("openai"), format="jsonl")
    assert "format: jsonl has no conversations" in dict(wrong.check())["shape"]
    assert "template" in dict(source("sharegpt", template="{a}").check())
    assert "template" not in dict(source("alpaca", template="{a}").check())
