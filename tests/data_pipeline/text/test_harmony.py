"""Conversations are rendered as openai-harmony renders them; what is learned is what is generated.

The conversations are random, each of a seed of its own, so a failure names the seed.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from data_pipeline.text.harmony import CALL, END, RETURN, START, Conversation
from data_pipeline.text.harmony_records import read_conversation, whole_conversation
from data_pipeline.text.harmony_tools import Tool, tools_section
from data_pipeline.text.tokenizer import decode, encode
from tests.support.conversations import random_record
from tests.support.harmony_oracle import as_seen, oracle_messages, oracle_prompt, oracle_tokens

SEEDS = range(300)


def record_of(seed: int, more: bool) -> dict[str, Any]:
    return random_record(random.Random(seed), more=more)


def read(record: dict[str, Any]) -> Conversation:
    conversation, reason = read_conversation(record)
    assert conversation is not None, reason
    return conversation


@pytest.mark.parametrize("more", [False, True])
def test_600_random_conversations_have_the_tokens_of_openai_harmony(more: bool) -> None:
    num_calls = 0
    for seed in SEEDS:
        record = record_of(seed, more)
        expected = oracle_tokens(as_seen(oracle_messages(record)))
        assert read(record).tokens().tolist() == expected, seed
        num_calls += expected.count(CALL)
    assert num_calls > 100


def learned_runs(conversation: Conversation) -> list[tuple[int, int]]:
    """Return [begin, end) of each stretch of learned tokens."""
    flags = conversation.learned().tolist()
    runs = []
    begin = None
    for number, flag in enumerate([*flags, False]):
        if flag and begin is None:
            begin = number
        elif not flag and begin is not None:
            runs.append((begin, number))
            begin = None
    return runs


def test_what_is_learned_is_what_the_model_generates_after_the_prompt_of_openai_harmony() -> None:
    """For every run: prompt for completion + learned tokens = beginning of the rendering."""
    for seed in SEEDS[:100]:
        record = record_of(seed, True)
        conversation = read(record)
        tokens = conversation.tokens().tolist()
        assert len(conversation.learned()) == len(tokens)
        messages = as_seen(oracle_messages(record))
        prompts = []
        for number, message in enumerate(messages):
            before = messages[number - 1]
            follows = before.author.role == "assistant" and before.channel != "final"
            in_run = follows and before.recipient is None
            if message.author.role == "assistant" and not in_run:
                prompts.append(oracle_prompt(messages[:number]))
        runs = learned_runs(conversation)
        last_turn = prompts[len(prompts) - len(runs) :]
        assert runs
        for (begin, end), prompt in zip(runs, last_turn, strict=True):
            assert tokens[:begin] == prompt, seed
            assert tokens[end - 1] in (CALL, RETURN), seed
        assert runs[-1][1] == len(tokens)


def test_the_end_of_an_earlier_answer_is_never_learned() -> None:
    """A model that learns <|end|> there goes on after its answer instead of stopping."""
    num_answers = 0
    for seed in SEEDS:
        conversation = read(record_of(seed, False))
        tokens, learned = conversation.tokens_and_learned()
        answers = sum(message.is_answer for message in conversation.messages)
        num_answers += answers - 1
        text = [decode(tokens[i : i + 1]) for i in range(len(tokens))]
        closed = 0
        channel = ""
        for number, token in enumerate(tokens):
            if text[number] == "<|channel|>":
                channel = text[number + 1]
            if token in (END, RETURN) and channel == "final":
                closed += 1
                assert bool(learned[number]) == (closed == answers), seed
            if token in (END, RETURN, CALL):
                channel = ""
        assert closed == answers
    assert num_answers > 100


def test_each_turn_is_the_conversation_cut_after_it() -> None:
    for seed in SEEDS:
        record = record_of(seed, False)
        whole = whole_conversation(record)
        turns = [whole.up_to(turn) for turn in whole.turns()]
        stops = []
        for number, message in enumerate(record["messages"], 1):
            if message["role"] == "assistant" and not message.get("tool_calls"):
                stops.append(number)
        assert len(turns) == len(stops)
        for turn, stop in zip(turns, stops, strict=True):
            cut = read({**record, "messages": record["messages"][:stop]})
            assert turn == cut, seed


def test_tokens_that_say_no_loss_are_not_learned() -> None:
    question = {"role": "user", "content": "Q"}
    answer = {"role": "assistant", "content": "A", "thinking": "hm"}
    conversation = read({"messages": [question, {**answer, "loss": False}]})
    assert not conversation.learned().any()
    analysis = {"role": "assistant", "channel": "analysis", "content": "hm", "loss": False}
    final = {"role": "assistant", "channel": "final", "content": "A"}
    conversation = read({"messages": [question, analysis, final]})
    tokens, learned = conversation.tokens_and_learned()
    assert decode(tokens[learned]) == "<|start|>assistant<|channel|>final<|message|>A<|return|>"
    assert conversation.num_learned_bytes == 1


def test_the_hash_of_a_conversation_without_tools_is_that_of_earlier_versions() -> None:
    """It decides which documents are held out, so rows of earlier builds depend on it."""
    conversation = read(
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    )
    assert conversation.content == (
        "(Message(role='user', channel='', text='Q'), "
        "Message(role='assistant', channel='final', text='A'))"
    )


@pytest.mark.parametrize("default", [10**400, [{"k": -(10**400)}]], ids=["alone", "nested"])
def test_a_default_that_no_float_holds_rejects_its_record(default: Any) -> None:
    """openai-harmony refuses such a record: number out of range."""
    field = {"type": "number", "default": default}
    parameters = {"type": "object", "properties": {"a": field}}
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    record = {"messages": messages, "tools": [{"name": "f", "parameters": parameters}]}
    conversation, reason = read_conversation(record)
    assert conversation is None and reason is not None and "out of range" in reason


def test_a_function_without_parameters_and_without_description_is_rendered() -> None:
    section = tools_section([Tool(name="f", description="")])
    assert section.endswith(
        "namespace functions {\n\ntype f = () => any;\n\n} // namespace functions"
    )
    assert START not in encode(section)
